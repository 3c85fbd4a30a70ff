"""How much of the gradient's norm the largest entries carry: SIFT's claim, on language models before training.

    make .venv/catalogues .venv/gemma; python -m benchmarks gradient-curve

The paper (arXiv 2312.11875) says that one entry in a hundred carries 99 % of the norm of the gradient. Here it is the
gradient of the projections for one batch, in fp32, in training mode, as SIFT selects: each matrix gives the same share
of its entries. Batches are the first of so many orders of the training texts of a task; the answers alone count in the
loss.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparsekernels as sk

from . import study
from .comparing.language_tasks import TASKS
from .comparing.tasks import completion
from .finetuning.plots import pyplot, save_figure
from .models import MODEL_HELP
from .study import Content, Study, mean_and_spread, program

SHARES = (0.001, 0.01, 0.1)  # of these the curve has points
CLAIMED = (0.01, 0.99)  # share of the entries, share of the norm


def arguments(add: Callable[..., Any]) -> None:
    add("--model", action="append", help=f"{MODEL_HELP}, of a causal language model; repeatable [smollm2, gemma3-270m]")
    add("--task", action="append", choices=list(TASKS), help="repeatable [translation-de, summary]")
    add("--batch-size", type=study.positive, default=8, help="texts [%(default)s]")
    add("--batches", type=study.positive, default=3, help="[%(default)s]")


def measure(args: argparse.Namespace, origin: Content) -> Content:
    models, tasks = args.model or ["smollm2", "gemma3-270m"], args.task or ["translation-de", "summary"]
    settings = {"batch_size": args.batch_size, "batches": args.batches}
    results = Study(args.out, settings, origin)
    for model_name in models:
        for task_name in tasks:
            wanted = argparse.Namespace(model=model_name, task=task_name, batch_size=args.batch_size, steps=1)
            task = completion(wanted)
            model = task.model(0).train()
            for seed in range(args.batches):

                def curve(seed: int = seed, task: Any = task, model: Any = model) -> Content:
                    selection = sk.methods.sift(model, task.train(seed), CLAIMED[0], head=(), progress=False)
                    return {"curve": selection.report["curve"]}

                results.run({"model": model_name, "task": task_name, "seed": seed}, curve)
            print(f"{model_name}, {task_name}: done", flush=True)
    return results.content


def carried(curve: list[list[float]], share: float) -> float:
    """At the point of the curve for this share; there is one every eighth of a decade."""
    (found,) = [norm for entries, norm in curve if math.isclose(entries, share)]
    return found


def of_each(content: Content) -> dict[tuple[str, str], list[list[list[float]]]]:
    """(model, task) -> curves."""
    found: dict[tuple[str, str], list[list[list[float]]]] = {}
    for run in content["runs"]:
        found.setdefault((run["model"], run["task"]), []).append(run["curve"])
    return found


def table(content: Content) -> str:
    rows, best = [], 0.0
    for (model, task), curves in of_each(content).items():
        shares = [[carried(curve, share) for curve in curves] for share in SHARES]
        rows.append([model, task, *(mean_and_spread(each, ".1%") for each in shares)])
        best = max(best, *(carried(curve, CLAIMED[0]) for curve in curves))
    head = ["model", "task", *(f"{100 * share:g} % of the entries carry" for share in SHARES)]
    settings = content["settings"]
    verdict = "holds" if best >= CLAIMED[1] else "does not hold"
    return "\n".join(
        [
            "Share of the norm of the gradient of the projections, of one batch of "
            f"{settings['batch_size']} texts; mean ± standard deviation over {settings['batches']} batches. That one "
            f"entry in a hundred carries 99 % of it {verdict} here: {best:.0%} at most.",
            "",
            study.table(head, rows),
            "",
            study.written_by(content, "python -m benchmarks gradient-curve"),
        ]
    )


def draw(content: Content, out: Path) -> list[Path]:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4))
    for (model, task), curves in of_each(content).items():
        shares = [100 * share for share, _ in curves[0]]
        means = [100 * sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(shares))]
        axes.plot(shares, means, label=f"{model}, {task}")
    axes.plot(*(100 * part for part in CLAIMED), "kx", label="the paper's claim")
    axes.set_xscale("log")
    axes.set_xlabel("largest entries of each matrix, %")
    axes.set_ylabel("share of the gradient's norm, %")
    axes.legend()
    path = out.with_suffix(".png")
    save_figure(figure, path)
    return [path]


main = program(
    "gradient-curve",
    __doc__,
    arguments,
    measure,
    table,
    draw,
    small=("--model", "smollm2", "--task", "translation-de", "--batches", "1", "--batch-size", "2"),
)
