"""How many times faster than the alternatives, measured so that a noisy machine matters less.

    python benchmarks/kernels/ratios.py                    about four minutes on two cores
    python benchmarks/kernels/ratios.py --only compact     the cases with this in their name
    python benchmarks/kernels/ratios.py --small --seconds 0.1 --out /tmp/ratios.json

All contenders of a case take turns within one process (A, B, ours, A, B, ours, ...): what slows the machine down slows
all of them. A ratio is formed within each round; its median over the rounds counts, beside it stand the 10 % and 90 %
quantiles. What `warm` and `cold` mean is said in compare.py; a warm turn begins with 5 ms of calls that are not timed,
for the turn before was somebody else's: after a dense step has filled the caches with lines that must be written back,
a sparse step takes about ten calls to reach its pace. Turns do not help where threads lack cores: a call that waits for
a thread without one takes milliseconds, a call that needs no second thread does not. Hence the warning if the machine
is busy.

Every contender's result is checked before; a wrong one ends the program. Tables are printed in markdown. A whole run
writes benchmarks/results/kernels_<device>.json, at once or not at all; a part of it only what --out names.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compare import (
    DEVICE,
    Case,
    Contender,
    Problem,
    cache_bytes,
    copy_bandwidth,
    duration,
    evict,
    seconds,
    synchronized,
)
from tqdm import tqdm

import sparsekernels as sk
from sparsekernels.ops.backend import build_facts

HERE = Path(__file__).resolve().parent
FAMILIES = (
    "adamw",
    "adamw_rows",
    "masked_grad",
    "fisher",
    "topk",
    "ks",
    "singular_values",
    "gates",
    "columns",
    "gather_scatter",
    "low_rank",
)
MIN_ROUNDS, MAX_ROUNDS = 5, 100
WARM_UP = 5e-3  # seconds
BUSY = 0.5  # load average over the last minute above which other programs are in the way


def cases(small: bool, only: str) -> list[Case]:
    found = [(family, case) for family in FAMILIES for case in importlib.import_module(f"bench_{family}").cases(small)]
    return [case for family, case in found if case.versus and (only in case.name or only == family)]


def take_turns(calls: dict[str, Callable[[], Any]], state: str, budget: float) -> dict[str, list[float]]:
    """Seconds of one call, a list for each contender with one entry a round."""
    repeats = {}
    for name, call in calls.items():
        call()
        # A millisecond of calls in a row in warm turns: one would be at the mercy of the timer and the interpreter.
        repeats[name] = max(1, min(100, math.ceil(1e-3 / seconds(call))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            if state == "cold":
                evict()
                times[name].append(seconds(call))
            else:
                begin = time.perf_counter()
                while time.perf_counter() - begin < WARM_UP:
                    call()
                times[name].append(seconds(call, repeats[name]))
    return times


def measure(case: Case, budget: float) -> Iterator[dict[str, Any]]:
    """One record for each state of the case."""
    problem: Problem = case.make()
    entrants: dict[str, tuple[Contender, float]] = {
        name: case.entrant(name, problem) for name in (*case.versus, case.ours)
    }
    calls = {name: synchronized(contender.call) for name, (contender, _) in entrants.items()}
    for state in case.states:
        times = take_turns(calls, state, budget)
        ours = times[case.ours]
        yield {
            "case": case.name,
            "state": state,
            "shape": problem.shape,
            "density": problem.density,
            "dtype": problem.dtype,
            "bytes_moved": problem.bytes_moved,
            "bytes_formula": problem.formula,
            "share_of_copy_bandwidth": rounded(problem.bytes_moved / median(ours) / copy_bandwidth()),
            "rounds": len(ours),
            "ours": {"name": case.ours, **timing(ours), "max_error": rounded(entrants[case.ours][1])},
            "versus": [
                {
                    "name": name,
                    **timing(times[name]),
                    "max_error": rounded(entrants[name][1]),
                    **ratio([theirs / mine for theirs, mine in zip(times[name], ours, strict=True)], bar),
                }
                for name, bar in case.versus.items()
            ],
        }


def median(numbers: list[float]) -> float:
    return float(torch.tensor(numbers, dtype=torch.float64).quantile(0.5))


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def timing(times: list[float]) -> dict[str, Any]:
    return {"median_seconds": rounded(median(times)), "seconds": [rounded(t) for t in times]}


def ratio(ratios: list[float], bar: float | None) -> dict[str, Any]:
    quantiles = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    low, middle, high = (rounded(q) for q in quantiles.tolist())
    found: dict[str, Any] = {"ratio": middle, "ratio_q10": low, "ratio_q90": high}
    return found if bar is None else {**found, "bar": bar, "passed": middle >= bar}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts = {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": rounded(os.getloadavg()[0]),
        "device": torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "cpu",
        "last_level_cache_bytes": cache_bytes(),
        "copy_bytes_per_second": rounded(copy_bandwidth()),
        "torch": torch.__version__,
        "sparsekernels": sk.__version__,
        "python": platform.python_version(),
        "build": build_facts().get(DEVICE.type, {}),
    }
    try:
        import peft
    except ImportError:
        return facts
    return {**facts, "peft": peft.__version__}


def write(path: Path, results: dict[str, Any]) -> None:
    """One line for each record; beside the path first, then over it: at no time is there half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "results")
    records = ",\n".join(json.dumps(record) for record in results["results"])
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        file.write(f'{{\n{lines},\n"results": [\n{records}\n]\n}}\n')
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def table(records: list[dict[str, Any]], with_bar: bool) -> str:
    """One line for each case and alternative; both states side by side."""
    head = ["what", "instead of", "ours", "theirs", "times faster, warm", "times faster, cold", *["bar"] * with_bar]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    pairs: dict[tuple[str, str], dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {}
    for record in records:
        for other in record["versus"]:
            if ("bar" in other) == with_bar:
                pairs.setdefault((record["case"], other["name"]), {})[record["state"]] = (record["ours"], other)
    for (case, name), states in pairs.items():
        ours, theirs = next(iter(states.values()))
        cells = [case, name, duration(ours["median_seconds"]), duration(theirs["median_seconds"])]
        for state in ("warm", "cold"):
            numbers = [states[state][1][key] for key in ("ratio", "ratio_q10", "ratio_q90")] if state in states else []
            cells.append("{:.3g} ({:.3g} to {:.3g})".format(*numbers) if numbers else "-")
        if with_bar:
            verdicts = [f"{'met' if other['passed'] else 'missed'} {state}" for state, (_, other) in states.items()]
            cells.append(f"≥ {theirs['bar']:g}: " + ", ".join(verdicts))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the cases whose name contains this, or a family")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long a case is measured in each state")
    parser.add_argument("--small", action="store_true", help="small inputs, to try the program out")
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    parser.add_argument("--out", type=Path, help="where to write JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = cases(arguments.small, arguments.only)
    if not chosen:
        parser.error(f"no case has {arguments.only!r} in its name")
    facts = machine()
    if facts["load_average"] > BUSY:
        busy = f"{facts['load_average']:.2g} threads were busy over the last minute"
        print(f"warning: {busy}; beside other programs the ratios will be off", file=sys.stderr)
    records: list[dict[str, Any]] = []
    gc.disable()
    for case in tqdm(chosen, unit="case", disable=None):
        records += measure(case, arguments.seconds)
        gc.collect()
    results = {
        **facts,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/kernels/ratios.py", *sys.argv[1:]]),
        "results": records,
    }
    out = arguments.out
    if out is None and not (arguments.small or arguments.only):
        out = HERE.parent / "results" / f"kernels_{DEVICE.type}.json"
    if out is not None:
        write(out, results)
    bandwidth = facts["copy_bytes_per_second"] / 1e9
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, copy_ at {bandwidth:.3g} GB/s")
    print("Medians; ratios within a round, with their 10 % and 90 % quantiles. Times are warm.\n")
    for with_bar in (True, False):
        if any(("bar" in other) == with_bar for record in records for other in record["versus"]):
            print(table(records, with_bar), end="\n\n")
    print(f"written to {out}" if out else "not written; name a file with --out")


if __name__ == "__main__":
    main()
