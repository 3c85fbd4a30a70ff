"""Index: positions in one tensor, validated when it is made; it never changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Index:
    """Sorted unique positions in one tensor: whole rows or single elements. Immutable.

    Args:
        positions ([K], int32 or int64): strictly ascending; row numbers of dimension 0 if `rows` is true, else flat
            row-major offsets. Copied; stored as int32 where every offset of the tensor fits.
        shape: shape of the indexed tensor.
        rows: whole rows (True) or single elements (False).

    Attributes:
        positions, shape, rows: as above.

    Raises:
        TypeError: positions is not an int32 or int64 tensor.
        ValueError: positions are not one-dimensional, out of range, unsorted or duplicated (the message names the first
            bad entry); shape is negative or has 2^63 elements or more.

    Source: ours.

    Examples:
        >>> index = sk.Index(torch.tensor([1, 4]), shape=(2, 3))
        >>> index, index.numel, index.num_positions, index.compact_shape
        (Index(2 elements of [2, 3]), 2, 6, torch.Size([2]))
        >>> rows = sk.Index(torch.tensor([1]), shape=(2, 3), rows=True)
        >>> rows, rows.numel, rows.num_positions, rows.elements_per_position, rows.compact_shape
        (Index(1 rows of [2, 3]), 3, 2, 3, torch.Size([1, 3]))
        >>> rows.to_elements().positions
        tensor([3, 4, 5], dtype=torch.int32)
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
        """Number of possible positions: rows or elements of the tensor. Raises ValueError for rows of a 0-d tensor."""
        if not self.rows:
            return self.shape.numel()
        if not self.shape:
            raise ValueError("rows=True needs a tensor with at least one dimension; shape is ()")
        return self.shape[0]

    @property
    def elements_per_position(self) -> int:
        """Elements per position: 1, or the size of a row."""
        return self.shape[1:].numel() if self.rows else 1

    @property
    def numel(self) -> int:
        """Number of selected elements."""
        return len(self) * self.elements_per_position

    @property
    def compact_shape(self) -> torch.Size:
        """Shape of the compact tensor of selected values: [K], or [R, *shape[1:]] for R rows."""
        return torch.Size((len(self), *self.shape[1:])) if self.rows else torch.Size((len(self),))

    @classmethod
    def full(cls, shape: Iterable[int]) -> Index:
        """Select every row of a tensor of this shape, as for a densely trained head.

        Examples:
            >>> sk.Index.full((2, 3))
            Index(2 rows of [2, 3])
        """
        shape = torch.Size(shape)
        return cls(torch.arange(shape[0] if shape else 1), shape, rows=bool(shape))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Index:
        """Select the elements where a boolean mask of the tensor's shape is true. Raises TypeError for other dtypes.

        Examples:
            >>> sk.Index.from_mask(torch.tensor([[True, False], [False, True]])).positions
            tensor([0, 3], dtype=torch.int32)
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        return cls(mask.reshape(-1).nonzero().reshape(-1), mask.shape)

    def to(self, device: torch.device | str) -> Index:
        """Return an equal Index with its positions on `device`.

        Examples:
            >>> sk.Index.full((2, 3)).to("cpu")
            Index(2 rows of [2, 3])
        """
        return Index.unchecked(self.positions.to(device), self.shape, self.rows)

    def to_elements(self) -> Index:
        """Return the same set with one position per element."""
        if not self.rows:
            return self
        starts = self.positions.long()[:, None] * self.elements_per_position
        flat = (starts + torch.arange(self.elements_per_position, device=starts.device)).reshape(-1)
        return Index.unchecked(flat.to(_dtype_for(self.shape.numel())), self.shape, False)

    @staticmethod
    def unchecked(positions: Tensor, shape: torch.Size, rows: bool) -> Index:
        """Build an Index from positions that are known to be valid, without checking them."""
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
