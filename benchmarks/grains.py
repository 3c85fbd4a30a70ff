"""Elements, rows, columns and blocks of a language model: how well each trains, beside LoRA and dense fine-tuning.

    make .venv/catalogues; python -m benchmarks grains

SmolLM2-135M translates strings of message catalogues, English to German: the loss on the translation, on held-out
strings. Everybody sees the same batches. Each contender searches its learning rate by validation loss with seed 0:
three rates a factor of three apart, and further ones as long as the best lies at an end. Then it trains with this rate
and every other seed, a new mask and a new order of texts for each. A run says the loss of the validation and of the
test split; nothing is decided by the latter. All contenders train the seven projections of every block and nothing
else, except dense, which trains all weights. LoRA has 4.9M weights with r=16 and 1.2M with r=4, about 5 % and 1 %.

Every run is added to the results file as soon as it is finished; starting again continues where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sparsekernels as sk

from . import study
from .models import smollm2
from .step_cost import PROJECTIONS
from .study import Content, Refused, Study, best_rate, program
from .translating.parallel_text import from_packages
from .translating.prompts import Batch, batches

SEARCH_SEED = 0
UNTUNED = "untuned"
SCORED = 128  # held-out strings
BLOCK = (64, 64)
WARM_UP = 0.1  # of the steps; then the rate falls to zero, linearly

Trainable = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Contender:
    """What is trained: a way to choose, a granularity, a density; and the middle of the rates that are tried."""

    choice: str  # "random", "sift", "fish", "dense" or "lora"
    lr: float
    granularity: str = "element"
    density: float = 0.0
    rank: int = 0


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


def select(contender: Contender, model: nn.Module, train: Sequence[Batch], seed: int) -> sk.Selection:
    names = [name for name, _ in model.named_parameters() if name.split(".")[-2] in PROJECTIONS]
    units: dict[str, Any] = {"granularity": contender.granularity}
    if contender.granularity == "block":
        units["block"] = BLOCK
    if contender.choice == "random":
        return sk.Selection.random(model, contender.density, seed=seed, names=names, **units)
    if contender.choice == "sift":
        return sk.methods.sift(
            model, train, contender.density, targets=names, head=(), num_batches=4, progress=False, **units
        )
    fisher = sk.fisher_diagonal(model, train[:8], names=names, progress=False)
    # The Fisher information of a unit is the sum over its entries: topk sums squares.
    scores = {name: total.sqrt_() for name, total in fisher.items()}
    return sk.Selection.topk(scores, density=contender.density, per_tensor=True, **units)


def prepared(
    contender: Contender, model: nn.Module, train: Sequence[Batch], rate: float, seed: int
) -> tuple[nn.Module, Trainable, torch.optim.Optimizer]:
    """The model to call, what it trains, and the optimizer."""
    if contender.choice == "dense":
        parameters = list(model.parameters())
        return model, parameters, torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    if contender.choice == "lora":
        import peft

        torch.manual_seed(seed)
        config = peft.LoraConfig(r=contender.rank, lora_alpha=2 * contender.rank, target_modules=list(PROJECTIONS))
        model = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        parameters = [p for p in model.parameters() if p.requires_grad]
        return model, parameters, torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    tuned = sk.train_only(model, select(contender, model, train, seed))
    parameters = list(tuned.parameters())
    return model, parameters, sk.SparseAdamW(parameters, lr=rate, weight_decay=0.0)


@torch.no_grad()
def mean_loss(model: nn.Module, held_out: Sequence[Batch]) -> float:
    """The loss of a token, over all of them."""
    total, count = 0.0, 0
    for batch in held_out:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


class Task:
    """The model, and batches of each split."""

    def __init__(self, batch_size: int, steps: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.make: Callable[[], nn.Module] = lambda: AutoModelForCausalLM.from_pretrained(folder)
        (self.text,) = from_packages(["de"])
        self.batch_size, self.steps = batch_size, steps

    def train(self, seed: int) -> list[Batch]:
        return batches(self.tokenizer, self.text.pairs["train"], self.batch_size, seed)[: self.steps]

    def held_out(self, split: str) -> list[Batch]:
        return batches(self.tokenizer, self.text.pairs[split][:SCORED], 16)


def train(task: Task, contender: Contender, rate: float, seed: int) -> Content:
    """One run; the loss on the validation and the test split."""
    started = time.perf_counter()
    base, given = task.make().train(), task.train(seed)
    model, parameters, optimizer = prepared(contender, base, given, rate, seed)
    warm = max(1, round(WARM_UP * len(given)))
    for step, batch in enumerate(given):
        scale = min((step + 1) / warm, (len(given) - step) / max(1, len(given) - warm))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {
        **{split: mean_loss(model, task.held_out(split)) for split in ("validation", "test")},
        "trained_weights": sum(p.numel() for p in parameters),
        "seconds": round(time.perf_counter() - started, 1),
    }


def arguments(add: Callable[..., Any]) -> None:
    add("--steps", type=study.positive, default=50, help="steps of a run [%(default)s]")
    add("--batch-size", type=study.positive, default=8, help="strings of a batch [%(default)s]")
    add("--seeds", type=study.positive, default=3, help="runs with the rate that was found [%(default)s]")
    add("--only", nargs="+", metavar="NAME", choices=list(CONTENDERS), help="measure these contenders alone")


def measure(args: argparse.Namespace, origin: Content) -> Content:
    names = args.only or list(CONTENDERS)
    task = Task(args.batch_size, args.steps)
    settings = {"steps": args.steps, "batch_size": args.batch_size, "block": list(BLOCK), "scored": SCORED}
    settings |= {
        "seeds": args.seeds,
        "language": task.text.language,
        "data": task.text.source,
        "texts": task.text.sizes,
    }
    results = Study(args.out, settings, origin)

    def run(name: str, rate: float, seed: int) -> Content:
        def once() -> Content:
            found = train(task, CONTENDERS[name], rate, seed)
            print(f"{name}, lr {rate:g}, seed {seed}: {found}", flush=True)
            return found

        return results.run({"name": name, "lr": rate, "seed": seed}, once)

    results.run({"name": UNTUNED, "lr": 0.0, "seed": SEARCH_SEED}, lambda: untuned(task))
    for name in names:
        rate = best_rate(lambda rate: -run(name, rate, SEARCH_SEED)["validation"], CONTENDERS[name].lr)  # noqa: B023
        for seed in range(args.seeds):
            run(name, rate, seed)
    return results.content


def untuned(task: Task) -> Content:
    return {"test": mean_loss(task.make().eval(), task.held_out("test"))}


def final_runs(content: Content, name: str) -> list[Content]:
    """The runs with the rate of the lowest validation loss, in the order of their seeds; none if some are missing."""
    runs = [run for run in content["runs"] if run["name"] == name]
    search = [run for run in runs if run["seed"] == SEARCH_SEED]
    rate = min(search, key=lambda run: run["validation"])["lr"] if search else None
    found = sorted((run for run in runs if run["lr"] == rate), key=lambda run: run["seed"])
    return found if len(found) == content["settings"]["seeds"] else []


def table(content: Content) -> str:
    dense, rows = final_runs(content, "dense"), []
    for name in CONTENDERS:
        runs = final_runs(content, name)
        if not runs:
            continue
        tried = [run["lr"] for run in content["runs"] if run["name"] == name and run["seed"] == SEARCH_SEED]
        gaps = [run["test"] - other["test"] for run, other in zip(runs, dense, strict=False)]
        rows.append(
            [
                name,
                f"{runs[0]['trained_weights']:,}",
                study.mean_and_spread((run["test"] for run in runs), ".3f"),
                f"{statistics.mean(gaps):+.3f}" if gaps and name != "dense" else "",
                f"{runs[0]['lr']:g}",
                f"{min(tried):g} to {max(tried):g}",
            ]
        )
    if not rows:
        raise Refused("no contender was measured to the end")
    head = ["", "trained weights", "test loss", "above dense", "learning rate", "tried"]
    (base,) = [run["test"] for run in content["runs"] if run["name"] == UNTUNED]
    settings = content["settings"]
    about = (
        f"SmolLM2-135M, English to German strings, {settings['steps']} steps of {settings['batch_size']}; untuned: "
        f"{base:.3f}. Mean ± standard deviation over {settings['seeds']} seeds."
    )
    text = [about, "", study.table(head, rows), "", study.written_by(content, "python -m benchmarks grains")]
    return "\n".join(text)


main = program(
    "grains",
    __doc__,
    arguments,
    measure,
    table,
    small=("--steps", "2", "--batch-size", "2", "--seeds", "1", "--only", "1% columns, random", "LoRA r=16 (PEFT)"),
)
