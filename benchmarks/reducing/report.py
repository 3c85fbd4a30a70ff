"""The table and the pictures of laser.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from sparsekernels.methods import laser
from sparsekernels.structure.matrices import Matrix

from ..finetuning.plots import COLORS, pyplot, save_figure
from ..study import Content, mean_and_spread, table, written_by


def markdown(content: Content) -> str:
    seeds, settings = content["seeds"], content["settings"]
    before = [done["test_before"] for done in seeds]
    found_by = [["unreduced", percent(q["accuracy"] for q in before), "", number(q["loss"] for q in before), *[""] * 3]]
    for name in seeds[0]["found"]:
        mine = [done["found"][name] for done in seeds]
        tests = [found["test"] for found in mine]
        gap = 100 * statistics.mean(q["accuracy"] - b["accuracy"] for q, b in zip(tests, before, strict=True))
        saved = statistics.mean(found["saved"] / done["matrices"] for found, done in zip(mine, seeds, strict=True))
        found_by.append(
            [
                name,
                percent(q["accuracy"] for q in tests),
                f"{gap:+.1f} points",
                number(q["loss"] for q in tests),
                f"{statistics.mean(found['texts'] for found in mine):,.0f}",
                f"{statistics.mean(found['seconds'] for found in mine):.1f}",
                f"{saved:.1%}",
            ]
        )
    pairs = [(done["found"]["adapt, accuracy"], done["found"]["search, accuracy"]) for done in seeds]
    fewer, faster = ([theirs[key] / ours[key] for ours, theirs in pairs] for key in ("texts", "seconds"))
    gaps = [100 * (ours["test"]["accuracy"] - theirs["test"]["accuracy"]) for ours, theirs in pairs]
    correlations = []
    for rho in [*settings["rho"], None]:
        row = [
            statistics.mean(correlation(done["gains"], rho, *keys) for done in seeds)
            for keys in (("predicted", "measured"), ("predicted", "validation"), ("measured", "validation"))
        ]
        correlations.append(["all" if rho is None else f"{rho:g}", *(f"{x:.2f}" for x in row)])
    head = ["found by, aim", "test accuracy", "against unreduced", "test loss", "texts evaluated", "seconds"]
    return "\n".join(
        [
            f"Low rank for a fine-tuned model, {settings['data']}, mean ± standard deviation over {len(seeds)} seeds.",
            "",
            table([*head, "weights saved"], found_by),
            "",
            "Weights saved are a share of those in the matrices that may be reduced. Against search with the same aim,",
            f"adapt evaluates {several(fewer, '.0f')} times fewer texts and takes {several(faster, '.0f')} times less",
            f"time; its test accuracy less that of search is {several(gaps, '+.1f')} points (one number a seed).",
            "",
            *ranking_time(content),
            "",
            "Rank correlation (Spearman) of the predicted gain with the measured fall of the loss, mean of the seeds:",
            "",
            table(["rho", "on the same texts", "on the validation split", "same texts with validation"], correlations),
            "",
            written_by(content, "python -m benchmarks laser"),
        ]
    )


def ranking_time(content: Content) -> list[str]:
    if "times" not in content:
        return ["The time of ranking all matrices: not recorded."]
    times = content["times"]
    return [
        f"Ranking all matrices on {content['settings']['samples']} texts, decompositions cached, takes "
        f"{1e3 * times['ranked']:.0f} ms, a plain forward and backward {1e3 * times['plain']:.0f} ms:",
        f"{times['ratio']:.2f} times as long, and {times['ratio_of_backwards']:.2f} without the forward in either.",
    ]


def percent(values: Iterable[float]) -> str:
    return mean_and_spread((100 * value for value in values), ".1f", "%")


def number(values: Iterable[float]) -> str:
    return mean_and_spread(values, ".3f")


def several(values: Iterable[float], how: str) -> str:
    return ", ".join(format(value, how) for value in values)


def correlation(gains: Iterable[dict[str, Any]], rho: float | None, one: str, other: str) -> float:
    chosen = [gain for gain in gains if rho is None or gain["rho"] == rho]
    return float(spearmanr([g[one] for g in chosen], [g[other] for g in chosen])[0])


def draw(content: Content, out: Path) -> list[Path]:
    """Heat maps of the first seed, and the scatter of predicted and measured gains of all seeds."""
    plt = pyplot()
    first = content["seeds"][0]["gains"]
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2))
    titles = {
        "predicted": "predicted, from one backward",
        "measured": "measured on the same texts",
        "validation": "measured on the validation split",
    }
    found = {gain["matrix"]: place(gain["matrix"]) for gain in first}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        reductions = [laser.Reduction(gain["matrix"], gain["rho"], measured=gain[key]) for gain in first]
        heat_map(laser.grid(reductions, found, measured=True), axes, title)
    figure.suptitle("Fall of the loss by the best rho of each matrix")
    paths = [save_figure(figure, out.with_name(f"{out.stem}_gains.png"))]

    rhos = content["settings"]["rho"]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.2))
    for axes, key in zip(panels, ("measured", "validation"), strict=True):
        for color, rho in zip((*COLORS, "#222222", "#c9b037"), rhos, strict=False):
            chosen = [g for done in content["seeds"] for g in done["gains"] if g["rho"] == rho]
            points = [g["predicted"] for g in chosen], [g[key] for g in chosen]
            axes.scatter(*points, s=9, color=color, alpha=0.7, label=f"rho {rho:g}", linewidths=0)
        axes.axline((0, 0), slope=1, color="#999999", lw=0.8)
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set(xlabel="predicted gain (fall of the loss)", ylabel="measured gain", title=titles[key])
    panels[1].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(1, 0))
    return [*paths, save_figure(figure, out.with_name(f"{out.stem}_correlation.png"))]


def place(label: str) -> Matrix:
    """Layer and kind of a matrix, from its name alone."""
    parts = label.removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    layer = None if at is None else int(parts[at])
    kind = label if at is None else ".".join(parts[at + 1 :])
    return Matrix(label, label, (0, 0), False, None, None, layer, kind)


def heat_map(grid: laser.Grid, axes: Any, title: str) -> None:
    """Draw a grid, layer x matrix: gains in blue, losses in red, matrices without a gain in white."""
    most = float(grid.values.abs().nan_to_num().max()) or 1.0
    image = axes.imshow(grid.values.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(grid.kinds)), grid.kinds, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(grid.layers)), [str(layer) for layer in grid.layers])
    axes.set(xlabel="", ylabel="layer", title=title)
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes)
