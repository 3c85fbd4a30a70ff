"""The table and the pictures of gates.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..finetuning.plots import COLORS, pyplot, save_figure
from ..study import Content, spread, table, written_by


def label(name: str, asked: float) -> str:
    return f"{name}, {asked:.0%}" if asked else name


def rows(content: Content) -> list[dict[str, Any]]:
    """One a contender and share: means over its seeds; what it lacks of dense, over those that dense has, too."""
    dense = {run["seed"]: run["test"] for run in content["runs"] if run["name"] == "dense"}
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in content["runs"]:
        found.setdefault((run["name"], run["asked"]), []).append(run)
    order = sorted(dict.fromkeys(name for name, _ in found), key=lambda name: name != "dense")
    summary = []
    for (name, asked), runs in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        tests = [run["test"] for run in runs]
        summary.append(
            {
                "name": name,
                "asked": asked,
                "removed": statistics.mean(run["removed"] for run in runs),
                "off": max(abs(run["removed"] - asked) for run in runs),
                "test": statistics.mean(tests),
                "spread": spread(tests),
                "seeds": len(runs),
                "gap": 100 * statistics.mean(run["test"] - dense[run["seed"]] for run in runs if run["seed"] in dense),
                "trained": runs[0]["trained_weights"],
                "weights": statistics.mean(run["weights"] for run in runs),
                "outputs": max((run.get("gap", 0.0) for run in runs), default=0.0),
                "speed": content.get("latency", {}).get(label(name, asked) if asked else "original"),
                "step": content.get("step_times", {}).get(name),
            }
        )
    return summary


def markdown(content: Content) -> str:
    summary, settings = rows(content), content["settings"]
    whole = content["latency"]["original"]["ms"]
    lines = []
    for row in summary:
        speed, asked = row["speed"], row["asked"]
        lines.append(
            [
                row["name"],
                f"{row['removed']:.1%}" if asked else "",
                f"{row['test']:.1%}" + (f" ± {row['spread']:.1%}" if row["seeds"] > 1 else ""),
                str(row["seeds"]),
                f"{row['gap']:+.1f} points" if row["name"] != "dense" else "",
                f"{row['trained']:,}",
                f"{row['weights'] / 1e6:.1f}M",
                f"{speed['ms']:.0f} ms" if speed and asked else "",
                f"{speed['speedup']:.2f}x" if speed and asked else "",
                f"{1 / row['step']['speedup']:.2f}" if row["step"] else "",
            ]
        )
    head = ["", "removed", "test accuracy", "seeds", "against dense", "trained", "weights left", "forward", "faster"]
    gated = [row for row in summary if row["asked"]]
    return "\n".join(
        [
            f"Stochastic gates on {settings['data']}, {settings['epochs']} epochs, the same steps for all.",
            "Mean and standard deviation over seeds; the gap to dense training is over shared seeds.",
            f"Forward: 32 x 64 tokens, fp32; the original takes {whole:.0f} ms. Steps: as trained, dense is 1.",
            "",
            table([*head, "step"], lines),
            "",
            "Removed is a share of the parameters in the encoder's projections; off what was asked by at most "
            f"{100 * max(row['off'] for row in gated):.2f} points.",
            "Outputs before and after compress() differ by at most "
            f"{max(row['outputs'] for row in gated):.1e} of the largest.",
            "",
            written_by(content, "python -m benchmarks gates"),
        ]
    )


def draw(content: Content, out: Path) -> list[Path]:
    """Accuracy against what is removed, and against time; open gates of each layer."""
    return [draw_accuracy(content, out.with_suffix(".png")), draw_open(content, out.with_name(f"{out.stem}_open.png"))]


def draw_accuracy(content: Content, path: Path) -> Path:
    summary = rows(content)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2), sharey=True)
    names = [
        name
        for name in dict.fromkeys(row["name"] for row in summary)
        if any(r["asked"] for r in summary if r["name"] == name)
    ]
    for color, name in zip(COLORS, names, strict=False):
        mine = [row for row in summary if row["name"] == name]
        tests, errors = [100 * row["test"] for row in mine], [100 * row["spread"] for row in mine]
        left.errorbar([100 * row["removed"] for row in mine], tests, errors, color=color, marker="o", label=name)
        right.errorbar([row["speed"]["ms"] for row in mine], tests, errors, color=color, marker="o", label=name)
    for style, row in zip(("--", ":"), [row for row in summary if not row["asked"]], strict=False):
        for axes in (left, right):
            axes.axhline(100 * row["test"], color="0.4", linestyle=style, label=row["name"], zorder=1)
    right.axvline(content["latency"]["original"]["ms"], color="0.7", linestyle="-.", label="time of the original")
    left.set(xlabel="removed of the encoder's projections (%)", ylabel="test accuracy (%)")
    right.set(xlabel="forward of 32 x 64 tokens (ms)")
    right.legend(frameon=False, fontsize=8)
    figure.suptitle("Stochastic gates: what removing costs, and what it saves")
    return save_figure(figure, path)


def draw_open(content: Content, path: Path) -> Path:
    """At the largest share, the open gates of every layer and side, by kind of projection."""
    gated = [run for run in content["runs"] if "open" in run and run["name"].endswith("low-rank")]
    share = max(run["asked"] for run in gated)
    chosen = {run["name"]: run for run in reversed(gated) if run["asked"] == share}
    figure, grid = pyplot().subplots(1, len(chosen), figsize=(5.8 * len(chosen), 4.4), squeeze=False)
    for axes, (name, run) in zip(grid[0], chosen.items(), strict=True):
        layers = sorted({number(layer) for layer in run["open"]})
        sides = list(dict.fromkeys((kind(layer), side) for layer, both in run["open"].items() for side in both))
        values = [[float("nan")] * len(layers) for _ in sides]
        for layer, both in run["open"].items():
            for side, (is_open, _, count) in both.items():
                values[sides.index((kind(layer), side))][layers.index(number(layer))] = 100 * is_open / count
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if value == value:
                    color = "w" if value < 60 else "k"
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
        axes.set_yticks(range(len(sides)), [f"{what}, {side}" for what, side in sides], fontsize=8)
        axes.set_xticks(range(len(layers)), layers)
        axes.set(xlabel="layer", title=f"{name}\n{run['removed']:.0%} removed: open gates (%)")
        axes.title.set_fontsize(9)
        axes.grid(False)
        figure.colorbar(image, ax=axes)
    return save_figure(figure, path)


def number(layer: str) -> int:
    return next(int(part) for part in layer.split(".") if part.isdigit())


def kind(layer: str) -> str:
    parts = layer.split(".")
    return ".".join(parts[next(i for i, part in enumerate(parts) if part.isdigit()) + 1 :])
