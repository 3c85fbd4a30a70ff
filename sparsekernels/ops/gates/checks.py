"""Argument checks of this family's public functions, done once for all backends."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..common.arguments import check_floating

Kind = Literal["stg", "finegates", "hard_concrete"]
KINDS = get_args(Kind)


def check_noise(kind: str, noise: float, key: Tensor | None, stream: int, device: torch.device) -> int:
    """Check the arguments of a draw; returns the ops' number of the kind."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if not 0 < noise < float("inf"):
        raise ValueError(f"noise must be a finite number above 0, got {noise}; for no noise leave key at None")
    if key is not None and (key.dtype != torch.int64 or key.shape != (1,) or key.device != device):
        raise ValueError(
            f"key must be int64 of shape [1] on {device}, got {key.dtype} of {list(key.shape)} on {key.device}; "
            "torch.randint(2**62, (1,), device=...) makes one"
        )
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must lie in [0, 2**32), got {stream}")
    return KINDS.index(kind)


def check_logits(name: str, x: Tensor, size: int | None = None, group: int = 1, of: str = "") -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be fp32 or fp64, got {x.dtype}; gates are kept in full precision")
    if x.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(x.shape)}")
    if size is not None and x.shape[0] * group != size:
        raise ValueError(
            f"{name} has {x.shape[0]} gates of {group} each for {size}, {of}; "
            + (f"expected {size // group}" if size % group == 0 else f"{group} does not divide {size}")
        )


def check_group(name: str, group: int) -> None:
    if group < 1:
        raise ValueError(f"{name} must be at least 1, got {group}")


def check_matrix(name: str, x: Tensor) -> None:
    check_floating(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {list(x.shape)}")


def check_like(name: str, x: Tensor, dtype: torch.dtype, other: Tensor, other_name: str) -> None:
    if x.dtype != dtype or x.device != other.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, expected {dtype} on {other.device} to go with {other_name} of "
            f"{other.dtype}; pass {name}.to({str(other.device)!r}, {dtype})"
        )
