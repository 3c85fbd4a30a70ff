"""Gather and scatter at the positions of an Index."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import Index
from ..backend import Backend, select


def gather(source: Tensor, index: Index, *, backend: Backend | None = None) -> Tensor:
    """Read the selected elements, rows, columns or blocks of `source` into a new compact tensor.

    Equivalent to `source.reshape(-1)[index.positions]` for elements, `source[index.positions]` for rows of a matrix and
    `source[:, index.positions]` for columns; of blocks, what an edge of the matrix cuts off is zero.

    Args:
        source (index.shape, any dtype): contiguous; not changed.
        index: positions on the device of `source`.

    Returns:
        (index.compact_shape, dtype of source).

    Numerics: exact copies. Deterministic.
    Cost: reads the positions and one 64-byte line per scattered element (of columns, of as many as share one), writes
    index.numel * itemsize.

    Raises:
        ValueError: source has another shape or device than the index, or is not contiguous.

    Source: ours.

    Examples:
        >>> sk.ops.gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), sk.Index(torch.tensor([0, 3]), (2, 2)))
        tensor([1., 4.])
    """
    _check("source", source, index)
    return index.shaped(select("gather", source.device.type, backend)(source, index.positions, index.tile))


def scatter_(target: Tensor, index: Index, values: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Overwrite the selected elements, rows, columns or blocks of `target`; everything else keeps its bits.

    Equivalent to `target.view(-1)[index.positions] = values.to(target.dtype)` for elements; see `gather`.

    Args:
        target (index.shape, floating): contiguous; changed in place.
        index: positions on the device of `target`.
        values (index.compact_shape, floating): cast to the dtype of target, rounding to nearest even; not changed.

    Returns:
        target.

    Numerics: rounded once. Deterministic.
    Cost: as `gather`, with each touched line read and written.

    Raises:
        ValueError: shapes, devices or contiguity do not fit, or target requires grad; nothing is written then.

    Source: ours.

    Examples:
        >>> index = sk.Index(torch.tensor([0, 3]), (2, 2))
        >>> sk.ops.scatter_(torch.zeros(2, 2), index, torch.tensor([1.0, 4.0]))
        tensor([[1., 0.],
                [0., 4.]])
    """
    _check("target", target, index)
    _check_values(values, target, index)
    values = values.detach().to(target.dtype).contiguous()
    select("scatter_", target.device.type, backend)(target.detach(), index.positions, values, index.tile)
    torch.autograd.graph.increment_version(target)
    return target


def _check(name: str, tensor: Tensor, index: Index) -> None:
    if tensor.shape != index.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, the index was made for {list(index.shape)}")
    if tensor.device != index.positions.device:
        raise ValueError(f"{name} is on {tensor.device}, the index on {index.positions.device}; use index.to(device)")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous (offsets are row-major), got strides {tensor.stride()}")


def _check_values(values: Tensor, target: Tensor, index: Index) -> None:
    if values.shape != index.compact_shape:
        raise ValueError(f"values must have shape {list(index.compact_shape)}, got {list(values.shape)}")
    if values.device != target.device:
        raise ValueError(f"values are on {values.device}, target on {target.device}")
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError("target requires grad, but autograd does not record this write; use no_grad() or detach()")
