"""Run a benchmark or an experiment.

python -m benchmarks NAME [arguments]
python -m benchmarks NAME --help      what it measures, and its arguments
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

# Name -> module, in the order of the list that is printed.
PROGRAMS = {
    "kernels": "kernels.run",
    "gpu-train": "gpu_train",
    "step-cost": "step_cost",
    "sharded": "sharded",
    "finetune": "finetune",
    "accuracy": "accuracy",
    "grains": "grains",
    "grains-text": "grains_text",
    "gradient-curve": "gradient_curve",
    "language": "language",
    "language-demo": "language_demo",
    "ird": "ird",
    "gates": "gates",
    "laser": "laser",
    "ks-lottery": "ks_lottery",
    "fisher": "fisher",
    "embedding-rows": "embedding_rows",
}


def listing() -> str:
    """One line a program, from its docstring; nothing is imported."""
    lines = [__doc__ or ""]
    for name, module in PROGRAMS.items():
        source = Path(__file__).parent / f"{module.replace('.', '/')}.py"
        doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<16}{doc.splitlines()[0]}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in PROGRAMS:
        print(listing(), file=sys.stdout if argv in (["-h"], ["--help"]) else sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    sys.argv = [f"python -m benchmarks {argv[0]}", *argv[1:]]
    return int(importlib.import_module(f".{PROGRAMS[argv[0]]}", __package__).main(argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
