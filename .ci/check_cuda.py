"""Checks a CUDA library on a machine without a GPU, right after

    SPARSEKERNELS_BUILD=cuda python setup.py build_native --build-lib build/cuda-check

Fails where the library does not load, and where an op that csrc/cuda/ implements is not registered afterwards.
"""

import re
import sys
from pathlib import Path

import torch

import sparsekernels  # noqa: F401  (defines the schemas that the library registers implementations for)

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "native-strict"


def main() -> int:
    torch.ops.load_library(BUILD / "_cuda.so")
    hosts = "".join(source.read_text() for source in ROOT.glob("csrc/cuda/*.cpp"))
    ops = [f"sparsekernels::{name}" for name in re.findall(r'm\.impl\("(\w+)"', hosts)]
    missing = [op for op in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")]
    print(f"{len(ops)} ops implemented, {len(ops) - len(missing)} registered: {' '.join(ops)}")
    return 0 if ops and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
