"""Checks a CUDA library on a machine without a GPU, right after

    SPARSEKERNELS_BUILD=cuda python setup.py build_native --build-lib build/cuda-check

Fails where a kernel spills registers, where the library does not load, and where an op that csrc/cuda/ implements is
not registered afterwards.
"""

import re
import sys
from pathlib import Path

import torch

import sparsekernels  # noqa: F401  (defines the schemas that the library registers implementations for)

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "native-strict"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def main() -> int:
    reports = [(BUILD / f"cuda-{source.name}.o.log").read_text() for source in ROOT.glob("csrc/cuda/*.cu")]
    kernels = [kernel for report in reports for kernel in KERNEL.finditer(report)]
    spilling = [kernel for kernel in kernels if kernel["stores"] != "0" or kernel["loads"] != "0"]
    for kernel in spilling:
        print(f"{kernel['arch']} spills {kernel['stores']} bytes out, {kernel['loads']} bytes in: {kernel['name']}")
    archs = " and ".join(sorted({kernel["arch"] for kernel in kernels}))
    registers = max((int(kernel["registers"]) for kernel in kernels), default=0)
    print(f"{len(kernels)} CUDA kernels for {archs}: at most {registers} registers, {len(spilling)} spilling")

    torch.ops.load_library(BUILD / "_cuda.so")
    hosts = "".join(source.read_text() for source in ROOT.glob("csrc/cuda/*.cpp"))
    ops = [f"sparsekernels::{name}" for name in re.findall(r'm\.impl\("(\w+)"', hosts)]
    missing = [op for op in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")]
    print(f"{len(ops)} ops implemented, {len(ops) - len(missing)} registered: {' '.join(ops)}")
    return 0 if kernels and ops and not spilling and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
