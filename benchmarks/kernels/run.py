"""Times of every op, each beside what a user would call instead, and what this machine allows.

    python -m benchmarks kernels                        minutes on two cores; on a GPU, the table of `make gpu`
    python -m benchmarks kernels --only topk            a family, or the cases with this in their name
    python -m benchmarks kernels --all                  every backend and every alternative, not only those of the table
    python -m benchmarks kernels --floors               sizes, bytes and floors at a GPU's sizes: needs no GPU
    python -m benchmarks kernels --small --seconds 0.1  small inputs, to try the program out
    python -m benchmarks kernels --base v0.1.0 --slower-than 1.03    the same ops in two commits: see base.py

The result of every contender is checked first; a wrong one is noted, gets no time, and makes the exit status 1, as does
anything else that fails. The floor is what the bytes that must be moved take at the pace of a copy, measured in the
same run, or the operations at the pace of a bf16 product. Inputs have the sizes of the device: those for a GPU are of
large models (--sizes).

On a CPU, contenders are interleaved, and a ratio is formed within each round: its median over the rounds counts, beside
it stand the 10 % and 90 % quantiles. Times are taken in two states:

    warm   calls follow each other on the same tensors. What of them fits the last-level cache stays there, which
           flatters whoever touches little: a sparse step may find its lines of a tensor that as a whole would not fit.
           5 ms of calls that are not timed come first, for the sample before was somebody else's: after a dense step
           has filled the caches with lines that must be written back, a sparse one takes ten calls to reach its pace.
    cold   before each call, outside the timed region, a buffer four times as large as the last-level cache is read from
           end to end. The call finds neither its tensors nor the interpreter in any cache, as after the forward and
           backward of a real training step. Only reads: dirty lines would be written back at the expense of the call.

On a GPU, a contender is made, timed between events on the device, call by call, and freed before the next one. The host
runs ahead meanwhile, so its time is not in there, except where a call waits for the device in its midst: topk, and
steps with sparse gradients. The step of 18 rows is captured in a CUDA graph, whose replays are timed; the ops by
themselves are given steps on the host there, and do not count them up. Memory is what a call allocates at its peak, its
result included. Each backend that serves an op has a line, so that the slower one can go.

A whole run writes benchmarks/results/kernels_cpu.json, or <name of the GPU>.json, and .md; a part of it only what --out
names. The file is written as each case is done.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparsekernels.ops.backend import why_not

from .. import study
from ..timing import (
    DEVICE,
    cache_bytes,
    copy_bandwidth,
    duration,
    event_seconds,
    evict,
    free,
    interleaved,
    matmul_rate,
    median,
    quantiles,
    rounded,
    seconds,
    warn_if_busy,
)
from . import base
from .case import BOTH, Case, Contender

# In the order of the tables.
FAMILIES = (
    *("adamw", "adamw_rows", "masked_grad", "fisher", "topk", "ks", "singular_values", "gates", "columns"),
    *("gather_scatter", "low_rank"),
)
H200 = (4.3e12, 790e12)  # bytes of a copy, operations in bf16, a second: what floors are stated for where no GPU is
MIN_ROUNDS, MAX_ROUNDS = 5, 100
WARM_UP = 5e-3  # seconds
BUDGET = 0.5  # seconds of timed calls for a contender on a GPU
IN_GRAPH = 50  # calls in a graph
VERDICTS = {True: "met", False: "missed", None: "not measured"}  # of a bar


def family_cases(family: str, small: bool, sizes: str) -> list[Case]:
    found: list[Case] = importlib.import_module(f".bench_{family}", __package__).cases(small, sizes == "gpu")
    return found


def cases(small: bool, sizes: str, only: str = "") -> list[Case]:
    found = [(family, case) for family in FAMILIES for case in family_cases(family, small, sizes)]
    return [case for family, case in found if only in case.name or only == family]


def entrants(case: Case, every: bool) -> list[str]:
    """Ours as a user calls it, ours on each backend, and the alternatives; or all that there are, ours first."""
    if every:
        return list(dict.fromkeys([case.ours, *case.contenders]))
    op = case.name.partition(",")[0]
    backends = {f"{op} {backend}" for backend in ("native", "triton")} if DEVICE.type == "cuda" else set()
    return list(dict.fromkeys([case.ours, *(name for name in case.contenders if name in backends), *case.versus]))


def sampled(call: Callable[[], Any], state: str) -> Callable[[int], float]:
    """What takes one time of the call."""
    call()
    # A millisecond of calls in a row where it is warm: one would be at the mercy of the timer and the interpreter.
    repeat = max(1, min(100, math.ceil(1e-3 / seconds(call))))

    def warm(_: int) -> float:
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_UP:
            call()
        return seconds(call, repeat)

    def cold(_: int) -> float:
        evict()
        return seconds(call)

    return cold if state == "cold" else warm


def on_device(call: Callable[[], Any], in_graph: bool = False) -> list[float]:
    """Times on a GPU."""
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


def measure(case: Case, budget: float, every: bool = False) -> dict[str, Any]:
    """A record; what cannot run here, or computes something else, is noted in it and does not hide the rest."""
    record: dict[str, Any] = {"case": case.name, "contenders": []}
    found: list[dict[str, Any]] = record["contenders"]
    try:
        problem = case.make()
    except Exception as error:  # above all, memory
        found.append(study.failed(case.ours, error))
        return record
    record |= {"shape": problem.shape, "density": problem.density, "dtype": problem.dtype}
    floor = case.floor
    record |= {
        "bytes": floor.bytes if floor else problem.bytes_moved,
        "bytes_formula": floor.formula if floor else problem.formula,
        "operations": floor.operations if floor else 0.0,
    }
    record["floor_seconds"] = rounded(max(record["bytes"] / copy_bandwidth(), record["operations"] / matmul_rate()))
    calls: dict[str, Callable[[], Any]] = {}
    for name in entrants(case, every):
        contender: Contender | None = None
        entry: dict[str, Any] = {"name": name}
        try:
            contender, error = case.entrant(name, problem)
            entry |= {"max_error": rounded(error), "extra_bytes": allocated(contender.call)}
            if DEVICE.type == "cuda":
                entry["warm"] = timing(on_device(contender.call, case.graph))
                if case.graph:
                    entry["launches"] = launches(contender.call)
            else:
                calls[name] = contender.call
            found.append(entry)
        except Exception as failure:  # Triton has exceptions of its own
            found.append(study.failed(name, failure))
        contender = None
        if DEVICE.type == "cuda":
            free()
    if calls:
        in_rounds(case, calls, {each["name"]: each for each in found}, budget)
    return judged(case, record)


def in_rounds(case: Case, calls: dict[str, Callable[[], Any]], found: dict[str, dict[str, Any]], budget: float) -> None:
    """Time the calls in every state of the case, into the entries; each has its ratio to ours, round by round."""
    for state in case.states:
        samples = {name: sampled(call, state) for name, call in calls.items()}
        times = interleaved(samples, least=MIN_ROUNDS, most=MAX_ROUNDS, budget=budget)
        for name, theirs in times.items():
            found[name][state] = timing(theirs)
            if name != case.ours and case.ours in times:
                ratios = quantiles([other / mine for other, mine in zip(theirs, times[case.ours], strict=True)])
                names = ("ratio_q10", "ratio", "ratio_q90")
                found[name][state] |= dict(zip(names, map(rounded, ratios), strict=True))


def timing(times: Sequence[float]) -> dict[str, Any]:
    return {"median_seconds": rounded(median(times)), "seconds": [rounded(t) for t in times]}


def judged(case: Case, record: dict[str, Any]) -> dict[str, Any]:
    """The record with what it amounts to: share of the floor's speed, times faster, bars met or missed."""
    by_name = {each["name"]: each for each in record["contenders"]}
    ours = by_name[case.ours]
    if "warm" not in ours:
        return record
    took = ours["warm"]["median_seconds"]
    record["share_of_floor"] = rounded(record["floor_seconds"] / took)
    for name, each in by_name.items():
        if name != case.ours and "warm" in each:
            each["warm"].setdefault("ratio", rounded(each["warm"]["median_seconds"] / took))
    verdicts: dict[str, bool | None] = {}
    if case.floor and case.floor.share is not None:
        verdicts[f"at least {case.floor.share:.0%} of the floor's speed"] = record["share_of_floor"] >= case.floor.share
    if case.floor and case.floor.most is not None:
        verdicts[f"at most {duration(case.floor.most)}"] = took <= case.floor.most
    if case.floor and case.floor.most_extra is not None:
        extra = ours["extra_bytes"]
        verdicts[f"at most {case.floor.most_extra / 1e6:.3g} MB of memory"] = (
            None if extra is None else extra <= case.floor.most_extra
        )
    for name, bar in case.versus.items():
        for state in BOTH if bar is not None else ():
            if state in ours:
                theirs = by_name.get(name, {}).get(state)
                met = None if theirs is None else theirs["ratio"] >= bar
                verdicts[f"at least {compared(name, bar)}" + ", cold" * (state == "cold")] = met
    return {**record, "bars": verdicts}


