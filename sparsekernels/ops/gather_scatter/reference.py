"""Gather and scatter at selected positions, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

import math

from torch import Tensor

from ...common.units import Tile, matrix_of, num_units, offsets_of


def gather(source: Tensor, positions: Tensor, tile: Tile) -> Tensor:
    if tile[0] == 1 and tile[1] in (1, matrix_of(source.shape)[1]):  # elements and rows
        return source.reshape(num_units(source.shape, tile), tile[1]).index_select(0, positions).reshape(-1)
    offsets, exists = offsets_of(positions, source.shape, tile)
    found = source.reshape(-1).index_select(0, offsets)
    return found if exists is None else found.masked_fill_(~exists, 0)


def scatter_(target: Tensor, positions: Tensor, values: Tensor, tile: Tile) -> None:
    values = values.to(target.dtype).reshape(-1)
    if tile[0] == 1 and tile[1] in (1, matrix_of(target.shape)[1]):
        rows = target.view(num_units(target.shape, tile), tile[1])
        rows.index_copy_(0, positions.long(), values.view(len(positions), tile[1]))
        return
    offsets, exists = offsets_of(positions, target.shape, tile)
    if exists is not None:
        offsets, values = offsets[exists], values[exists]
    target.view(-1).index_copy_(0, offsets, values)


def gather_fake(source: Tensor, positions: Tensor, tile: Tile) -> Tensor:
    return source.new_empty(positions.shape[0] * math.prod(tile))
