"""Where selected entries lie: one addressing rule for single elements, rows, columns and blocks.

The last two dimensions of a tensor are matrices of m x n; a vector is one of m x 1, so that its rows are its elements.
Tiles of height x width cover each matrix, row by row; tiles at the lower and right edges may be cut. A position is the
number of a tile, and a unit is what is in it: 1 x 1 is an element, 1 x n a row, m x 1 a column, anything else a block.

A compact tensor has one tile after another, [count, height, width], with zeros in what is cut off. Columns lie side by
side instead, [m, count], as in the matrix itself.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Granularity = Literal["element", "row", "column", "block"]
Tile = tuple[int, int]  # height and width


def matrix_of(shape: torch.Size) -> tuple[int, int]:
    """m and n."""
    if len(shape) >= 2:
        return shape[-2], shape[-1]
    return (shape[0] if shape else 1), 1


def tile_of(shape: torch.Size, granularity: Granularity, block: Tile | None) -> Tile:
    """The tile of a granularity in a tensor of this shape. Raises ValueError if the two do not fit."""
    if granularity not in get_args(Granularity):
        raise ValueError(f'granularity must be "element", "row", "column" or "block", got {granularity!r}')
    if (block is not None) != (granularity == "block"):
        raise ValueError(f'block is the shape of a unit for granularity="block", got {block} for {granularity!r}')
    m, n = matrix_of(shape)
    if granularity == "element":
        return 1, 1
    if not shape:
        raise ValueError(f'a tensor of shape () has no {granularity}s; use granularity="element"')
    if granularity == "row":
        return 1, n
    if len(shape) < 2:
        raise ValueError(f'a tensor of shape {list(shape)} has no {granularity}s; use granularity="row"')
    if granularity == "column":
        return m, 1
    assert block is not None
    if not isinstance(block, (tuple, list)) or len(block) != 2 or any(type(x) is not int or x < 1 for x in block):
        raise ValueError(f"block must be the height and width of a unit, two positive integers, got {block!r}")
    return min(block[0], m), min(block[1], n)


def name_of(shape: torch.Size, tile: Tile) -> Granularity:
    """The granularity that a tile has; a block that is a whole row, column or element is one."""
    m, n = matrix_of(shape)
    if tile == (1, 1) and (m, n) != (1, 1):
        return "element"
    return "row" if tile == (1, n) else "column" if tile == (m, 1) else "block"


def tiles_of(shape: torch.Size, tile: Tile) -> tuple[int, int]:
    """The number of tiles down and across a matrix."""
    down, across = (-(-size // of) if of else 1 for size, of in zip(matrix_of(shape), tile, strict=True))
    return down, across


def num_units(shape: torch.Size, tile: Tile) -> int:
    """The number of units of a tensor, that of its possible positions."""
    return math.prod(shape[:-2]) * math.prod(tiles_of(shape, tile))


def side_by_side(shape: torch.Size, tile: Tile) -> bool:
    """Whether units are columns, of which a compact tensor has one beside another."""
    return tile[1] == 1 < tile[0] == matrix_of(shape)[0]


def is_cut(shape: torch.Size, tile: Tile) -> bool:
    """Whether some tiles stick out of their matrix."""
    return any(of and size % of for size, of in zip(matrix_of(shape), tile, strict=True))


def places_of(positions: Tensor, shape: torch.Size, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix of each unit, and which tile it is there, down and across: [K] each."""
    down, across = tiles_of(shape, tile)
    unit = positions.long()
    in_matrix = unit % (down * across)
    return unit // (down * across), in_matrix // across, in_matrix % across


def sizes_of(positions: Tensor, shape: torch.Size, tile: Tile) -> tuple[Tensor, Tensor]:
    """Rows and columns of each unit, [K] each: those of the tile unless it is cut."""
    _, down, across = places_of(positions, shape, tile)
    m, n = matrix_of(shape)
    return (m - down * tile[0]).clamp_(max=tile[0]), (n - across * tile[1]).clamp_(max=tile[1])


def tiled(x: Tensor, tile: Tile, pad: bool | float = 0) -> Tensor:
    """A tensor by units, [number of units, height, width]; what is cut off is `pad`."""
    m, n = matrix_of(x.shape)
    height, width = tile
    down, across = tiles_of(x.shape, tile)
    matrices = x.reshape(math.prod(x.shape[:-2]), m, n)
    if is_cut(x.shape, tile):
        matrices = F.pad(matrices, (0, -n % width, 0, -m % height), value=pad)
    return matrices.view(-1, down, height, across, width).transpose(2, 3).flatten(0, 2)


def offsets_of(positions: Tensor, shape: torch.Size, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """The row-major offset of each entry of the compact tensor, flat; and which of them exist, None for all.

    Where an entry does not exist, its offset is that of the first of its unit.
    """
    if tuple(tile) == (1, 1):
        return positions.long(), None
    m, n = matrix_of(shape)
    height, width = tile
    matrix, i, j = places_of(positions, shape, tile)
    i, j = i * height, j * width
    first = (matrix * m + i) * n + j
    rows, columns = torch.arange(height, device=first.device), torch.arange(width, device=first.device)
    if side_by_side(shape, tile):
        return (first + (rows * n)[:, None]).reshape(-1), None
    inner = (rows * n)[:, None] + columns
    if not is_cut(shape, tile):
        return (first[:, None, None] + inner).reshape(-1), None
    exists = (i[:, None, None] + rows[:, None] < m) & (j[:, None, None] + columns < n)
    return (first[:, None, None] + inner * exists).reshape(-1), exists.reshape(-1)
