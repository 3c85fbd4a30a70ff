"""Elements, rows, columns and blocks of a language model: how well each trains, beside LoRA and dense fine-tuning.

    make .venv/catalogues; python -m benchmarks grains

SmolLM2-135M translates strings of message catalogues, English to German: the loss on the translation, on the first 128
held-out strings in alphabetical order. `grains-text` is the same study of an encoder, `language` one of more
contenders, models and tasks. All contenders see the same batches. Each searches its learning rate on the validation
split with seed 0: three rates a factor of three apart, and at most two further ones while the best lies at an end. Then
it trains with this rate and every other seed, a new mask and a new order of texts for each. A run says the score of the
validation and of the test split; nothing is decided by the latter. All contenders but dense train the projections of
every block and, where the head is new, the head; dense trains all weights. A new head has one rate for all, which was
found for dense training. LoRA with r=16 and r=4 has 4.6 % and 1.2 % as many weights as the projections of SmolLM2, 6.3
% and 1.6 % as many as MiniLM's. SIFT sums the gradient over four batches, in training mode as it is published; the
Fisher information is that of eight, in eval mode.

Every run is added to the results file as soon as it is finished; starting again continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .comparing import runs
from .comparing.contenders import Contender
from .comparing.runs import measure, rows_of
from .comparing.tasks import translation
from .study import Content, program


def contenders() -> dict[str, Contender]:
    found = {"dense": Contender("dense", 1e-4)}
    found |= {f"LoRA r={rank} (PEFT)": Contender("lora", 1e-3, rank=rank) for rank in (16, 4)}
    for density in (0.01, 0.05):
        for granularity in ("element", "row", "column", "block"):
            for choice in ("random", "sift", "fish"):
                rate = 1e-2 if choice == "random" else 3e-3
                rate = rate if density < 0.05 else rate / 2
                found[f"{density:.0%} {granularity}s, {choice}"] = Contender(choice, rate, granularity, density)
    return found


CONTENDERS = contenders()


def arguments(add: Callable[..., Any]) -> None:
    runs.arguments(add, list(CONTENDERS))


def table(content: Content) -> str:
    return rows_of(
        content,
        CONTENDERS,
        "grains",
        "SmolLM2-135M, English to German strings, of the held-out ones the first 128 in the alphabet",
        higher=False,
    )


SMALL = ("--steps", "2", "--batch-size", "2", "--seeds", "1", "--only", "1% columns, random", "LoRA r=16 (PEFT)")
main = program(
    "grains",
    __doc__,
    arguments,
    partial(measure, make_task=translation, contenders=CONTENDERS),
    table,
    small=SMALL,
)
