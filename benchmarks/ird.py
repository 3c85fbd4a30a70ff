"""Compare masks from Fisher information: FISH, IRD, the reversed mask, a random one, and dense training beside them.

    python benchmarks/ird.py

The text task and the model of finetune.py, one epoch, three seeds, over densities and numbers of samples that the masks
are made from. FISH takes the first so many texts of the seed's shuffled order; IRD starts from the same texts and
shrinks them; the reversed mask is made from the larger number of texts. First every mask searches its learning rate
with seed 0, at the first density and the larger number; dense training and the head have those that
benchmarks/accuracy.py found. Every run is added to the results file as soon as it is finished; starting again continues
where it stopped. Results: results/ird.json, ird.md, ird.png, ird_shrinking.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from finetune import default_model, in_fresh_process
from finetuning.methods import Prepared, prepare_ird
from finetuning.plots import COLORS, draw_shrinking, pyplot, save_figure
from finetuning.study import Entry, Study
from finetuning.text_task import DataError, TextTask, load_task
from finetuning.training import Config, ModelError, load

RESULTS = Path(__file__).parent / "results" / "ird.json"
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
            for samples in SAMPLES if method in ("fish", "ird") else SAMPLES[-1:]:
                found[name_of(method, density, samples)] = Entry(method, density, middle, samples)
    return found


def draw(study: Study, rows: list[dict[str, Any]], shrinking: list[dict[str, Any]]) -> list[Path]:
    """Accuracy against density, one panel for each number of samples; and how IRD shrinks both sets."""
    plt = pyplot()
    folder, by_name = study.path.parent, {row["name"]: row for row in rows}
    figure, panels = plt.subplots(1, len(SAMPLES), figsize=(9, 4), sharey=True)
    for axes, samples in zip(panels, SAMPLES, strict=True):
        for color, method in zip(COLORS, ("fish", "ird", "uniform", "reversed"), strict=False):
            found = [by_name[name_of(method, density, samples)] for density in DENSITIES]
            axes.errorbar(
                [100 * density for density in DENSITIES],
                [100 * row["test"] for row in found],
                [100 * row["spread"] for row in found],
                label=LABELS[method], color=color, marker="o", capsize=3,
            )  # fmt: skip
        axes.axhline(100 * by_name["dense"]["test"], color="black", linestyle="--", linewidth=1, label="dense")
        axes.set(title=f"masks from {samples} texts", xlabel="weights that train, %", xscale="log")
        axes.set_xticks([100 * density for density in DENSITIES], [f"{100 * density:g}" for density in DENSITIES])
        axes.minorticks_off()
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False, fontsize=8)
    paths = [save_figure(figure, folder / "ird.png")]

    title = f"IRD at {100 * DENSITIES[0]:g} %, from {SAMPLES[-1]} texts, seed 0"
    paths.append(draw_shrinking(folder / "ird_shrinking.png", shrinking, title))
    return paths


def shrink(config: Config, task: TextTask) -> list[dict[str, Any]]:
    """The history of one IRD selection."""
    loaded = load(config, task)
    prepared: Prepared = prepare_ird(loaded.model, loaded.batches(config, "train", seed=0), config)
    assert prepared.shrinking is not None
    return prepared.shrinking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, continued if it exists [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [%(default)s]")
    args = parser.parse_args()
    try:
        base = Config(
            method="dense",
            model=default_model(),
            epochs=1,
            head_lr=HEAD_RATE,
            max_length=16,
            batch_size=32,
            autocast=True,
            validation_texts=None,
            threads=args.threads,
        )
        task, chosen = load_task("classification"), entries()
        study = Study(args.out, task, base, chosen, SEEDS)
        masks = dict.fromkeys(entry.method for entry in chosen.values() if entry.method != "dense")
        rates = {mask: study.search(name_of(mask, DENSITIES[0], SAMPLES[-1]), HEAD_RATE) for mask in masks}
        rates["dense"] = DENSE_RATE
        for seed in SEEDS:
            for name, entry in chosen.items():
                study.run("final", name, rates[entry.method], seed, HEAD_RATE, base.epochs)
        rows = study.summarise()
        probe = Config(**{**vars(base), "method": "ird", "density": DENSITIES[0], "samples": SAMPLES[-1]})
        study.content["shrinking"] = in_fresh_process(shrink, probe, task)
        study.save()
        paths = draw(study, rows, study.content["shrinking"])
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"written: {', '.join(str(path) for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
