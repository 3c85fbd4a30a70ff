"""What pages show and nobody types: benchmark results, the op table, the compatibility table, the API's names.

A page writes `{{ name }}` or `{{ name("argument") }}`, with a function of this file; `expand` puts its result there.
One function for each file of benchmarks/results, so that a change of format is a change of one function.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from operator import truediv
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TESTS = ROOT / "python_tests"
STATES = ("warm", "cold")
PLACEHOLDER = re.compile(r"\{\{ *(\w+)(\([^)]*\))? *\}\}")

VERDICTS = ("works", "refused", "untested")
# What no test of this repository runs. A row leaves this list when a test is marked with it.
UNTESTED = (
    ("torchrun", "training on several nodes"),
    ("TRL", "DPOTrainer, GRPOTrainer"),
    ("accelerate", "its DeepSpeed plugin; FSDP2 on GPUs"),
    ("DeepSpeed", "the library itself, ZeRO-1 and ZeRO-2"),
    ("DistributedDataParallel", "on GPUs, with NCCL"),
    ("bitsandbytes, torchao", "their quantised layers"),
    ("PyTorch Lightning", "its Trainer"),
)


def expand(markdown: str, depth: int = 0) -> str:
    """The page with its placeholders filled; `depth` is the number of folders it lies in."""

    def fill(found: re.Match[str]) -> str:
        name, arguments = found[1], ast.literal_eval(found[2][:-1] + ",)") if found[2] not in (None, "()") else ()
        if name.startswith("_") or name not in PUBLIC:
            raise KeyError(f"docs/tables.py has no table called {name!r}; it has {', '.join(sorted(PUBLIC))}")
        return PUBLIC[name](*arguments)

    return PLACEHOLDER.sub(fill, markdown).replace("](results/", f"]({'../' * depth}results/")


# Results of benchmarks. Each gives a table, the machine, and the command that reproduces it.


def accuracy() -> str:
    return _markdown("accuracy")


def grains() -> str:
    return _markdown("grains")


def grains_text() -> str:
    return _markdown("grains_text")


def language() -> str:
    return _markdown("language")


def gradient_curve() -> str:
    return _markdown("gradient_curve") + _pictures(
        ("gradient_curve", "Share of the gradient's norm that the largest entries carry")
    )


def ird() -> str:
    return _markdown("ird") + _pictures(
        ("ird", "Test accuracy of masks of equal size"), ("ird_shrinking", "How IRD shrinks samples and parameters")
    )


def ks_lottery() -> str:
    return _markdown("ks_lottery") + _pictures(
        ("ks_lottery", "Scores of all methods"),
        ("ks_lottery_pvalues", "p-values of all rows"),
        ("ks_lottery_ranked", "Rows ranked by their statistic"),
    )


def laser() -> str:
    return _markdown("laser") + _pictures(
        ("laser_gains", "Gains by layer and matrix"), ("laser_correlation", "Predicted and measured gains")
    )


def gates() -> str:
    return _markdown("gates") + _pictures(
        ("gates", "Accuracy against size and time"), ("gates_open", "Open gates in each layer")
    )


def step_cost() -> str:
    return _markdown("step_cost") + _pictures(("step_cost", "Time, peak memory and file size"))


def sharded() -> str:
    return _markdown("sharded")


def gpu_floors() -> str:
    return _markdown("gpu_floors")


def gpu_train_floors() -> str:
    return _markdown("gpu_train_floors")


def kernels_cpu() -> str:
    """Kernels beside what they replace: a row for each pair, caches warm and cold."""
    found = _json("kernels_cpu")
    rows = []
    for case, ours, other in _pairs(found):
        ratios = (f"{other[state]['ratio']:.3g}x" if state in other else "" for state in STATES)
        times = (_seconds(each["warm"]["median_seconds"]) for each in (ours, other))
        rows.append((case, f"`{other['name']}`", *times, *ratios))
    table = _table(("what", "instead of", "ours", "theirs", "times faster, warm", "cold"), rows)
    return f'??? example "{len(rows)} rows"\n\n{textwrap.indent(table, "    ")}\n\n{_machine(found)}'


def slower() -> str:
    """Every kernel measurement in which an alternative was faster."""
    rows = []
    for case, _, other in _pairs(_json("kernels_cpu")):
        for state in STATES:
            ratio = other.get(state, {}).get("ratio", 1.0)
            if ratio < 1:
                rows.append((ratio, (case, state, f"`{other['name']}`", f"{ratio:.2f}x")))
    return _table(("what", "caches", "faster", "speed of ours"), [what for _, what in sorted(rows)])


def embedding_rows() -> str:
    found = _json("embedding_rows")
    rows = []
    for record in found["records"]:
        share = record.get("share_seconds")
        rows.append(
            (
                f"`{record['name']}`" if "+" in record["name"] else record["name"],
                record.get("trains", "nothing"),
                _seconds(record["step_seconds"]),
                f"{_ms(share['median'])} ({_ms(share['low'])} to {_ms(share['high'])})" if share else "",
                _bytes(record["peak_bytes"]),
                _bytes(record["saved_bytes"]),
                _bytes(record["largest_made_bytes"]),
                f"{record['saved_of_table_size']}, {record['made_of_table_size']}",
            )
        )
    table, tokens = " x ".join(map(str, found["table"])), found["tokens"]
    head = ("", "trains", "step", "embedding's share (ms)", "peak above the model", "saved for backward")
    return "\n\n".join(
        (
            f"{found['rows']} rows of a tied table of {table} ({_bytes(found['table_bytes'])}), {tokens} tokens. The "
            "embedding's share is the step less the forward and backward of the same model with its table frozen; "
            f"below {_seconds(found['resolution_seconds'])} it cannot be told from nothing.",
            _table((*head, "largest tensor made", "of table size: saved, made"), rows),
            "\n".join(f"- {what}: `` {why} ``" for what, why in found["refused"].items()),
            _machine(found),
        )
    )


def fisher() -> str:
    found = _json("fisher")
    text = [
        "A sentence encoder in fp32. Each method runs in a process of its own, in turns, and its result is checked. "
        "Peaks are above the loaded model; they include the Fisher diagonal."
    ]
    for part, ours in (("fisher", "fisher_diagonal, batches of 12"), ("topk", "sk.ops.topk")):
        seconds = found[part]["seconds"]
        rows = [
            (
                f"`{name}`",
                f"{median(took):.2f}",
                "" if name == ours else f"{median(map(truediv, took, seconds[ours])):.2f}x",  # they took turns
                _bytes(found[part]["peak_bytes"][name]),
            )
            for name, took in seconds.items()
        ]
        text.append(_table(("", "seconds", f"`{ours}` is faster by", "peak memory"), rows))
    return "\n\n".join((*text, _machine(found, "python -m benchmarks fisher")))


# The package itself.


def ops() -> str:
    """The op table, with what serves each op on a CPU and on a GPU where everything is installed."""
    rows = []
    for op in import_module("sparsekernels.ops").OPS:
        gpu = ["CUDA"] if _registers("cuda", op, f"{op.family}.cpp") else []
        triton = ROOT / "sparsekernels" / "ops" / op.family / "triton.py"
        gpu += ["Triton"] if triton.exists() and f"\ndef {op.name}(" in triton.read_text() else []
        cpu = "C++" if _registers("cpu", op, f"{op.family}*.cpp") else "PyTorch"
        rows.append((f"[`{op.name}`][{path('sparsekernels.ops', op.name)}]", op.doc, cpu, ", ".join(gpu)))
    return _table(("op", "what it does", "CPU", "CUDA"), rows)


def requirement(package: str) -> str:
    """The version of a package, or of "python", that pyproject.toml asks for."""
    pattern = r'requires-python = ">=([\d.]+)"' if package == "python" else rf'"{package}>=([\d.]+)"'
    found = re.search(pattern, (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise ValueError(f"pyproject.toml asks for no version of {package}")
    return found[1]


def section(file: str, heading: str) -> str:
    """The text under a heading of a Markdown file, with its lists as Python-Markdown reads them."""
    found = re.search(
        rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise ValueError(f"{file} has no heading {heading!r}")
    indented = re.sub("^   ", "    ", found[2].strip(), flags=re.MULTILINE)
    return re.sub(r"\n(?=\d+\. )", "\n\n", indented)


def option(name: str) -> str:
    """The values that an option of SparseAdamW takes, the default first."""
    allowed = import_module("sparsekernels.optim.options").ALLOWED[name]
    if allowed is None:
        return "`0`, any int"
    return ", ".join(f"`{json.dumps(value)}`" if isinstance(value, str) else f"`{value}`" for value in allowed)


def api(module: str) -> str:
    """A section of the reference for every public name of a module; for a namespace among them, one for each of its."""
    found = []
    for name in import_module(module).__all__:
        thing = getattr(import_module(module), name)
        if name in ("methods", "ops", "OPS"):  # on pages of their own
            continue
        if not isinstance(thing, ModuleType):
            found.append(f"::: {path(module, name)}\n")
        else:
            inner = f"{module}.{name}"
            found.append(f"## {name}\n\n{thing.__doc__}\n")
            found += [f"::: {path(inner, each)}\n    options: {{heading_level: 3}}\n" for each in thing.__all__]
    return "\n".join(found)


def path(module: str, name: str) -> str:
    """Where the reference finds a public name: in its own file, if that has the same name."""
    return f"{module}.{name}.{name}" if find_spec(f"{module}.{name}") else f"{module}.{name}"


def compatibility() -> str:
    """What tests marked `compatibility` prove, and what no test runs."""
    rows = {(thing, what): ("untested", []) for thing, what in UNTESTED}
    for test, (thing, what, verdict) in _marks():
        known, tests = rows.get((thing, what), (verdict, []))
        if known != verdict:
            raise ValueError(f"{test} says that {thing}, {what} is {verdict!r}; elsewhere it is {known!r}")
        rows[thing, what] = verdict, [*tests, test]
    ordered = sorted(rows.items(), key=lambda row: (row[0][0].lower(), VERDICTS.index(row[1][0])))
    table = [
        (thing, what, verdict if verdict == "works" else f"**{verdict}**", "<br>".join(f"`{test}`" for test in tests))
        for (thing, what), (verdict, tests) in ordered
    ]
    return _table(("with", "what", "status", "test"), table)


def _marks() -> Iterator[tuple[str, tuple[str, str, str]]]:
    """(file and name of the test, arguments of the mark), read without running anything."""
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.compatibility":
                    thing, what, verdict = map(ast.literal_eval, mark.args)
                    if verdict not in VERDICTS[:2]:
                        raise ValueError(
                            f"{file.name}, {node.name}: a mark says one of {VERDICTS[:2]}, got {verdict!r}"
                        )
                    yield f"{file.relative_to(TESTS)}::{node.name}", (thing, what, verdict)


# Helpers.


def _registers(device: str, op: Any, files: str) -> bool:
    return any(f'"{op.name}"' in path.read_text() for path in (ROOT / "csrc" / device).glob(files))


@functools.cache
def _json(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _markdown(name: str) -> str:
    return (RESULTS / f"{name}.md").read_text().strip() + "\n"


def _pictures(*found: tuple[str, str]) -> str:
    return "".join(f"\n![{caption}](results/{name}.png)\n" for name, caption in found)


def _pairs(found: Any) -> Iterator[tuple[str, Any, Any]]:
    """(case, our contender, another one) for all that were timed."""
    for record in found["results"]:
        ours, *others = record["contenders"]
        yield from ((record["case"], ours, other) for other in others if "warm" in other and "warm" in ours)


def _machine(found: dict[str, Any], command: str | None = None) -> str:
    inner = found["machine"] if isinstance(found["machine"], dict) else found
    torch = inner.get("torch") or inner["versions"]["torch"]
    date = f", {found['date'][:10]}" if "date" in found else ""
    return f"{inner['cpu']}, {inner['cores']} cores, torch {torch}{date}; `{command or found['command']}`."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(x: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x / 1e-6:.3g} µs"


def _ms(x: float) -> str:
    return f"{x * 1e3:.3g}"


def _bytes(x: float) -> str:
    return f"{x / 2**20:,.0f} MiB" if x >= 2**20 else f"{x / 2**10:,.0f} KiB"


PUBLIC = {
    name: thing
    for name, thing in list(globals().items())
    if callable(thing)
    and not name.startswith("_")
    and getattr(thing, "__module__", "") == __name__
    and name != "expand"
}
