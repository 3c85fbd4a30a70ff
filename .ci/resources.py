"""Registers, shared memory and spills of every CUDA and Triton kernel, as compiled for sm_80 and sm_90 without a GPU.

    make resources

Prints a table, one line for each kernel and architecture over all of its variants, and writes it to
build/resources.md. Fails where a variant spills registers or keeps an array in local memory.
"""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "resources.md"
ARCHS = ("sm_80", "sm_90")
CUDA_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?P<rest>[^\n]*)",
    re.DOTALL,
)


def cuda_kernels() -> list[dict[str, Any]]:
    """From what ptxas said while `make cuda-check` compiled them."""
    found = []
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        report = (ROOT / "build" / "native-strict" / f"cuda-{source.name}.o.log").read_text()
        for kernel in CUDA_KERNEL.finditer(report):
            shared = re.search(r"(\d+) bytes smem", kernel["rest"])
            found.append(
                {
                    "kernel": f"{source.name}: {plain(kernel['name'])}",
                    "arch": kernel["arch"],
                    "registers": int(kernel["registers"]),
                    "shared": int(shared[1]) if shared else 0,
                    "spilled": int(kernel["stores"]) + int(kernel["loads"]) + int(kernel["stack"]),
                }
            )
    return found


def plain(mangled: str) -> str:
    """The name of a kernel without namespaces and template arguments."""
    name, rest = "", mangled.removeprefix("_ZN")
    while length := re.match(r"\d+", rest):  # each part is its length and itself; what follows the last is no number
        begin = length.end()
        name, rest = rest[begin : begin + int(length[0])], rest[begin + int(length[0]) :]
    return name or mangled


def triton_kernels() -> list[dict[str, Any]]:
    """By compiling each way in which a launcher calls them: python_tests/ops/test_aot.py knows these."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    program = ROOT / "python_tests" / "ops" / "test_aot.py"
    done = subprocess.run([sys.executable, program], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [
        {
            "kernel": f"Triton: {each['kernel']}",
            "arch": f"sm_{each['architecture']}",
            "registers": each["registers"],
            "shared": each["shared"],
            "spilled": each["local"] + each["stack"],
        }
        for each in json.loads(done.stdout.splitlines()[-1])
    ]


def main() -> int:
    kernels = cuda_kernels() + triton_kernels()
    by_kernel: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for each in kernels:
        by_kernel[each["kernel"], each["arch"]].append(each)
    lines = ["| kernel | compiled for | variants | registers | shared memory | spilled |", "|---|---|---|---|---|---|"]
    for (name, arch), variants in sorted(by_kernel.items()):
        registers = [each["registers"] for each in variants]
        shared, spilled = (max(each[what] for each in variants) for what in ("shared", "spilled"))
        span = f"{min(registers)} to {max(registers)}" if min(registers) < max(registers) else f"{registers[0]}"
        lines.append(f"| {name} | {arch} | {len(variants)} | {span} | {shared} B | {spilled} B |")
    text = "\n".join(lines) + "\n"
    OUT.write_text(text)
    print(text, end="")
    spilling = [each for each in kernels if each["spilled"]]
    print(f"{len(kernels)} variants of {len({name for name, _ in by_kernel})} kernels, {len(spilling)} spilling")
    # Whatever stops to be found, for ptxas words its reports anew, must not pass for something that does not spill.
    sources = {name.partition(":")[0] for name, _ in by_kernel}
    expected = {source.name for source in ROOT.glob("csrc/cuda/*.cu")} | {"Triton"}
    missing = {(name, arch) for name, _ in by_kernel for arch in ARCHS} - by_kernel.keys()
    for each in sorted(expected - sources) + sorted(missing):
        print(f"nothing was found of {each}")
    return int(bool(spilling or missing or expected != sources))


if __name__ == "__main__":
    sys.exit(main())
