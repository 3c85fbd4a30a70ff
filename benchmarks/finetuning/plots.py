"""The plots of a fine-tuning run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..study import MIB, write_atomically
from .report import Row

COLORS = ("#3b6fb6", "#d9772b", "#3c9a5f", "#a1488e", "#8a6d3b", "#5f6b76")


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files, in the style of all plots here."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 120,
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
        }
    )
    return plt


def save_figure(figure: Any, path: Path) -> Path:
    """Write the figure as a PNG, atomically, and close it."""
    figure.tight_layout()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
    pyplot().close(figure)
    return path


def draw_shrinking(path: Path, history: list[dict[str, Any]], title: str) -> Path:
    """How many samples and parameters IRD keeps after each iteration."""
    figure, axes = pyplot().subplots(figsize=(6, 4))
    for color, key in zip(COLORS, ("parameters", "samples"), strict=False):
        counts = [step[key] for step in history]
        axes.plot(range(len(history)), counts, color=color, marker="o", label=key)
        axes.annotate(
            f"{counts[-1]:,}", (len(history) - 1, counts[-1]), (0, 7), textcoords="offset points", ha="center"
        )
    axes.set(xlabel="iteration", ylabel="kept (log scale)", yscale="log", title=title)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def draw(out: Path, runs: list[Row], rows: list[Row], curve: list[tuple[float, float]] | None) -> list[Path]:
    """Draw the plots into ``out``; the first seed of each method stands for it in the curves."""
    plt = pyplot()
    names = [row["name"] for row in rows]
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    first = {name: next(run for run in runs if run["name"] == name) for name in names}
    paths: list[Path] = []

    def save(figure: Any, name: str) -> None:
        paths.append(save_figure(figure, out / name))

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in names:
        losses = first[name]["losses"]
        axes.plot(range(1, len(losses) + 1), losses, color=color[name], alpha=0.18, linewidth=0.8)
        axes.plot(range(1, len(losses) + 1), smooth(losses), color=color[name], label=name, linewidth=1.8)
    axes.set(xlabel="training step", ylabel="training loss", title="Loss (thick: running mean)")
    axes.legend(frameon=False)
    save(figure, "loss.png")

    metric = rows[0]["metric"]
    figure, pair = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axes, key, label in zip(pair, ("epoch", "seconds"), ("epoch", "training time, seconds"), strict=True):
        for name in names:
            points = first[name]["validation"]
            axes.plot([p[key] for p in points], [p["value"] for p in points], "o-", ms=4, color=color[name], label=name)
        axes.set(xlabel=label)
        axes.set_xlim(left=0)
    pair[0].set_ylabel(f"validation {metric}")
    if metric == "accuracy":
        pair[0].set_ylim(bottom=0)
        pair[0].yaxis.set_major_formatter("{x:.0%}")
    pair[0].legend(frameon=False)
    figure.suptitle(f"Validation {metric}")
    save(figure, f"validation_{metric}.png")

    bars = {
        "time per training step, ms": [row["step_ms"] for row in rows],
        "peak memory above the\nloaded model, MiB": [row["memory"] / MIB for row in rows],
        "gradients + optimizer state\n(head included), MiB": [(row["state"] + row["head_state"]) / MIB for row in rows],
        "file to ship, MiB": [row["ship"] / MIB for row in rows],
    }
    figure, panels = plt.subplots(1, 4, figsize=(12, 1.6 + 0.45 * len(rows)), sharey=True)
    for axes, (title, values) in zip(panels, bars.items(), strict=True):
        drawn = axes.barh(names, values, color=[color[name] for name in names], height=0.6)
        axes.bar_label(drawn, [f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values], padding=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, max(values) * 1.25)
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    save(figure, "cost.png")

    if curve:
        figure, axes = plt.subplots(figsize=(7, 4.2))
        axes.plot([100 * share for share, _ in curve], [100 * carried for _, carried in curve], color=COLORS[1], lw=1.8)
        axes.set_xscale("log")
        for wanted in (0.001, 0.01, 0.1):
            share, carried = min(curve, key=lambda point: abs(point[0] - wanted))
            axes.plot([100 * share], [100 * carried], "o", color=COLORS[0])
            note = f"{100 * share:.2g} % of the entries:\n{100 * carried:.0f} % of the norm"
            axes.annotate(note, (100 * share, 100 * carried), (9, -3), textcoords="offset points", va="top")
        axes.set(xlabel="largest entries of each targeted gradient, % (log scale)", ylim=(0, 104))
        axes.set(
            ylabel="share of the gradient's L2 norm, %", title="How concentrated the gradient of the first batch is"
        )
        axes.xaxis.set_major_formatter("{x:g}")
        save(figure, "gradient_share.png")
    shrinking = next((run["shrinking"] for run in runs if run["shrinking"]), None)
    if shrinking:
        paths.append(draw_shrinking(out / "shrinking.png", shrinking, "IRD: samples and parameters kept"))
    return paths


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Centred running mean over a window of ``share`` of the curve, narrower at both ends."""
    half = max(1, int(len(values) * share / 2))
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(statistics.fmean(values[i - reach : i + reach + 1]))
    return out
