"""Kernels at sizes of large models, against what this GPU allows: the table that `make gpu` writes.

    python benchmarks/kernels/gpu.py                   on a machine with a GPU
    python benchmarks/kernels/gpu.py --only topk       the rows with this in their name; written only where --out says
    python benchmarks/kernels/gpu.py --floors          sizes, bytes and floors alone: needs no GPU
    python benchmarks/kernels/gpu.py --small           tiny inputs, on a CPU too: to try the program out

What is measured, and how floors are counted, is said in gpu_rows.py and gpu_matmul_rows.py. Inputs are random, and
larger than the L2 cache but for the 18 rows. Every contender's result is checked, then it is timed between events on
the device, call by call, and the median counts. The host runs ahead meanwhile, so its time is not in there, except
where a call waits for the device in its midst: topk, and steps with sparse gradients. The step of 18 rows is captured
in a CUDA graph, whose replays are timed; the ops by themselves are given steps on the host there, and do not count them
up. Each backend that serves an op has a line, so that the slower one can go. Memory is what a call allocates at its
peak, its result included. The copy bandwidth is measured in the same run, by a copy of 2 GiB; the rate of bf16
products, by one of 8192 x 8192 matrices.

Results: benchmarks/results/<name of the GPU>.json, written as each row is done, and .md. What fails, for want of memory
or because its result is wrong, is noted there, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_matmul_rows
import gpu_rows
import torch
from compare import (
    DEVICE,
    VERDICTS,
    Problem,
    copy_bandwidth,
    duration,
    event_seconds,
    failed,
    free,
    matmul_rate,
    seconds,
)
from gpu_rows import Row
from ratios import machine, median, rounded, write
from tqdm import tqdm

from sparsekernels.ops.backend import why_not

RESULTS = Path(__file__).resolve().parents[1] / "results"
H200 = (4.3e12, 790e12)  # bytes of a copy, operations in bf16, a second: what floors are stated for where no GPU is
BUDGET = 0.5  # seconds of timed calls for a contender
IN_GRAPH = 50  # calls in a graph
BACKENDS = ("native", "triton")


def rows(small: bool) -> list[Row]:
    return [*gpu_rows.rows(small), *gpu_matmul_rows.rows(small)]


def contenders(row: Row) -> list[str]:
    """Ours as a user calls it, ours on each backend, and the alternatives."""
    case = row.case
    op = case.name.partition(",")[0]
    each = [name for name in case.contenders if name in {f"{op} {backend}" for backend in BACKENDS}]
    return [case.ours, *each, *case.versus]


def timed(call: Callable[[], Any], in_graph: bool) -> list[float]:
    if DEVICE.type == "cpu":
        return [seconds(call) for _ in range(3)]
    if not in_graph:
        on_host = min(seconds(call) for _ in range(3))  # or more, if it waits for the device
        torch.cuda.synchronize()
        once = median(event_seconds(call, 3))
        return event_seconds(call, int(min(200, max(5, BUDGET / (once + on_host)))), ahead=min(0.02, 2 * on_host))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    # The outer block puts the stream back if the capture fails, which leaves its own where it was.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for _ in range(IN_GRAPH):
            call()
    return [time / IN_GRAPH for time in event_seconds(graph.replay, 23)[3:]]


def allocated(call: Callable[[], Any]) -> int | None:
    """Bytes that a call allocates at its peak; None where that cannot be seen."""
    if DEVICE.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Callable[[], Any]) -> int | None:
    """How many kernels a call launches; None where that cannot be seen."""
    if DEVICE.type == "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or []) or None


def measure(row: Row) -> dict[str, Any]:
    """A record; what cannot run here, or computes something else, is noted in it and does not hide the rest."""
    floor = row.floor(copy_bandwidth(), matmul_rate())
    record: dict[str, Any] = {**stated(row), "floor_seconds": rounded(floor), "contenders": []}
    found: list[dict[str, Any]] = record["contenders"]
    try:
        problem: Problem = row.case.make()
        record |= {"shape": problem.shape, "dtype": problem.dtype}
    except Exception as error:  # above all, memory
        found.append(failed(row.case.ours, error))
        return record
    for name in contenders(row):
        try:
            contender, error = row.case.entrant(name, problem)
            extra = allocated(contender.call)
            times = timed(contender.call, row.graph)
            entry = {"name": name, "median_seconds": rounded(median(times)), "seconds": [rounded(t) for t in times]}
            entry["extra_bytes"] = extra
            if row.graph:
                entry["launches"] = launches(contender.call)
            found.append({**entry, "max_error": rounded(error)})
        except Exception as failure:  # Triton has exceptions of its own
            found.append(failed(name, failure))
        contender = None
        free()
    return judged(row, record)


def judged(row: Row, record: dict[str, Any]) -> dict[str, Any]:
    """The record with what it amounts to: share of the floor's speed, times faster, bars met or missed."""
    by_name = {each["name"]: each.get("median_seconds") for each in record["contenders"]}
    ours = by_name[row.case.ours]
    if ours is None:
        return record
    record["share_of_floor"] = rounded(record["floor_seconds"] / ours)
    record["times_faster"] = {name: rounded(by_name[name] / ours) for name in row.case.versus if by_name[name]}
    verdicts: dict[str, bool | None] = {}
    if row.share is not None:
        verdicts[f"at least {row.share:.0%} of the floor's speed"] = record["share_of_floor"] >= row.share
    if row.most is not None:
        verdicts[f"at most {duration(row.most)}"] = ours <= row.most
    if row.most_extra is not None:
        extra = next(each.get("extra_bytes") for each in record["contenders"] if each["name"] == row.case.ours)
        verdicts[f"at most {row.most_extra / 1e6:.3g} MB of memory"] = (
            None if extra is None else extra <= row.most_extra
        )
    for name, bar in row.case.versus.items():
        if bar is not None:
            theirs = by_name[name]
            verdicts[f"at least {compared(name, bar)}"] = theirs / ours >= bar if theirs else None
    return {**record, "bars": verdicts}


