"""Columns taken and put in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    return x.index_select(1, columns)


def put_columns(x: Tensor, columns: Tensor, width: int) -> Tensor:
    out = x.new_zeros((x.shape[0], width))
    out[:, columns.long()] = x
    return out


def take_columns_fake(x: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], columns.shape[0]))


def put_columns_fake(x: Tensor, columns: Tensor, width: int) -> Tensor:
    return x.new_empty((x.shape[0], width))
