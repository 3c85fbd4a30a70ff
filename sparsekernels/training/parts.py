"""The part of a selection that lies in a slice of its tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..index import Index

Source = tuple[slice, ...] | Tensor  # of a compact tensor: slices of its dimensions, or flat entries


def part_of_index(index: Index, dim: int, first: int, last: int) -> tuple[Index, Source]:
    """The selected positions within `first` to `last` of dimension `dim`, and where their values are.

    Rows and columns stay what they are where a slice has whole ones, or cuts all of them alike; blocks become elements.
    """
    sizes = list(index.shape)
    sizes[dim] = last - first
    shape = torch.Size(sizes)
    is_matrix, is_last = len(sizes) == 2, dim == len(sizes) - 1
    columns = index.granularity == "column" and is_matrix
    if columns and dim == 0:
        return Index.unchecked(index.positions, shape, "column"), (slice(first, last),)
    if index.granularity == "row" and is_last and dim > 0:
        return Index.unchecked(index.positions, shape, "row"), (slice(None), slice(first, last))
    place = None
    if not (index.granularity == "element" or columns or (index.granularity == "row" and dim == 0)):
        index, place = index.entries()
        place = place.to(index.positions.dtype)
    if dim > 0 and not columns:
        return _part_of_elements(index, place, shape, dim, first)
    units = 1 if columns else index.num_positions // max(1, index.shape[0])
    bounds = torch.tensor([first * units, last * units], device=index.positions.device)
    begin, end = torch.searchsorted(index.positions.long(), bounds).tolist()
    part = index.with_positions((index.positions[begin:end] - first * units).contiguous(), shape)
    if place is not None:
        return part, place[begin:end].clone()
    return part, (slice(None), slice(begin, end)) if columns else (slice(begin, end),)


def _part_of_elements(
    index: Index, place: Tensor | None, shape: torch.Size, dim: int, first: int
) -> tuple[Index, Tensor]:
    inner, size = shape[dim + 1 :].numel(), index.shape[dim]
    offsets = index.positions.long()
    along = offsets // inner % size - first
    within = ((along >= 0) & (along < shape[dim])).nonzero().reshape(-1)
    offsets, along = offsets[within], along[within]
    local = (offsets // (inner * size) * shape[dim] + along) * inner + offsets % inner
    part = index.with_positions(local.to(index.positions.dtype), shape)
    return part, within.to(index.positions.dtype) if place is None else place[within]


def taken(whole: Tensor, source: Source) -> Tensor:
    """What lies at `source` of a compact tensor."""
    return whole.reshape(-1)[source] if isinstance(source, Tensor) else whole[source]


def put(whole: Tensor, source: Source, values: Tensor) -> None:
    """Write what lies at `source` of a compact tensor."""
    if isinstance(source, Tensor):
        whole.view(-1)[source] = values.reshape(-1)
    else:
        whole[source] = values.view(whole[source].shape)
