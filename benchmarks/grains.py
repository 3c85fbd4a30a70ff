"""Elements, rows, columns and blocks of a language model: how well each trains, beside LoRA and dense fine-tuning.

    make .venv/catalogues; python -m benchmarks grains

SmolLM2-135M translates strings of message catalogues, English to German: the loss on the translation, on the first 128
held-out strings in alphabetical order. `grains-language` is the same study of other language models and tasks,
`grains-text` of an encoder. All contenders see the same batches. Each searches its learning rate on the validation
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

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import sparsekernels as sk
from sparsekernels.common.names import default_targets

from . import study
from .finetuning.methods import add_adapters
from .grain_tasks import Task, translation
from .study import Content, Refused, Study, best_rate, program
from .translating.prompts import Batch

SEARCH_SEED = 0
UNTUNED = "untuned"
BLOCK = (64, 64)
WARM_UP = 0.1  # of the steps; then the rate falls to zero, linearly
HEAD_RATE = 1e-2  # of a new head, for every contender: the best of three for dense training in `accuracy`


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


def select(contender: Contender, model: nn.Module, given: Sequence[Batch], seed: int) -> sk.Selection:
    names = default_targets(model)
    units: dict[str, Any] = {"granularity": contender.granularity}
    if contender.granularity == "block":
        units["block"] = BLOCK
    if contender.choice == "random":
        return sk.Selection.random(model, contender.density, seed=seed, names=names, **units)
    if contender.choice == "sift":
        return sk.methods.sift(
            model, given, contender.density, targets=names, head=(), num_batches=4, progress=False, **units
        )
    fisher = sk.fisher_diagonal(model, given[:8], names=names, progress=False)
    # The Fisher information of a unit is the sum over its entries: topk sums squares.
    scores = {name: total.sqrt_() for name, total in fisher.items()}
    return sk.Selection.topk(scores, density=contender.density, per_tensor=True, **units)


def prepared(
    contender: Contender, task: Task, model: nn.Module, given: Sequence[Batch], rate: float, seed: int
) -> torch.optim.Optimizer:
    """The optimizer of what the contender trains of the model, which is changed to train that alone."""
    head = task.head(model)
    sparse = contender.choice not in ("dense", "lora")
    if sparse:
        whole = {name: sk.Index.full(model.get_parameter(name).shape) for name in head}
        tuned = sk.train_only(model, select(contender, model, given, seed) | sk.Selection(whole))
        parameters = dict(tuned.named_parameters())
    else:
        if contender.choice == "lora":
            add_adapters(model, head, contender.rank, seed)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in head], "lr": rate},
        {"params": [p for name, p in parameters.items() if name in head], "lr": HEAD_RATE},
    ]
    groups = [group for group in groups if group["params"]]
    if sparse:
        return sk.SparseAdamW(groups, weight_decay=0.0)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def train(task: Task, contender: Contender, rate: float, seed: int) -> Content:
    """One run; the score on the validation and the test split."""
    started = time.perf_counter()
    model, given = task.model(seed).train(), task.train(seed)
    optimizer = prepared(contender, task, model, given, rate, seed)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    warm = max(1, round(WARM_UP * len(given)))
    torch.manual_seed(seed)  # the same dropout for every contender, whatever its choice drew
    for step, batch in enumerate(given):
        scale = min((step + 1) / warm, (len(given) - step) / max(1, len(given) - warm))
        for group, highest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = highest * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {
        **{split: task.score(model, task.held_out(split)) for split in ("validation", "test")},
        "trained_weights": sum(p.numel() for p in parameters),
        "seconds": round(time.perf_counter() - started, 1),
    }


def arguments(add: Callable[..., Any]) -> None:
    add("--steps", type=study.positive, help="steps of a run [50; grains-text: an epoch]")
    add("--batch-size", type=study.positive, help="texts of a batch [8; grains-text: 32]")
    add("--seeds", type=study.positive, default=3, help="runs with the rate that was found [%(default)s]")
    add("--only", nargs="+", metavar="NAME", choices=list(CONTENDERS), help="measure these contenders alone")


def measure(args: argparse.Namespace, origin: Content, make_task: Callable[[argparse.Namespace], Task]) -> Content:
    names = args.only or list(CONTENDERS)
    task = make_task(args)
    settings = {"steps": task.steps, "batch_size": task.batch_size, "block": list(BLOCK), "seeds": args.seeds}
    results = Study(args.out, settings | task.settings, origin)

    def run(name: str, rate: float, seed: int) -> Content:
        def once() -> Content:
            found = train(task, CONTENDERS[name], rate, seed)
            print(f"{name}, lr {rate:g}, seed {seed}: {found}", flush=True)
            return found

        return results.run({"name": name, "lr": rate, "seed": seed}, once)

    results.run({"name": UNTUNED, "lr": 0.0, "seed": SEARCH_SEED}, lambda: untuned(task))
    sign = 1 if task.higher else -1
    for name in names:
        rate = best_rate(lambda rate: sign * run(name, rate, SEARCH_SEED)["validation"], CONTENDERS[name].lr)  # noqa: B023
        for seed in range(args.seeds):
            run(name, rate, seed)
    return results.content


def untuned(task: Task) -> Content:
    return {"test": task.score(task.model(SEARCH_SEED).eval(), task.held_out("test"))}


def final_runs(content: Content, name: str, higher: bool = False) -> list[Content]:
    """The runs with the rate of the best validation score, in the order of their seeds; none if some are missing."""
    runs = [run for run in content["runs"] if run["name"] == name]
    search = [run for run in runs if run["seed"] == SEARCH_SEED]
    best = max if higher else min
    rate = best(search, key=lambda run: run["validation"])["lr"] if search else None
    found = sorted((run for run in runs if run["lr"] == rate), key=lambda run: run["seed"])
    return found if len(found) == content["settings"]["seeds"] else []


def table(content: Content) -> str:
    return rows_of(
        content,
        "grains",
        "SmolLM2-135M, English to German strings, of the held-out ones the first 128 in the alphabet",
        higher=False,
    )


def rows_of(content: Content, program: str, about: str, higher: bool) -> str:
    dense, rows = final_runs(content, "dense", higher), []
    form, score = (".1%", "test accuracy") if higher else (".3f", "test loss")
    scale, gap = (100, ".1f") if higher else (1, ".3f")
    for name in CONTENDERS:
        runs = final_runs(content, name, higher)
        if not runs:
            continue
        tried = [run["lr"] for run in content["runs"] if run["name"] == name and run["seed"] == SEARCH_SEED]
        gaps = [run["test"] - other["test"] for run, other in zip(runs, dense, strict=False)]
        rows.append(
            [
                name,
                f"{runs[0]['trained_weights']:,}",
                study.mean_and_spread((run["test"] for run in runs), form),
                f"{scale * statistics.mean(gaps):+{gap}}{' points' * higher}" if gaps and name != "dense" else "",
                f"{runs[0]['lr']:g}",
                f"{min(tried):g} to {max(tried):g}",
            ]
        )
    if not rows:
        raise Refused("no contender was measured to the end")
    head = ["", "trained weights", score, "against dense", "learning rate", "tried"]
    (base,) = [run["test"] for run in content["runs"] if run["name"] == UNTUNED]
    settings = content["settings"]
    said = (
        f"{about}, {settings['steps']} steps of {settings['batch_size']}; before: {base:{form}}. "
        f"Mean ± standard deviation over {settings['seeds']} seeds."
    )
    text = [said, "", study.table(head, rows), "", study.written_by(content, f"python -m benchmarks {program}")]
    return "\n".join(text)


SMALL = ("--steps", "2", "--batch-size", "2", "--seeds", "1", "--only", "1% columns, random", "LoRA r=16 (PEFT)")
main = program("grains", __doc__, arguments, partial(measure, make_task=translation), table, small=SMALL)
