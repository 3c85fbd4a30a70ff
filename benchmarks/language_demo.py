"""Fine-tune a language model sparsely, with LoRA and densely, and read what it writes before and after.

    python -m benchmarks language-demo

SmolLM2-135M learns to summarise a docstring in one line, or another task of comparing/language_tasks.py: fifty steps of
eight texts in bf16 autocast, at rates near those that the studies `grains` and `language` found; one seed. It prints
what each way costs and reaches on 64 held-out texts, and what the model answers to three of them.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import study
from .comparing import runs
from .comparing.language_tasks import TASKS
from .comparing.tasks import completion
from .language import CONTENDERS
from .models import MODEL_HELP
from .study import MIB, Content, in_fresh_process, program

RATES = {
    "5%, random, columns": 5e-3,
    "1%, sift": 1e-3,
    "LoRA r=16 (PEFT)": 3e-3,
    "dense": 1e-4,
}
SAMPLES, TOKENS = 3, 32  # prompts that are answered, and how long an answer may be
WIDTH = 110


def arguments(add: Callable[..., Any]) -> None:
    add("--model", default="smollm2", help=f"{MODEL_HELP}, of a causal language model [%(default)s]")
    add("--task", default="summary", choices=list(TASKS), help="[%(default)s]")
    add("--steps", type=study.positive, default=50, help="[%(default)s]")
    add("--batch-size", type=study.positive, default=8, help="[%(default)s]")


def one(args: argparse.Namespace, name: str | None) -> Content:
    """Train one contender, or none; its scores, what it took, and what is written."""
    if args.threads:
        torch.set_num_threads(args.threads)
    task = completion(args)
    model, found = (task.model(0).eval(), {}) if name is None else runs.fit(task, CONTENDERS[name], RATES[name], 0)
    task.pairs["test"] = task.pairs["test"][::2]
    pairs = task.pairs["test"][:: max(1, len(task.pairs["test"]) // SAMPLES)][:SAMPLES]
    written = task.written(model, [prompt for prompt, _ in pairs], TOKENS)
    found |= runs.scores(task, model, ["test"])
    return {**found, "samples": [[*pair, text] for pair, text in zip(pairs, written, strict=True)]}


def measure(args: argparse.Namespace, origin: Content) -> Content:
    settings = {key: getattr(args, key) for key in ("model", "task", "steps", "batch_size")}
    content: Content = {**origin, "settings": settings, "runs": []}
    for name in (None, *RATES):
        found = in_fresh_process(one, args, name)
        print(f"{name or 'before'}: test loss {found['test']:.3f}", flush=True)
        content["runs"].append({"name": name or "before", "lr": RATES.get(name or ""), **found})
    study.write_json(args.out, content)
    return content


def table(content: Content) -> str:
    rows = []
    for run in content["runs"]:
        right = [f"{run['right']:.0%}"] if "right" in run else []
        if run["lr"] is None:
            rows.append([run["name"], f"{run['test']:.3f}", *right, "", "", "", ""])
            continue
        costs = (run["peak_bytes"] / MIB, run["bytes_to_ship"] / MIB)
        more = [f"{run['lr']:g}", f"{run['trained_weights']:,}", *(f"{cost:,.0f} MiB" for cost in costs)]
        rows.append([run["name"], f"{run['test']:.3f}", *right, *more])
    head = ["", "test loss", *(["right answers"] * ("right" in content["runs"][0]))]
    head += ["learning rate", "trained weights", "peak memory above the model", "to ship"]
    return "\n".join([study.table(head, rows, aligned=True), *samples(content["runs"])])


def samples(found: list[Content]) -> list[str]:
    """Each prompt, its answer, and what was written."""
    lines = []
    for number, (prompt, answer, _) in enumerate(found[0]["samples"]):
        lines += ["", *textwrap.wrap(prompt, WIDTH)]
        width = max(len("reference"), *(len(run["name"]) for run in found))
        lines.append(f"  {'reference':<{width}}  {answer}")
        lines += [f"  {run['name']:<{width}}  {run['samples'][number][2]}" for run in found]
    return lines


main = program(
    "language-demo",
    __doc__,
    arguments,
    measure,
    table,
    small=("--steps", "4", "--batch-size", "2"),
    out=Path("out/language-demo/results.json"),
)
