"""Every way to choose what a language model trains, beside LoRA and its relatives: which one, how much, at which rate.

    make .venv/catalogues; python -m benchmarks language --workers 2 --seeds 1        all contenders
    python -m benchmarks language --task summary --only "1%, random" "LoRA r=16 (PEFT)" --out out/summary.json

A language model writes the answers to prompts, in bf16 autocast; the score is the mean loss of a token of the answers
to 128 held-out ones that are drawn once and for all; where answers are right or wrong, also how many of them greedy
decoding reproduces. Tasks are those of comparing/language_tasks.py. All contenders see the same batches. Each searches
its learning rate on the validation split with seed 0: four rates, from a tenth to three times the middle, and at most
two further ones while the best lies at an end. Then it trains with this rate and every other seed; nothing is decided
by the test split.

Dense trains all weights, TrainableTokens and rows those of the tokens that training texts have most, all others the
projections of every block. Of these, 0.1, 1 or 5 % are trained:

    random                 drawn anew for each seed
    sift                   the largest gradients, summed over four batches, in training mode as published
    fish, ird              the largest Fisher information of eight batches, in eval mode; ird selects texts, too
    magnitude              the largest weights
    relative               the largest gradients over weights
    principal              the largest entries of an approximation of rank 32 (LIFT, arXiv 2506.00772)

with equal density in each matrix, or with one budget over all; "re-selected" is every ten steps, where entries that
leave keep what they have learned. Peak memory is that of the process above the loaded model, on the CPU, selection
included, and for those that are re-selected a copy of the model. Seconds are CPU time of a run, scores included.

Every run is added to the results file as soon as it is finished; starting again continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .comparing import runs
from .comparing.contenders import Contender
from .comparing.language_tasks import TASKS
from .comparing.runs import measure, rows_of
from .comparing.tasks import completion
from .models import MODEL_HELP
from .study import Content, program

RANKS = (8, 16, 64)
EVERY = 10
# A choice and the middle of its rates at 1 %. At 5 % it is half of that, at 0.1 % three times.
MATRIX = {"random": 1e-2, "sift": 3e-3, "fish": 3e-3, "magnitude": 3e-3, "relative": 1e-2, "principal": 3e-3}
MODEL = {"sift": 3e-3, "fish": 3e-3, "ird": 3e-3, "magnitude": 3e-3, "relative": 1e-2, "principal": 3e-3}
RESELECTED = {"random": 1e-2, "sift": 3e-3, "relative": 1e-2, "principal": 3e-3}
UNITS = {
    ("random", "column"): 1e-2,
    ("sift", "column"): 3e-3,
    ("magnitude", "column"): 1e-2,
    ("random", "block"): 1e-2,
}
SCALES = {0.01: 1.0, 0.05: 0.5, 0.001: 3.0}


def contenders() -> dict[str, Contender]:
    """In the order in which they are measured."""
    found = {"dense": Contender("dense", 2e-4)}
    found |= {f"LoRA r={rank} (PEFT)": Contender("lora", 3e-3, rank=rank) for rank in RANKS}
    found["DoRA r=16 (PEFT)"] = Contender("dora", 3e-3, rank=16)
    found["SHiRA r=16 (PEFT)"] = Contender("shira", 1e-2, rank=16)
    found["TrainableTokens (PEFT)"] = Contender("tokens", 1e-2, density=0.01)
    found["1%, rows of frequent tokens"] = Contender("rows", 1e-2, density=0.01)
    for density, scale in SCALES.items():
        share = f"{100 * density:g}%"
        for choice, lr in MATRIX.items():
            found[f"{share}, {choice}"] = Contender(choice, lr * scale, density=density)
        for (choice, unit), lr in UNITS.items():
            found[f"{share}, {choice}, {unit}s"] = Contender(choice, lr * scale, unit, density)
        for choice, lr in RESELECTED.items():
            found[f"{share}, {choice}, re-selected"] = Contender(choice, lr * scale, density=density, every=EVERY)
        for choice, lr in MODEL.items():
            found[f"{share}, {choice}, over all"] = Contender(choice, lr * scale, density=density, budget="model")
    return found


CONTENDERS = contenders()


def rates(middle: float) -> tuple[float, ...]:
    return (middle / 10, middle / 3, middle, 3 * middle)


def arguments(add: Callable[..., Any]) -> None:
    add("--model", default="smollm2", help=f"{MODEL_HELP}, of a causal language model [%(default)s]")
    add("--task", default="translation-de", choices=list(TASKS), help="[%(default)s]")
    runs.arguments(add, list(CONTENDERS))


def table(content: Content) -> str:
    settings = content["settings"]
    return rows_of(content, CONTENDERS, "language", f"{settings['model']}, {settings['task']}", higher=False)


SMALL = ("--steps", "2", "--batch-size", "2", "--seeds", "1", "--only", "1%, random, columns", "LoRA r=16 (PEFT)")
main = program(
    "language",
    __doc__,
    arguments,
    partial(measure, make_task=completion, contenders=CONTENDERS, rates=rates),
    table,
    small=SMALL,
)
