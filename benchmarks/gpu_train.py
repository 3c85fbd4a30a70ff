"""Whole training steps, and methods that score weights, on models of Llama shapes, on a GPU.

    python -m benchmarks gpu-train                 on a machine with a GPU
    python -m benchmarks gpu-train --only LASER    the rows with this in their name; written only where --out says
    python -m benchmarks gpu-train --floors        what must be held and computed at least: needs no GPU
    python -m benchmarks gpu-train --small         a tiny model, on a CPU too: to try the program out

Weights and tokens are random, and the same for all contenders of a row. Each contender makes its own model and frees
it before the next one. A step is forward, backward, step of the optimizer and zero_grad, always on the same batch.

All steps have the same loss, computed for a chunk of tokens at a time with its gradient (gpu_training/llama.py): the
logits of all tokens would take most of the memory, of every contender alike. Rows with gradient checkpointing in their
name recompute each layer in backward, which is how one saves memory; those without are how one saves time. Both bars
are set for both. The bar of the large model is for the leanest contender, in GB of 10^9 bytes.

Times are medians of calls between events on the device, after a first call; peak memory is the most that tensors took
in those calls, weights included (torch.cuda.max_memory_allocated). On a CPU it is not measured. What a contender does
once before, such as selecting, has a time and a peak of its own. After the calls the loss must be finite, and of the
first selected tensor most of the selected weights must have changed, and no other; who fails that has no time.

Results: benchmarks/results/<name of the GPU>_train.json, written as each row is done, and .md. What fails, for want of
memory or because its result is wrong, is noted there, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import study
from .gpu_training.rows import Contender, Row, rows
from .gpu_training.steps import peak_bytes, reset_peak
from .kernels.run import VERDICTS
from .study import failed
from .timing import DEVICE, duration, event_seconds, free, seconds, synchronized

BUDGET = 4.0  # seconds of timed calls for a contender
ROUNDS = 20  # at most
LEFT = 2**28  # bytes that cuBLAS may keep between contenders


def measure(row: Row, held: int) -> dict[str, Any]:
    """A record; what cannot run here, or computes something else, is noted in it and does not hide the rest.

    `held` are bytes on the device that were there before the first row.
    """
    found = []
    for contender in row.contenders:
        if contender.needs and importlib.util.find_spec(contender.needs) is None:
            continue
        try:
            found.append(measured(contender, held))
        except Exception as failure:  # above all, memory
            found.append(failed(contender.name, failure))
        free()
    return judged(row, found)


def measured(contender: Contender, held: int) -> dict[str, Any]:
    """What a contender takes; all that it made is gone on return."""
    left = allocated() - held
    if left > LEFT:
        raise RuntimeError(f"who ran before has left {left} bytes behind, which this peak would count")
    run = contender.start()
    results: list[Any] = []  # of the last call: what methods return may be large

    def call() -> None:
        results[:] = [run.call()]

    call()
    reset_peak()
    times = timed(call)
    peak = peak_bytes()
    run.check(results)
    return {
        "name": contender.name,
        "median_seconds": statistics.median(times),
        "seconds": times,
        "peak_bytes": peak,
        "before": run.before,
    }


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def timed(call: Callable[[], Any]) -> list[float]:
    first = seconds(synchronized(call))
    if DEVICE.type == "cpu" or first > BUDGET:
        return [first]
    return event_seconds(call, int(min(ROUNDS, max(3, BUDGET / first))))


def judged(row: Row, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The record: contenders beside the baseline, bars met or missed."""
    by_name = {each["name"]: each for each in found}
    base = by_name.get(row.baseline or "", {})
    for each in found:
        if base.get("median_seconds") and each.get("median_seconds"):
            each["times_faster"] = base["median_seconds"] / each["median_seconds"]
        if base.get("peak_bytes") and each.get("peak_bytes"):
            each["share_of_peak"] = each["peak_bytes"] / base["peak_bytes"]
    bars = []
    for bar in row.bars:
        ours = by_name.get(bar.contender, {}).get(bar.quantity)
        theirs = by_name.get(bar.of, {}).get(bar.quantity) if bar.of else 1.0
        met = None if ours is None or theirs is None else ours <= bar.most * theirs
        bars.append({"asked": bar.asked, "contender": bar.contender, "met": met})
    return {"row": row.name, "baseline": row.baseline, "contenders": found, "bars": bars}