def compared(name: str, bar: float) -> str:
    return f"{bar:g}x faster than {name}" if bar > 1 else f"{bar:.0%} of the speed of {name}"


def floors(chosen: list[Case]) -> str:
    bandwidth, rate = H200
    rows = []
    for case in chosen:
        floor = case.floor
        assert floor is not None
        asked = [f"≥ {floor.share:.0%} of its speed"] if floor.share else []
        asked += [f"≤ {duration(floor.most)}"] if floor.most else []
        asked += [f"≥ {compared(name, bar)}" for name, bar in case.versus.items() if bar]
        asked += [f"≤ {floor.most_extra / 1e6:.3g} MB of memory"] if floor.most_extra else []
        operations = f"{floor.operations / 1e9:.3g} G" if floor.operations else ""
        cells = [f"{floor.bytes / 1e9:.3g} GB", floor.formula, operations, duration(floor.seconds(*H200))]
        rows.append([case.name, *cells, "; ".join(asked)])
    return (
        f"Floors at {bandwidth / 1e12:g} TB/s, reads and writes together, and {rate / 1e12:g} TFLOP/s in bf16: "
        "those of an NVIDIA H200.\n`make gpu` measures these rows; it has not been run on a GPU yet.\n\n"
        + study.table(["kernel", "must be moved", "", "operations", "floor", "asked"], rows)
    )