def compared(name: str, bar: float) -> str:
    return f"{bar:g}x faster than {name}" if bar > 1 else f"{bar:.0%} of the speed of {name}"


def stated(row: Row) -> dict[str, Any]:
    """What is known of a row without measuring."""
    return {"case": row.case.name, "bytes": row.bytes, "bytes_formula": row.formula, "operations": row.operations}


def floors(chosen: list[Row]) -> str:
    bandwidth, rate = H200
    lines = [
        f"Floors at {bandwidth / 1e12:g} TB/s, reads and writes together, and {rate / 1e12:g} TFLOP/s in bf16: "
        "those of an NVIDIA H200.",
        "`make gpu` measures these rows; it has not been run on a GPU yet.",
        "",
        "| kernel | must be moved | | operations | floor | asked |",
        "|---|---|---|---|---|---|",
    ]
    for row in chosen:
        asked = [f"≥ {row.share:.0%} of its speed"] if row.share else []
        asked += [f"≤ {duration(row.most)}"] if row.most else []
        asked += [f"≥ {compared(name, bar)}" for name, bar in row.case.versus.items() if bar]
        asked += [f"≤ {row.most_extra / 1e6:.3g} MB of memory"] if row.most_extra else []
        operations = f"{row.operations / 1e9:.3g} G" if row.operations else ""
        cells = [f"{row.bytes / 1e9:.3g} GB", row.formula, operations, duration(row.floor(*H200)), "; ".join(asked)]
        lines.append("| " + " | ".join([row.case.name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def table(content: dict[str, Any]) -> str:
    bandwidth = content["copy_bytes_per_second"] / 1e12
    lines = [
        f"{content['device']}, torch {content['torch']}; a copy moves {bandwidth:.3g} TB/s, a bf16 product runs at "
        f"{content['matmul_operations_per_second'] / 1e12:.3g} TFLOP/s. Medians, on the device.",
        *([f"Without the native library: {content['without_native']}."] if content["without_native"] else []),
        "",
        "| kernel | contender | time | floor | of its speed | memory | ours is faster | asked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in content["results"]:
        for number, each in enumerate(record["contenders"]):
            found = each.get("median_seconds")
            if found is None:
                cells = [each["name"], "failed", "", "", "", "", each["failed"].splitlines()[0]]
            else:
                share = f"{record['floor_seconds'] / found:.0%}"
                times = record.get("times_faster", {}).get(each["name"])
                bars = record.get("bars", {}) if number == 0 else {}
                verdicts = "; ".join(f"{bar}: {VERDICTS[met]}" for bar, met in bars.items())
                took = duration(found) + (f", {each['launches']} launches" if each.get("launches") else "")
                extra = "" if each["extra_bytes"] is None else f"{each['extra_bytes'] / 1e6:.3g} MB"
                cells = [each["name"], took, "", share, extra, f"{times:.3g}x" if times else "", verdicts]
                cells[2] = duration(record["floor_seconds"]) if number == 0 else ""
            lines.append("| " + " | ".join([record["case"] if number == 0 else "", *cells]).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the rows with this in their name")
    parser.add_argument("--small", action="store_true", help="small inputs, to try the program out")
    parser.add_argument("--floors", action="store_true", help="print sizes and floors, measure nothing")
    parser.add_argument("--out", type=Path, help="where to write JSON; the table goes beside it")
    arguments = parser.parse_args(argv)
    chosen = [row for row in rows(arguments.small) if arguments.only in row.case.name]
    if not chosen:
        parser.error(f"no row has {arguments.only!r} in its name")
    if arguments.floors:
        print(floors(chosen), end="")
        return 0
    if DEVICE.type == "cpu" and not arguments.small:
        parser.error("torch sees no GPU here; --floors and --small need none")
    facts = machine()
    out = arguments.out
    if out is None and not (arguments.small or arguments.only):
        out = RESULTS / (re.sub(r"\W+", "_", facts["device"].lower()) + ".json")
    command = " ".join(["python", "benchmarks/kernels/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    missing = why_not("gather", "native", DEVICE.type)
    content: dict[str, Any] = {
        **facts,
        "command": command,
        "without_native": missing,
        "matmul_operations_per_second": rounded(matmul_rate()),
        "results": [],
    }
    begin = time.perf_counter()
    for row in tqdm(chosen, unit="row", disable=None):
        content["results"].append(measure(row))
        content["seconds"] = rounded(time.perf_counter() - begin)
        if out is not None:
            write(out, content)
    text = table(content)
    if out is not None:
        out.with_suffix(".md").write_text(text)
    print(f"{text}\n{f'written to {out}' if out else 'not written; name a file with --out'}")
    return int(any("failed" in each for record in content["results"] for each in record["contenders"]))


if __name__ == "__main__":
    sys.exit(main())
