"""The narrow activations of layers that lost rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, select
from ..common.arguments import by_rows, check_floating, packed


def take_columns(x: Tensor, columns: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Read the selected columns of every row into a narrower tensor.

    Equivalent to `x[..., columns]`.

    Args:
        x ([..., N], fp32, fp64, bf16, fp16): not changed. Rows may lie further apart than N.
        columns ([C], int32 or int64): sorted, unique, in [0, N). The CPU kernel refuses others; a GPU's does not look.

    Returns:
        ([..., C], dtype of x), contiguous.

    Numerics: bits move unchanged. Deterministic.
    Cost: one read of x, one write of the result; without AVX-512, of x the lines that hold selected columns.

    Raises:
        ValueError: x has no columns dimension, or dtypes, devices or, on the CPU, the ends of columns do not fit.
    """
    _check_columns(x, columns, x.shape[-1] if x.dim() else 0)
    run = select("take_columns", x.device.type, backend)
    return run(_rows_of(x), packed(columns)).view(*x.shape[:-1], columns.shape[0])


def put_columns(x: Tensor, columns: Tensor, width: int, *, backend: Backend | None = None) -> Tensor:
    """Spread the columns of x over rows of `width`, with zeros between them: the inverse of take_columns.

    Equivalent to `out = x.new_zeros(*x.shape[:-1], width); out[..., columns] = x`.

    Args:
        x ([..., C], fp32, fp64, bf16, fp16): not changed. Rows may lie further apart than C.
        columns ([C], int32 or int64): sorted, unique, in [0, width); where each column of x goes. The CPU kernel
            refuses others; a GPU's does not look.
        width: columns of the result.

    Returns:
        ([..., width], dtype of x), contiguous.

    Numerics: bits move unchanged. Deterministic.
    Cost: one read of x, one write of the result, zeros included: there is no pass that fills them in before.

    Raises:
        ValueError: x has no columns dimension or not one for each of columns, or dtypes, devices or, on the CPU, the
            ends of columns do not fit.
    """
    _check_columns(x, columns, width)
    if x.shape[-1] != columns.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} columns, columns says where {columns.shape[0]} go: they must agree")
    run = select("put_columns", x.device.type, backend)
    return run(_rows_of(x), packed(columns), width).view(*x.shape[:-1], width)


def _rows_of(x: Tensor) -> Tensor:
    """As a matrix, in place where rows are evenly spaced."""
    return by_rows(x[None] if x.dim() == 1 else x.flatten(0, -2))


def _check_columns(x: Tensor, columns: Tensor, width: int) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, that of its columns")
    if columns.dtype not in (torch.int32, torch.int64) or columns.dim() != 1:
        raise ValueError(
            f"columns must be int32 or int64 of one dimension, got {columns.dtype} of {list(columns.shape)}"
        )
    if columns.device != x.device:
        raise ValueError(f"columns is on {columns.device}, expected {x.device}; pass columns.to({str(x.device)!r})")
    if width < 0:
        raise ValueError(f"width must be at least 0, got {width}")
    if columns.device.type == "cpu" and columns.shape[0] and not torch.compiler.is_compiling():
        first, last = int(columns[0]), int(columns[-1])
        if first < 0 or last >= width:
            raise ValueError(f"columns must be sorted and lie in [0, {width}), got {first} to {last}")
