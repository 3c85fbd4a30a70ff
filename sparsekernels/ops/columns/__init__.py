"""Gather and scatter of columns: the activations of layers that lost rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, select
from ..common.arguments import by_rows, check_floating, packed


def take_columns(x: Tensor, columns: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Read the selected columns of every row into a narrower tensor; x is not changed.

    Equivalent to `x[..., columns]`.

    Args:
        x ([..., N], fp32, fp64, bf16, fp16): not changed. Only its columns must be contiguous: the row stride may
            exceed N.
        columns ([C], int32 or int64): sorted, unique, in [0, N). The CPU kernel raises for others; on a GPU they are
            not checked.

    Returns:
        ([..., C], dtype of x), contiguous.

    Numerics: bits are copied. Deterministic.
    Cost: one read of x, one write of the result; without AVX-512, only the cache lines of x with selected columns.

    Raises:
        ValueError: x has no dimension, or dtypes, devices or (on the CPU) the first and last of columns do not fit.

    Source: ours.

    Examples:
        >>> sk.ops.take_columns(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([0, 2]))
        tensor([[1., 3.],
                [4., 6.]])
    """
    _check_columns(x, columns, x.shape[-1] if x.dim() else 0)
    run = select("take_columns", x.device.type, backend)
    return run(_rows_of(x), packed(columns)).view(*x.shape[:-1], columns.shape[0])


def put_columns(x: Tensor, columns: Tensor, width: int, *, backend: Backend | None = None) -> Tensor:
    """Spread the columns of x over rows of `width`, with zeros between them: the inverse of take_columns.

    Equivalent to `out = x.new_zeros(*x.shape[:-1], width); out[..., columns] = x`.

    Args:
        x ([..., C], fp32, fp64, bf16, fp16): not changed. Only its columns must be contiguous: the row stride may
            exceed C.
        columns ([C], int32 or int64): destination of each column of x; sorted, unique, in [0, width). The CPU kernel
            raises for others; on a GPU they are not checked.
        width: number of columns of the result.

    Returns:
        ([..., width], dtype of x), contiguous.

    Numerics: bits are copied. Deterministic.
    Cost: one read of x, one write of the result, zeros included: there is no separate pass to fill them in.

    Raises:
        ValueError: x has no dimension or another number of columns than `columns`, or dtypes, devices or (on the CPU)
            the first and last of columns do not fit.

    Source: ours.

    Examples:
        >>> sk.ops.put_columns(torch.tensor([[1.0, 3.0]]), torch.tensor([0, 2]), width=4)
        tensor([[1., 0., 3., 0.]])
    """
    _check_columns(x, columns, width)
    if x.shape[-1] != columns.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} columns, but columns has {columns.shape[0]} entries: they must agree")
    run = select("put_columns", x.device.type, backend)
    return run(_rows_of(x), packed(columns), width).view(*x.shape[:-1], width)


def _rows_of(x: Tensor) -> Tensor:
    """As a matrix, in place where rows are evenly spaced."""
    return by_rows(x[None] if x.dim() == 1 else x.flatten(0, -2))


def _check_columns(x: Tensor, columns: Tensor, width: int) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, its columns")
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
