"""The table of a fine-tuning run."""

from __future__ import annotations

import math
import statistics
from typing import Any

from .. import study
from ..study import MIB, spread

Row = dict[str, Any]


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
    lines = []
    for row in rows:
        if row["metric"] == "accuracy":
            quality = f"{row['value']:.1%}" + (f" ± {row['spread']:.1%}" if row["seeds"] > 1 else "")
        else:
            quality = f"{row['value']:.3f} ({math.exp(row['value']):.1f})"
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
    return study.table(header, lines, aligned=True)
