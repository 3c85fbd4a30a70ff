"""Masks from Fisher information: FISH, IRD, the reversed mask, beside a random one and dense training.

    python -m benchmarks ird

The text task and the model of finetune.py, one epoch, three seeds, over densities and numbers of samples that the
masks are made from. FISH takes the first so many texts of the seed's shuffled order; IRD starts from the same texts
and shrinks them. At the larger density, masks are made from the larger number of texts only, as the reversed mask
always is. First FISH, IRD and the random mask search their learning rates with seed 0, at the first density and the
larger number; the reversed mask has that of FISH, dense training and the head have those that accuracy.py
found. Every run is added to the results file as soon as it is finished; starting again continues where it stopped.
Results: results/ird.json, ird.md, ird.png, ird_shrinking.png.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .finetuning.config import Config, add_text_arguments, config_of
from .finetuning.methods import Prepared, prepare_ird
from .finetuning.plots import COLORS, draw_shrinking, pyplot, save_figure
from .finetuning.text_task import TextTask, load_task
from .finetuning.training import load
from .finetuning.trainings import Entry, Trainings, table
from .study import Content, in_fresh_process, program

SEEDS = (0, 1, 2)
DENSITIES = (0.005, 0.02)
SAMPLES = (64, 1024)
DENSE_RATE, HEAD_RATE = 3e-4, 1e-2
LABELS = {"fish": "FISH", "ird": "IRD", "reversed": "reversed mask", "uniform": "random mask", "dense": "dense"}


def name_of(method: str, density: float, samples: int) -> str:
    if method == "dense":
        return "dense"
    size = f"{LABELS[method]} {100 * density:g}%"
    return f"{size}, {samples} texts" if method in ("fish", "ird") else size


def entries() -> dict[str, Entry]:
    """Name -> entry, in the order of the table."""
    found = {"dense": Entry("dense", 1.0, DENSE_RATE)}
    for density in DENSITIES:
        for method, middle in (("fish", 3e-3), ("ird", 3e-3), ("reversed", 3e-3), ("uniform", 9e-3)):
            several = method in ("fish", "ird") and density == DENSITIES[0]
            for samples in SAMPLES if several else SAMPLES[-1:]:
                found[name_of(method, density, samples)] = Entry(method, density, middle, samples)
    return found


def draw(content: Content, out: Path) -> list[Path]:
    """The accuracy of every mask; and how IRD shrinks samples and parameters."""
    plt = pyplot()
    rows, by_name = content["summary"], {row["name"]: row for row in content["summary"]}
    figure, axes = plt.subplots(figsize=(7, 4))
    names = [row["name"] for row in sorted(rows, key=lambda row: row["test"])]
    means, spreads = ([100 * by_name[name][key] for name in names] for key in ("test", "spread"))
    methods = [*LABELS.values()]
    colors = [COLORS[next(i for i, label in enumerate(methods) if name.startswith(label))] for name in names]
    axes.barh(names, means, xerr=spreads, color=colors, height=0.6, capsize=3)
    axes.set(xlabel="test accuracy, % (bars: standard deviation over the seeds)", xlim=(max(0, min(means) - 10), None))
    axes.grid(axis="y", visible=False)
    paths = [save_figure(figure, out.with_suffix(".png"))]
    title = f"IRD at {100 * DENSITIES[0]:g} %, from {SAMPLES[-1]} texts, seed 0"
    paths.append(draw_shrinking(out.with_name(f"{out.stem}_shrinking.png"), content["shrinking"], title))
    return paths


def shrink(config: Config, task: TextTask) -> list[dict[str, Any]]:
    """The history of one IRD selection."""
    loaded = load(config, task)
    prepared: Prepared = prepare_ird(loaded.model, loaded.batches(config, "train", seed=0), config)
    assert prepared.shrinking is not None
    return prepared.shrinking


def measure(args: argparse.Namespace, origin: Content) -> Content:
    task, chosen = load_task("classification", args.data), entries()
    base = config_of(args, threads=args.threads or 1, head_lr=HEAD_RATE)
    trainings = Trainings(args.out, task, base, chosen, args.seed or SEEDS, origin)
    searched = ("fish", "ird", "uniform")
    rates = {mask: trainings.search(name_of(mask, DENSITIES[0], SAMPLES[-1]), HEAD_RATE) for mask in searched}
    rates |= {"dense": DENSE_RATE, "reversed": rates["fish"]}
    content = trainings.finish({name: rates[entry.method] for name, entry in chosen.items()}, HEAD_RATE)
    probe = replace(base, method="ird", density=DENSITIES[0], samples=SAMPLES[-1])
    content["shrinking"] = in_fresh_process(shrink, probe, task)
    trainings.study.save()
    return content


main = program(
    "ird",
    __doc__,
    partial(add_text_arguments, epochs=1, seeds=SEEDS),
    measure,
    partial(table, name="ird"),
    draw,
    small=("--steps", "2", "--seed", "0"),
)
