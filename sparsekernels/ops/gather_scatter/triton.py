"""Gather and scatter at selected positions, in Triton."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ...common.units import Tile
from ..common.triton import launch_tiles, unit_offsets


@triton.jit
def gather_kernel(
    dense, positions, compact, count, rows, columns, height, width,
    RUNS: tl.constexpr, BESIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K by BLOCK_D of the compact tensor: what lies there of the dense one, or zero."""
    to, place, _, inside, exists = unit_offsets(
        positions, count, rows, columns, height, width, RUNS, BESIDE, BLOCK_K, BLOCK_D
    )
    tl.store(compact + to, tl.load(dense + place, mask=exists, other=0), mask=inside)


@triton.jit
def scatter_kernel(
    dense, positions, compact, count, rows, columns, height, width,
    RUNS: tl.constexpr, BESIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K by BLOCK_D of the compact tensor, and writes what exists of it into the dense one."""
    at, place, _, _, exists = unit_offsets(
        positions, count, rows, columns, height, width, RUNS, BESIDE, BLOCK_K, BLOCK_D
    )
    tl.store(dense + place, tl.load(compact + at, mask=exists), mask=exists)


def gather(source: Tensor, positions: Tensor, tile: Tile) -> Tensor:
    out = source.new_empty(positions.shape[0] * math.prod(tile))
    launch_tiles(gather_kernel, source, positions, out, tile)
    return out


def scatter_(target: Tensor, positions: Tensor, values: Tensor, tile: Tile) -> None:
    launch_tiles(scatter_kernel, target, positions, values.to(target.dtype), tile)
