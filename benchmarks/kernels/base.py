"""Ours in two commits: is any op slower than it was?

The other commit's package is built in build/, once. Each of the two is loaded by a process of its own, with the same
benchmark code, that of the working tree. For every case both processes make the same input and check the result of
ours; then they are interleaved: in each round, in random order, either takes one time, and the ratio new/base is formed
within the round. A case that needs what the other commit lacks is noted as such.

The exit status is 1 if a result is wrong, or with --slower-than if the median ratio of a case is above that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sparsekernels as sk
from sparsekernels.ops.backend import why_not

from .. import study
from ..study import ROOT, Content
from ..timing import DEVICE, duration, interleaved, median, quantiles, rounded, warn_if_busy
from . import run
from .case import Case

MIN_ROUNDS, MAX_ROUNDS = 11, 200


def built(revision: str) -> Path:
    """A folder with the package of a commit, compiled, and without its benchmarks."""
    asked = ["git", "rev-parse", "--short", "--verify", "--quiet", f"{revision}^{{commit}}"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise study.Refused(f"--base: git knows no commit {revision!r}")
    folder = ROOT / "build" / f"base-{found.stdout.strip()}-torch-{torch.__version__}"
    if not folder.is_dir():
        print(f"building {found.stdout.strip()} in {folder}", file=sys.stderr)
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            archive = subprocess.run(
                ["git", "archive", revision, ".", ":!benchmarks"], cwd=ROOT, capture_output=True, check=True
            )
            subprocess.run(["tar", "-x", "-C", partial], input=archive.stdout, check=True)
            subprocess.run([sys.executable, "setup.py", "-q", "build_native", "--inplace"], cwd=partial, check=True)
            Path(partial).rename(folder)
            Path(partial).mkdir()  # for TemporaryDirectory to remove
    return folder


class Worker:
    """A process that has loaded the package of one tree; it does what it is asked, line by line."""

    def __init__(self, tree: Path, arguments: argparse.Namespace) -> None:
        settings = json.dumps([arguments.small, arguments.sizes, torch.get_num_threads()])
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, settings],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self.ask("facts")
        if not Path(self.facts["package"]).is_relative_to(tree):
            raise RuntimeError(f"a process that should load the package of {tree} has {self.facts['package']}")

    def ask(self, what: str, *about: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([what, *about]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that was asked to {what} {' '.join(map(str, about))} is gone")
        return json.loads(line)

    def sample(self, state: str, _: int) -> float:
        return float(self.ask("sample", state))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Served:
    """What a worker does."""

    def __init__(self, small: bool, sizes: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.cases, self.lacking = {}, ""
        for family in run.FAMILIES:
            try:
                self.cases |= {case.name: case for case in run.family_cases(family, small, sizes)}
            except (ImportError, AttributeError) as error:  # the commit has no such thing
                self.lacking = f"{type(error).__name__}: {error}"

    def facts(self) -> Content:
        return {"package": sk.__file__, "without_native": why_not("gather", "native", DEVICE.type)}

    def prepare(self, name: str) -> str | None:
        """Make and check ours; why not, if not."""
        self.contender = None
        if name not in self.cases:
            return self.lacking or "there is no such case"
        case = self.case = self.cases[name]
        try:
            self.contender, _ = case.entrant(case.ours, case.make())
            self.samples = (
                {} if DEVICE.type == "cuda" else {s: run.sampled(self.contender.call, s) for s in case.states}
            )
        except Exception as error:  # of any kind: it is told to the one who asks
            return f"{type(error).__name__}: {error}"
        return None

    def sample(self, state: str) -> float:
        if DEVICE.type == "cuda":
            return median(run.on_device(self.contender.call, self.case.graph))
        return self.samples[state](0)


def compared(case: Case, workers: dict[str, Worker], budget: float) -> Content:
    """A record, of times and of ratios new/base."""
    record: Content = {"case": case.name}
    refused = {name: why for name, worker in workers.items() if (why := worker.ask("prepare", case.name))}
    if refused:
        return {**record, "refused": refused}
    for state in case.states if DEVICE.type == "cpu" else case.states[:1]:
        samples = {name: partial(worker.sample, state) for name, worker in workers.items()}
        times = interleaved(samples, least=MIN_ROUNDS, most=MAX_ROUNDS, budget=budget)
        ratios = [new / base for base, new in zip(*times.values(), strict=True)]
        record[state] = {
            **{name: run.timing(mine) for name, mine in times.items()},
            **dict(zip(("ratio_q10", "ratio", "ratio_q90"), map(rounded, quantiles(ratios)), strict=True)),
        }
    return record


def table(content: Content, most: float | None) -> str:
    rows = []
    for record in content["results"]:
        states = {state: record[state] for state in run.BOTH if state in record}
        cells = ["-", "-", "; ".join(f"{name}: {why}" for name, why in record.get("refused", {}).items()), ""]
        if states:
            warm = states["warm"]
            cells = [duration(warm[name]["median_seconds"]) for name in ("base", "new")]
            cells += [
                f"{found['ratio']:.3f} ({found['ratio_q10']:.3f} to {found['ratio_q90']:.3f})"
                for found in states.values()
            ]
            cells += [""] * (4 - len(cells))
        slower = [state for state, found in states.items() if most and found["ratio"] > most]
        rows.append([record["case"], *cells, f"slower {', '.join(slower)}" if slower else ""])
    head = ["ours", "base", "new", "new / base, warm", "cold", f"more than {most:g}" if most else ""]
    lines = [f"{study.described(content)}, beside {content['base']}."]
    for name, facts in content["packages"].items():
        if facts["without_native"]:
            lines.append(f"{name} is without the native library: {facts['without_native']}.")
    lines += ["Median ratios within a round, with their 10 % and 90 % quantiles.", "", study.table(head, rows)]
    return "\n".join(lines)


def main(arguments: argparse.Namespace, chosen: list[Case], content: Content) -> int:
    workers = {"base": Worker(built(arguments.base), arguments), "new": Worker(ROOT, arguments)}
    content |= {
        "base": arguments.base,
        "load_average": warn_if_busy(),
        "packages": {name: worker.facts for name, worker in workers.items()},
        "results": [],
    }
    try:
        for case in tqdm(chosen, unit="case", disable=None):
            content["results"].append(compared(case, workers, arguments.seconds))
    finally:
        for worker in workers.values():
            worker.close()
    if arguments.out:
        study.write_json(arguments.out, content)
    text, most = table(content, arguments.slower_than), arguments.slower_than
    print(text)
    slower = [r for r in content["results"] for s in run.BOTH if most and s in r and r[s]["ratio"] > most]
    return int(bool(slower) or any("new" in record.get("refused", {}) for record in content["results"]))


def serve(settings: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anyone prints is no answer
    served = Served(*json.loads(settings))
    for line in sys.stdin:
        what, *about = json.loads(line)
        print(json.dumps(getattr(served, what)(*about)), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
