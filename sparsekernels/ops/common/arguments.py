"""Argument handling shared by the public functions of several families."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be fp32, fp64, bf16 or fp16, got {x.dtype}")


def packed(x: Tensor) -> Tensor:
    """Contiguous and detached: logits and weights may require grad."""
    return x.detach().contiguous()


def by_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half-precision activations, else their own dtype."""
    return torch.promote_types(dtype, torch.float32)
