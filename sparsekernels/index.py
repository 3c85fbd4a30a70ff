"""Index: positions in one tensor, validated when it is made; it never changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Index:
    """Sorted unique positions in one tensor.

    Args:
        positions ([K], int32 or int64): strictly ascending; row numbers of dimension 0 where `rows` is true, else flat
            row-major offsets. Stored as int32 where every offset of the tensor fits.
        shape: shape of the tensor that is indexed.
        rows: whole rows (True) or single elements (False).

    Raises:
        TypeError: positions are not an integer tensor. ValueError: not one-dimensional, out of range, unsorted or
            duplicated; the first offending entry is named.
    """

    __slots__ = ("positions", "rows", "shape")

    def __init__(self, positions: Tensor, shape: Iterable[int], rows: bool = False) -> None:
        self.shape = torch.Size(shape)
        if any(size < 0 for size in self.shape) or math.prod(max(size, 1) for size in self.shape) >= 2**63:
            raise ValueError(f"shape must be that of a tensor, with fewer than 2^63 elements, got {list(self.shape)}")
        self.rows = bool(rows)
        self.positions = _validated(positions, self.num_positions, self.rows)

    @property
    def num_positions(self) -> int:
        """Positions are below this: rows, or elements, of the tensor."""
        if not self.rows:
            return self.shape.numel()
        if not self.shape:
            raise ValueError("rows=True needs a tensor with at least one dimension; shape is ()")
        return self.shape[0]

    @property
    def elements_per_position(self) -> int:
        """Elements that one position stands for."""
        return self.shape[1:].numel() if self.rows else 1

    @property
    def numel(self) -> int:
        """Selected elements."""
        return len(self) * self.elements_per_position

    @property
    def compact_shape(self) -> torch.Size:
        """Shape of the compact tensor that holds the selected values: [K], or [R, *shape[1:]] for rows."""
        return torch.Size((len(self), *self.shape[1:])) if self.rows else torch.Size((len(self),))

    @classmethod
    def full(cls, shape: Iterable[int]) -> Index:
        """Every row of a tensor: how a dense head is written."""
        shape = torch.Size(shape)
        return cls(torch.arange(shape[0] if shape else 1), shape, rows=bool(shape))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Index:
        """The elements where a boolean mask of the tensor's shape is true."""
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        return cls(mask.reshape(-1).nonzero().reshape(-1), mask.shape)

    def to(self, device: torch.device | str) -> Index:
        """The same Index with its positions on `device`."""
        return Index.unchecked(self.positions.to(device), self.shape, self.rows)

    def to_elements(self) -> Index:
        """The same set, written element by element."""
        if not self.rows:
            return self
        starts = self.positions.long()[:, None] * self.elements_per_position
        flat = (starts + torch.arange(self.elements_per_position, device=starts.device)).reshape(-1)
        return Index.unchecked(flat.to(_dtype_for(self.shape.numel())), self.shape, False)

    @staticmethod
    def unchecked(positions: Tensor, shape: torch.Size, rows: bool) -> Index:
        """An Index around positions that come out of one: nothing is checked."""
        index = object.__new__(Index)
        index.positions, index.shape, index.rows = positions, shape, rows
        return index

    def __len__(self) -> int:
        return self.positions.shape[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.rows == other.rows
            and torch.equal(self.positions, other.positions.to(self.positions.device))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = "rows" if self.rows else "elements"
        return f"Index({len(self)} {kind} of {list(self.shape)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["positions"], state["shape"], state["rows"])  # type: ignore[misc]


def _dtype_for(limit: int) -> torch.dtype:
    return torch.int32 if limit <= 2**31 - 1 else torch.int64


def _validated(positions: Tensor, limit: int, rows: bool) -> Tensor:
    what = "row" if rows else "element"
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be an int32 or int64 tensor, got {got}")
    if positions.dim() != 1:
        raise ValueError(f"positions must have one dimension, got shape {list(positions.shape)}")
    if positions.numel():
        wrong = positions[1:] <= positions[:-1]
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            problem = "duplicated" if positions[at] == positions[at + 1] else "not sorted"
            raise ValueError(
                f"positions must be sorted and unique: {what} {int(positions[at + 1])} at entry {at + 1} is {problem}; "
                "pass positions.unique()"
            )
        first, last = int(positions[0]), int(positions[-1])
        if first < 0 or last >= limit:
            raise ValueError(f"positions must lie in [0, {limit}), got {what} {first if first < 0 else last}")
    return positions.to(_dtype_for(limit), copy=True).contiguous()


torch.serialization.add_safe_globals([Index])