def table(content: dict[str, Any]) -> str:
    lines = [
        f"{study.described(content)}; a copy moves {content['copy_bytes_per_second'] / 1e12:.3g} TB/s, a bf16 product "
        f"runs at {content['matmul_operations_per_second'] / 1e12:.3g} TFLOP/s.",
        "Medians; ratios to ours are formed within a round where 10 % and 90 % quantiles stand beside them.",
    ]
    if content["without_native"]:
        lines.append(f"Without the native library: {content['without_native']}.")
    rows = []
    for record in content["results"]:
        for number, each in enumerate(record["contenders"]):
            case = record["case"] if number == 0 else ""
            if "warm" not in each:
                rows.append([case, each["name"], "failed", "", "", "", "", "", each["failed"].splitlines()[0]])
                continue
            took, launched = each["warm"]["median_seconds"], each.get("launches")
            verdicts = [f"{bar}: {VERDICTS[met]}" for bar, met in record.get("bars", {}).items()]
            rows.append(
                [
                    case,
                    each["name"],
                    duration(took) + (f", {launched} launches" if launched else ""),
                    duration(record["floor_seconds"]) if number == 0 else "",
                    f"{record['floor_seconds'] / took:.0%}",
                    "" if each["extra_bytes"] is None else f"{each['extra_bytes'] / 1e6:.3g} MB",
                    *(times_faster(each.get(state, {})) for state in BOTH),
                    "; ".join(verdicts) if number == 0 else "",
                ]
            )
    head = ["kernel", "contender", "time", "floor", "of its speed", "memory", "ours is faster", "cold", "asked"]
    return "\n".join([*lines, "", study.table(head, rows)])


def times_faster(times: dict[str, Any]) -> str:
    if "ratio_q10" in times:
        return f"{times['ratio']:.3g}x ({times['ratio_q10']:.3g} to {times['ratio_q90']:.3g})"
    return f"{times['ratio']:.3g}x" if "ratio" in times else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", help="measure a family, or the cases whose name contains this")
    add("--sizes", choices=("cpu", "gpu"), default="gpu" if DEVICE.type == "cuda" else "cpu", help="[%(default)s]")
    add("--all", action="store_true", help="time every contender, each backend of ours by itself too")
    add("--seconds", type=float, default=1.5, help="how long a case is measured in each state on a CPU [%(default)s]")
    add("--small", action="store_true", help="small inputs, to try the program out")
    add("--floors", action="store_true", help="print sizes and floors, measure nothing")
    add("--base", metavar="REV", help="compare ours with that of another commit, and nothing else")
    add("--slower-than", type=float, metavar="RATIO", help="with --base: fail where new/base is larger than this")
    add("--threads", type=int, help="CPU threads [torch's default]")
    add("--out", type=Path, help="where to write JSON; the table goes beside it")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = "gpu" if arguments.floors else arguments.sizes
    chosen = cases(arguments.small, sizes, arguments.only)
    if not chosen:
        parser.error(f"--only: no family is called {arguments.only!r}, and no case has it in its name")
    if arguments.floors:
        print(floors(chosen))
        return 0
    if DEVICE.type == "cpu" and sizes == "gpu" and not arguments.small:
        parser.error("torch sees no GPU here; --floors, --small and --sizes cpu need none")
    if arguments.slower_than and not arguments.base:
        parser.error("--slower-than: needs --base, the commit to compare with")
    content = study.origin("kernels", argv)
    if arguments.base:
        try:
            return base.main(arguments, chosen, content)
        except study.Refused as error:
            parser.error(str(error))
    out = arguments.out
    if out is None and not (arguments.small or arguments.only or arguments.all):
        name = content["machine"]["gpu"] if DEVICE.type == "cuda" else "kernels_cpu"
        out = study.RESULTS / (re.sub(r"\W+", "_", name.lower()) + ".json")
    content |= {
        "load_average": warn_if_busy(),
        "threads": torch.get_num_threads(),
        "without_native": why_not("gather", "native", DEVICE.type),
        "last_level_cache_bytes": cache_bytes(),
        "copy_bytes_per_second": rounded(copy_bandwidth()),
        "matmul_operations_per_second": rounded(matmul_rate()),
        "results": [],
    }
    begin = time.perf_counter()
    for case in tqdm(chosen, unit="case", disable=None):
        content["results"].append(measure(case, arguments.seconds, arguments.all))
        content["seconds"] = rounded(time.perf_counter() - begin)
        if out is not None:
            study.write_json(out, content)
    return study.leave(content, table(content), out)
