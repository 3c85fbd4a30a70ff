"""What training costs in bytes: the peak of a process, and the tensors that exist beside the model."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .methods import Prepared


class PeakMemory:
    """Bytes in use at the highest point since `start`, above what was in use then."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def start(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(AttributeError):  # glibc: give back what earlier runs have freed
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # Linux: make the kernel forget the peak of loading the model
            Path("/proc/self/clear_refs").write_text("5")
        self.base = self._status("VmRSS") or self._max_rss()

    def read(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.base
        return (self._status("VmHWM") or self._max_rss()) - self.base

    @staticmethod
    def _status(key: str) -> int:
        path = Path("/proc/self/status")
        lines = path.read_text().splitlines() if path.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)

    @staticmethod
    def _max_rss() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def nbytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def count_bytes(prepared: Prepared) -> dict[str, int]:
    """Bytes that training holds beside the model itself, counted from the tensors that exist right after a step.

    "trained": gradients and optimizer state, and for a sparse method the fp32 master values, the positions and the
    originals kept for an exact restore. "head": the same for the head that LoRA or a sparse method trains densely.
    """
    counts = {"gradients": 0, "optimizer_state": 0, "method": prepared.extra_bytes(head=False), "trained": 0, "head": 0}
    for name, parameter in prepared.parameters.items():
        gradient = 0 if parameter.grad is None else nbytes([parameter.grad])
        state = nbytes(prepared.optimizer.state[parameter].values())
        if prepared.head_apart and name in prepared.head:
            counts["head"] += gradient + state
        else:
            counts["gradients"] += gradient
            counts["optimizer_state"] += state
    counts["head"] += prepared.extra_bytes(head=True)
    counts["trained"] = counts["gradients"] + counts["optimizer_state"] + counts["method"]
    return counts
