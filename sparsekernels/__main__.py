"""`python -m sparsekernels`: every op, what serves it here, and why something else does not."""

from __future__ import annotations

import platform

import torch

from . import __version__
from .ops import OPS
from .ops.backend import build_facts, serving, why_not


def main() -> None:
    devices = ["cpu", "cuda"]
    print(f"sparsekernels {__version__}, torch {torch.__version__}, python {platform.python_version()}")
    width = 2 + max(len(op.name) for op in OPS)
    print(f"{'op':<{width}}{'cpu':<12}{'cuda':<12}what it does")
    for op in OPS:
        served = "".join(f"{serving(op.name, device) if usable(device) else '-':<12}" for device in devices)
        print(f"{op.name:<{width}}{served}{op.doc}")
    print()
    for device in devices:
        fact = build_facts().get(device, {})
        if fact.get("built"):
            print(f"{device} library: {fact['reason']}")
        reasons = {why_not(op.name, "native", device) for op in OPS} - {None}
        for reason in sorted(str(reason) for reason in reasons):
            print(f"no native kernels on {device}: {reason}")
        missing = why_not(OPS[0].name, "triton", device)
        print(f"no Triton on {device}: {missing}" if missing else f"Triton on {device}: available")


def usable(device: str) -> bool:
    """Whether tensors can live on `device` in this process."""
    return device == "cpu" or torch.cuda.is_available()


if __name__ == "__main__":
    main()
