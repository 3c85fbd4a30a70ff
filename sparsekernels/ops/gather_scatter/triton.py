"""Gather and scatter at selected positions, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import as_integers, launch_tiles, tile_offsets


@triton.jit
def gather_kernel(source, positions, out, count, width, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program owns BLOCK_K positions by BLOCK_D columns: out[k, d] = source[positions[k], d]."""
    compact, dense, inside = tile_offsets(positions, count, width, BLOCK_K, BLOCK_D)
    tl.store(out + compact, tl.load(source + dense, mask=inside), mask=inside)


@triton.jit
def scatter_kernel(target, positions, values, count, width, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program owns BLOCK_K positions by BLOCK_D columns: target[positions[k], d] = values[k, d]."""
    compact, dense, inside = tile_offsets(positions, count, width, BLOCK_K, BLOCK_D)
    tl.store(target + dense, tl.load(values + compact, mask=inside), mask=inside)


def gather(source: Tensor, positions: Tensor, rows: bool) -> Tensor:
    out = source.new_empty((positions.shape[0], *(source.shape[1:] if rows else ())))
    launch_tiles(gather_kernel, positions.shape[0], as_integers(source), positions, as_integers(out))
    return out


def scatter_(target: Tensor, positions: Tensor, values: Tensor, rows: bool) -> None:
    values = values.to(target.dtype)
    launch_tiles(scatter_kernel, positions.shape[0], as_integers(target), positions, as_integers(values))