def gigabytes(count: float | None) -> str:
    return "not measured" if count is None else f"{count / 1e9:.3g} GB"


def line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


def table(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["machine"]["versions"].items())
    lines = [f"{study.described(content)}; {versions}.", ""]
    for record in content["results"]:
        rows = []
        for each in record["contenders"]:
            if "failed" in each:
                rows.append([each["name"], "failed", "", "", "", each["failed"]])
                continue
            before = "".join(
                f"; {what} before: {duration(part['seconds'])}, {gigabytes(part['peak_bytes'])}"
                for what, part in each["before"].items()
            )
            faster = f"{each['times_faster']:.3g}x" if "times_faster" in each else ""
            share = f"{each['share_of_peak']:.0%}" if "share_of_peak" in each else ""
            asked = "; ".join(
                f"{bar['asked']}: {VERDICTS[bar['met']]}" for bar in record["bars"] if bar["contender"] == each["name"]
            )
            took, peak = duration(each["median_seconds"]), gigabytes(each["peak_bytes"])
            rows.append([each["name"] + before, took, faster, peak, share, asked])
        head = ["contender", "time", "faster", "peak memory", "of the peak", "asked"]
        lines += [f"**{record['row']}**", "", study.table(head, rows), ""]
        if record["baseline"]:
            lines += [f"Faster than, and of the peak of: {record['baseline']}.", ""]
    return "\n".join(lines)


def floors(chosen: list[Row]) -> str:
    lines = [
        "What must at least be held in memory and computed, counted from sizes alone as",
        "benchmarks/gpu_training/rows.py says. `make gpu-train` measures these rows; it has not been run on a GPU yet.",
        "",
    ]
    for row in chosen:
        cells = []
        for each in row.contenders:
            asked = "; ".join(bar.asked for bar in row.bars if bar.contender == each.name)
            computed = f"{sum(each.computed.values()) / 1e12:.3g} T operations" if each.computed else ""
            held = gigabytes(sum(each.held.values()))
            cells.append([each.name, held, " + ".join(each.held), computed, " + ".join(each.computed), asked])
        head = ["contender", "must be held", "", "must be computed", "", "asked"]
        lines += [f"**{row.name}**", "", study.table(head, cells), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the rows with this in their name")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program out")
    parser.add_argument("--floors", action="store_true", help="print what must be held and computed, measure nothing")
    parser.add_argument("--out", type=Path, help="where to write JSON; the table goes beside it")
    arguments = parser.parse_args(argv)
    chosen = [row for row in rows(arguments.small) if arguments.only in row.name]
    if not chosen:
        parser.error(f"no row has {arguments.only!r} in its name")
    if arguments.floors:
        print(floors(chosen), end="")
        return 0
    if DEVICE.type == "cpu" and not arguments.small:
        parser.error("torch sees no GPU here; --floors and --small need none")
    content = study.origin("gpu-train", argv)
    out = arguments.out
    if out is None and not (arguments.small or arguments.only):
        out = study.RESULTS / (re.sub(r"\W+", "_", content["machine"]["gpu"].lower()) + "_train.json")
    content["results"] = []
    begin, held = time.perf_counter(), allocated()
    for row in tqdm(chosen, unit="row", disable=None):
        content["results"].append(measure(row, held))
        content["seconds"] = time.perf_counter() - begin
        if out is not None:
            study.write_json(out, content)
    return study.leave(content, table(content), out)
