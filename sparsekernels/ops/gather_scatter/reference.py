"""Gather and scatter at selected positions, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

from torch import Tensor


def gather(source: Tensor, positions: Tensor, rows: bool) -> Tensor:
    return (source if rows else source.reshape(-1)).index_select(0, positions)


def scatter_(target: Tensor, positions: Tensor, values: Tensor, rows: bool) -> None:
    (target if rows else target.view(-1)).index_copy_(0, positions.long(), values.to(target.dtype))


def gather_fake(source: Tensor, positions: Tensor, rows: bool) -> Tensor:
    return source.new_empty((positions.shape[0], *(source.shape[1:] if rows else ())))
