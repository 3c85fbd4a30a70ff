"""Index: positions in one tensor, validated when it is made; it never changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .common.units import (
    Granularity,
    Tile,
    is_cut,
    matrix_of,
    name_of,
    num_units,
    offsets_of,
    sizes_of,
    tile_of,
    tiled,
)


class Index:
    """Sorted unique positions in one tensor: single elements, rows, columns or blocks of it. Immutable.

    Units lie in the matrices that the last two dimensions make, [..., M, N]: of 3-D expert weights, a row, column or
    block belongs to one expert. Blocks tile each matrix; those at its lower and right edges may be smaller. The rows of
    a vector are its elements; it has no columns and no blocks.

    Args:
        positions ([K], int32 or int64): strictly ascending numbers of units, counted row by row, then from matrix to
            matrix: flat row-major offsets of elements, numbers of rows or of columns, or of blocks. Copied; stored as
            int32 where the tensor has fewer than 2^31 units.
        shape: shape of the indexed tensor.
        granularity: "element", "row", "column" or "block".
        block: height and width of a block; for granularity="block" alone. A block that covers a whole row, column or
            element becomes one.

    Attributes:
        positions, shape, granularity, block: as above.

    Raises:
        TypeError: positions is not an int32 or int64 tensor.
        ValueError: positions are not one-dimensional, out of range, unsorted or duplicated (the message names the first
            bad entry); shape is negative or has 2^63 elements or more; the tensor has no units of this granularity.

    Source: ours.

    Examples:
        >>> index = sk.Index(torch.tensor([1, 4]), shape=(2, 3))
        >>> index, index.numel, index.num_positions, index.compact_shape
        (Index(2 elements of [2, 3]), 2, 6, torch.Size([2]))
        >>> columns = sk.Index(torch.tensor([1]), shape=(2, 3), granularity="column")
        >>> columns, columns.numel, columns.num_positions, columns.elements_per_position, columns.compact_shape
        (Index(1 columns of [2, 3]), 2, 3, 2, torch.Size([2, 1]))
        >>> columns.to_elements().positions
        tensor([1, 4], dtype=torch.int32)
        >>> sk.Index(torch.tensor([0, 3]), shape=(6, 5), granularity="block", block=(4, 4))
        Index(2 blocks of 4 x 4 of [6, 5])
    """

    __slots__ = ("block", "granularity", "positions", "shape", "tile")

    def __init__(
        self,
        positions: Tensor,
        shape: Iterable[int],
        granularity: Granularity = "element",
        block: tuple[int, int] | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        if any(size < 0 for size in self.shape) or math.prod(max(size, 1) for size in self.shape) >= 2**63:
            raise ValueError(f"shape must be that of a tensor, with fewer than 2^63 elements, got {list(self.shape)}")
        self.tile = tile_of(self.shape, granularity, block)
        self.granularity = name_of(self.shape, self.tile) if granularity == "block" else granularity
        self.block = self.tile if self.granularity == "block" else None
        self.positions = _validated(positions, self.num_positions, self.granularity)

    @property
    def num_positions(self) -> int:
        """Number of possible positions: units of the tensor."""
        return num_units(self.shape, self.tile)

    @property
    def elements_per_position(self) -> int:
        """Elements per position: 1, or the size of a row, a column or a whole block."""
        return math.prod(self.tile)

    @property
    def numel(self) -> int:
        """Number of selected elements."""
        if not is_cut(self.shape, self.tile):
            return len(self) * self.elements_per_position
        rows, columns = sizes_of(self.positions, self.shape, self.tile)
        return int((rows * columns).sum())

    @property
    def compact_shape(self) -> torch.Size:
        """Shape of the compact tensor of selected values.

        [K] for elements, [R, N] for R rows, [M, C] for C columns, [K, height, width] for blocks, with zeros where a
        block is cut off at an edge.
        """
        count = len(self)
        if self.granularity == "element":
            return torch.Size((count,))
        if self.granularity == "row":
            return torch.Size((count, self.shape[-1]) if len(self.shape) > 1 else (count,))
        return torch.Size((self.tile[0], count) if self.granularity == "column" else (count, *self.tile))

    @classmethod
    def full(cls, shape: Iterable[int]) -> Index:
        """Select every row of a tensor of this shape, as for a densely trained head.

        Examples:
            >>> sk.Index.full((2, 3))
            Index(2 rows of [2, 3])
        """
        shape = torch.Size(shape)
        return cls(torch.arange(math.prod(shape[:-1] or shape)), shape, "row" if shape else "element")

    @classmethod
    def from_mask(
        cls, mask: Tensor, granularity: Granularity = "element", block: tuple[int, int] | None = None
    ) -> Index:
        """Select the elements where a boolean mask of the tensor's shape is true.

        Raises:
            TypeError: mask has another dtype. ValueError: it is true in only a part of a unit.

        Examples:
            >>> sk.Index.from_mask(torch.tensor([[True, False], [False, True]])).positions
            tensor([0, 3], dtype=torch.int32)
            >>> sk.Index.from_mask(torch.tensor([[True, False], [True, False]]), "column").positions
            tensor([0], dtype=torch.int32)
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        tile = tile_of(mask.shape, granularity, block)
        if granularity == "element":
            return cls(mask.reshape(-1).nonzero().reshape(-1), mask.shape)
        some = tiled(mask, tile, False).flatten(1).any(1)
        partly = some & ~tiled(mask, tile, True).flatten(1).all(1)
        if bool(partly.any()):
            at = int(partly.nonzero()[0])
            raise ValueError(f'mask is true in only a part of {granularity} {at}; use granularity="element"')
        return cls(some.nonzero().reshape(-1), mask.shape, granularity, block)

    def to(self, device: torch.device | str) -> Index:
        """Return an equal Index with its positions on `device`.

        Examples:
            >>> sk.Index.full((2, 3)).to("cpu")
            Index(2 rows of [2, 3])
        """
        return self.with_positions(self.positions.to(device))

    def to_elements(self) -> Index:
        """Return the same set with one position per element."""
        return self if self.granularity == "element" else self.entries()[0]

    def mask(self) -> Tensor:
        """Return a bool tensor of the indexed shape, true at the selected elements.

        Examples:
            >>> sk.Index(torch.tensor([1]), (2, 3), "row").mask()
            tensor([[False, False, False],
                    [ True,  True,  True]])
        """
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.positions.device)
        if self.tile == (1, matrix_of(self.shape)[1]):
            mask.view(self.num_positions, self.tile[1])[self.positions.long()] = True
        else:
            mask.view(-1)[offsets_of(self.positions, self.shape, self.tile)[0]] = True
        return mask

    def entries(self) -> tuple[Index, Tensor]:
        """The same set with one position per element, and where each of them lies in the compact tensor, flat."""
        offsets, exists = offsets_of(self.positions, self.shape, self.tile)
        place = torch.arange(len(offsets), device=offsets.device) if exists is None else exists.nonzero().reshape(-1)
        if exists is not None:
            offsets = offsets[exists]
        if self.tile[0] != 1:  # else they ascend already
            offsets, order = offsets.sort()
            place = place[order]
        dtype = dtype_for(self.shape.numel())
        return Index.unchecked(offsets.to(dtype), self.shape), place

    def shaped(self, flat: Tensor) -> Tensor:
        """The entries of a compact tensor, flat, in its shape."""
        return flat if self.granularity == "element" else flat.view(self.compact_shape)

    def without_padding(self, compact: Tensor) -> Tensor:
        """A compact tensor with zeros where a block is cut off."""
        exists = offsets_of(self.positions, self.shape, self.tile)[1] if is_cut(self.shape, self.tile) else None
        return compact if exists is None else compact.masked_fill(~exists.view(compact.shape), 0)

    def by_unit(self, compact: Tensor) -> Tensor:
        """A view of a compact tensor with units along its first dimension."""
        return compact.t() if self.granularity == "column" else compact

    def same_units(self, other: Index) -> bool:
        """Whether positions of both number the same units."""
        return self.shape == other.shape and self.tile == other.tile and self.granularity == other.granularity

    def with_positions(self, positions: Tensor, shape: torch.Size | None = None) -> Index:
        """An Index of the same units at other positions, or of a tensor of another shape, known to be valid."""
        index = object.__new__(Index)
        index.positions, index.shape, index.tile = positions, self.shape if shape is None else shape, self.tile
        index.granularity, index.block = self.granularity, self.block
        return index

    def at(self, positions: Tensor) -> Index:
        """This Index if these are its positions, else one at them: what a graph has saved may be a copy."""
        return self if positions is self.positions else self.with_positions(positions)

    @staticmethod
    def unchecked(
        positions: Tensor, shape: torch.Size, granularity: Granularity = "element", block: Tile | None = None
    ) -> Index:
        """Build an Index from positions that are known to be valid, without checking them."""
        index = object.__new__(Index)
        index.positions, index.shape, index.granularity, index.block = positions, shape, granularity, block
        index.tile = tile_of(shape, granularity, block)
        return index

    def __len__(self) -> int:
        return self.positions.shape[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        return self.same_units(other) and torch.equal(self.positions, other.positions.to(self.positions.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Index({len(self)} {self.unit_name()} of {list(self.shape)})"

    def unit_name(self) -> str:
        """What positions count, in the plural."""
        return f"blocks of {self.tile[0]} x {self.tile[1]}" if self.granularity == "block" else f"{self.granularity}s"

    def __getstate__(self) -> dict[str, Any]:
        return {"positions": self.positions, "shape": self.shape, "granularity": self.granularity, "block": self.block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "rows" in state:  # pickled before there were columns and blocks
            state = index_of(state["positions"], state).__getstate__()
        self.__init__(**state)  # type: ignore[misc]


# What a file says of an Index beside its positions; files written before there were columns and blocks say the latter.
KIND = {"shape": [int], "granularity": str, "block": (type(None), [int])}
OLD_KIND = {"shape": [int], "rows": bool}


def kind_of(index: Index) -> dict[str, Any]:
    """What a file says of an Index."""
    return {"shape": list(index.shape), "granularity": index.granularity, "block": index.block and list(index.block)}


def index_of(positions: Tensor, kind: Mapping[str, Any]) -> Index:
    """The Index of which a file says this."""
    shape = torch.Size(kind["shape"])
    if "rows" in kind:
        if kind["rows"] and len(shape) > 2:  # slices of the first dimension, each of which is some rows now
            each = math.prod(shape[1:-1])
            if len(positions) * each > 2**28:
                raise ValueError(f"{len(positions)} slices of {list(shape)} have too many rows")
            positions = (positions.long()[:, None] * each + torch.arange(each)).reshape(-1)
        return Index(positions, shape, "row" if kind["rows"] else "element")
    return Index(positions, shape, kind["granularity"], None if kind["block"] is None else tuple(kind["block"]))


def dtype_for(limit: int) -> torch.dtype:
    return torch.int32 if limit <= 2**31 - 1 else torch.int64


def _validated(positions: Tensor, limit: int, granularity: Granularity) -> Tensor:
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
                f"positions must be sorted and unique: {granularity} {int(positions[at + 1])} at entry {at + 1} is "
                f"{problem}; pass positions.unique()"
            )
        first, last = int(positions[0]), int(positions[-1])
        if first < 0 or last >= limit:
            raise ValueError(f"positions must lie in [0, {limit}), got {granularity} {first if first < 0 else last}")
    return positions.to(dtype_for(limit), copy=True).contiguous()


torch.serialization.add_safe_globals([Index])
