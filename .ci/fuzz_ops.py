"""Throws random hostile calls at the raw CPU ops, under address and undefined-behaviour sanitizers.

    make fuzz                                    12,000 calls
    make fuzz ARGS="--seconds 120"               as many as fit
    make fuzz ARGS="--seed 4711 --calls 1"       one call again, as a failure names it

The CPU library is compiled with the sanitizers into build/fuzz, beside a copy of the package: the installed one stays
as it is. fuzz_calls.py makes the calls, in child processes, so that a crash ends no more than one of them. A call may
raise or compute something. What fails: a crash, a report of a sanitizer, a call that does not return, memory around an
argument that changed, an argument that changed though the call raised, or one that is only read.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "fuzz"
# What comes last counts: with the -O3 of setup.py, sanitized code takes minutes more to compile.
FLAGS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O0"


def build(source: Path) -> None:
    """The package of `source`, its CPU library with sanitizers."""
    TREE.mkdir(parents=True, exist_ok=True)
    for name in ("csrc", "sparsekernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (source / name).is_dir():
            shutil.rmtree(TREE / name, ignore_errors=True)  # what was removed must not be compiled
            ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            shutil.copytree(source / name, TREE / name, ignore=ignored)
        else:
            shutil.copy2(source / name, TREE / name)
    compiler = TREE / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" {FLAGS}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "SPARSEKERNELS_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "-q", "build_native", "--inplace"]
    subprocess.run(command, cwd=TREE, env=environment, check=True)


def sanitized() -> dict[str, str]:
    """The environment of the calls: the runtime of the sanitizers must be there before everything else."""
    compiler = os.environ.get("CXX", "c++").split()
    # Python knows no C++: the runtime finds what throws exceptions only if that is there as early.
    libraries = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(TREE), str(ROOT / "python_tests")]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=12_000, help="how many calls")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next have the numbers that follow")
    parser.add_argument("--source", type=Path, default=ROOT, help="a checkout to try instead of this one")
    arguments = parser.parse_args()
    build(arguments.source.resolve())
    numbers = [str(n) for n in (arguments.seed, arguments.calls, arguments.seconds)]
    command = [sys.executable, str(ROOT / ".ci" / "fuzz_calls.py"), *numbers, str(TREE)]
    os.execve(sys.executable, command, sanitized())


if __name__ == "__main__":
    main()
