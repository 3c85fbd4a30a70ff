"""The part of a selection that lies in one or several slices of its tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..index import Index

Source = tuple[slice, ...] | Tensor  # of a compact tensor: slices of its dimensions, or flat entries
Ranges = Sequence[tuple[int, int]]  # first and last entry of each slice of a dimension, in ascending order


def part_of_index(index: Index, dim: int, ranges: Ranges) -> tuple[Index, Source]:
    """The selected positions within these slices of dimension `dim`, put together, and where their values are.

    Rows and columns stay what they are where one slice has whole ones, or cuts all of them alike; blocks, and whatever
    lies in several slices, become elements.
    """
    sizes = list(index.shape)
    sizes[dim] = sum(last - first for first, last in ranges)
    shape = torch.Size(sizes)
    if len(ranges) > 1:
        return _part_of_elements(*_elements(index), shape, dim, ranges)
    ((first, last),) = ranges
    is_matrix, is_last = len(sizes) == 2, dim == len(sizes) - 1
    columns = index.granularity == "column" and is_matrix
    if columns and dim == 0:
        return Index.unchecked(index.positions, shape, "column"), (slice(first, last),)
    if index.granularity == "row" and is_last and dim > 0:
        return Index.unchecked(index.positions, shape, "row"), (slice(None), slice(first, last))
    place = None
    if not (columns or (index.granularity == "row" and dim == 0)):
        index, place = _elements(index)
    if dim > 0 and not columns:
        return _part_of_elements(index, place, shape, dim, ranges)
    units = 1 if columns else index.num_positions // max(1, index.shape[0])
    bounds = torch.tensor([first * units, last * units], device=index.positions.device)
    begin, end = torch.searchsorted(index.positions.long(), bounds).tolist()
    part = index.with_positions((index.positions[begin:end] - first * units).contiguous(), shape)
    if place is not None:
        return part, place[begin:end].clone()
    return part, (slice(None), slice(begin, end)) if columns else (slice(begin, end),)


def _elements(index: Index) -> tuple[Index, Tensor | None]:
    """The elements of an index, and where each one's value is: None if it selects elements already."""
    if index.granularity == "element":
        return index, None
    elements, place = index.entries()
    return elements, place.to(elements.positions.dtype)


def within_ranges(along: Tensor, ranges: Ranges) -> Tensor:
    """Coordinates along a dimension as those in the slices put together; -1 for what lies in none of them."""
    found, before = torch.full_like(along, -1), 0
    for first, last in ranges:
        found = torch.where((along >= first) & (along < last), along - first + before, found)
        before += last - first
    return found


def _part_of_elements(
    index: Index, place: Tensor | None, shape: torch.Size, dim: int, ranges: Ranges
) -> tuple[Index, Tensor]:
    inner, size = shape[dim + 1 :].numel(), index.shape[dim]
    offsets = index.positions.long()
    along = within_ranges(offsets // inner % size, ranges)
    within = (along >= 0).nonzero().reshape(-1)
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
