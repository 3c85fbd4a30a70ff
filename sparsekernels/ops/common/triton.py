"""Code shared by the Triton kernels of several families."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.units import Tile, matrix_of, side_by_side

TILE = 1024  # elements of a compact tensor that one program owns
BLOCKS_TILE = 512  # the same of blocks: each of their rows, which may be short, takes registers for its address
WIDEST = 128  # columns that a program owns a piece of, at most: to find each takes it as long as some rows

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def compact_tile(count, width, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Slots and columns of this program's tile of a compact [count, width] tensor, and which of them exist.

    A slot is an entry of `positions`. Programs go along the columns first.
    """
    program = tl.program_id(0).to(tl.int64)
    if BLOCK_D == 1:
        # Single elements: no division, and the compiler sees that neighbours are neighbours.
        slots = program * BLOCK_K + tl.arange(0, BLOCK_K)
        columns = tl.zeros((1,), tl.int64)
    else:
        blocks = tl.cdiv(width, BLOCK_D)
        slots = program // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        columns = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return slots, columns, (slots < count)[:, None] & (columns < width)[None, :]


@triton.jit
def unit_offsets(
    positions, count, rows, columns, height, width,
    RUNS: tl.constexpr, BESIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Where this program's tile lies in the compact tensor and in the dense one, and the slots of its rows.

    And which of its elements the compact tensor has, and which the dense one has too: edges cut off the others.
    Matrices are of rows x columns; see common/units.py. RUNS: elements and rows, for which a width is enough. BESIDE:
    columns, side by side, so that slots are those of the tile's columns. `deal` makes the arguments.
    """
    if RUNS:
        slot, column, inside = compact_tile(count, width, BLOCK_K, BLOCK_D)
        position = tl.load(positions + slot, mask=slot < count, other=0).to(tl.int64)
        compact = slot[:, None] * width + column[None, :]
        return compact, position[:, None] * width + column[None, :], slot, inside, inside
    else:
        if BESIDE:
            row, slot, inside = compact_tile(height, count, BLOCK_K, BLOCK_D)
            compact = row[:, None] * count + slot[None, :]
        else:
            line, column, inside = compact_tile(tl.cast(count, tl.int64) * height, width, BLOCK_K, BLOCK_D)
            slot = line // height
            compact = line[:, None] * width + column[None, :]
        position = tl.load(positions + slot, mask=slot < count, other=0).to(tl.int64)
        if BESIDE:
            matrix = position // columns
            dense = ((matrix * rows)[None, :] + row[:, None]) * columns + (position - matrix * columns)[None, :]
            exists = inside
        else:
            across, down = tl.cdiv(columns, width), tl.cdiv(rows, height)
            band = position // across
            matrix = band // down
            i = ((band - matrix * down) * height + line - slot * height)[:, None]
            j = ((position - band * across) * width)[:, None] + column[None, :]
            dense = ((matrix * rows)[:, None] + i) * columns + j
            exists = inside & (i < rows) & (j < columns)
        return compact, dense, slot, inside, exists


def tile_grid(count: int, width: int, tile: int = TILE, widest: int = TILE) -> tuple[tuple[int], int, int]:
    """Programs, and the positions and columns that each of them owns, `tile` elements in all."""
    block_d = min(triton.next_power_of_2(width), tile, widest)
    block_k = min(triton.next_power_of_2(count), tile // block_d)
    return (triton.cdiv(count, block_k) * triton.cdiv(width, block_d),), block_k, block_d


def deal(count: int, shape: torch.Size, tile: Tile, size: int = TILE) -> tuple[tuple[int], dict[str, Any]]:
    """Programs for `count` units, `size` elements of the compact tensor each, and what `unit_offsets` takes."""
    (m, n), (height, width) = matrix_of(shape), tile
    if height == 1 and width in (1, n):
        grid, block_k, block_d = tile_grid(count, width, size)
        units: dict[str, Any] = {"rows": None, "columns": None, "height": None, "RUNS": True, "BESIDE": False}
    else:
        beside = side_by_side(shape, tile)
        if beside:
            grid, block_k, block_d = tile_grid(height, count, size, WIDEST)
        else:
            grid, block_k, block_d = tile_grid(count * height, width, min(size, BLOCKS_TILE))
        units = {"rows": m, "columns": n, "height": height, "RUNS": False, "BESIDE": beside}
    return grid, {"count": count, "width": width, **units, "BLOCK_K": block_k, "BLOCK_D": block_d}


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; an interpreted kernel runs where its CPU tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def is_interpreted(kernel: Any) -> bool:
    return not isinstance(kernel, triton.JITFunction)


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers: copying bits needs no kernel per dtype, and leaves NaN unchanged."""
    tensor = tensor.detach()
    if tensor.dtype == torch.complex128:  # no integer is as wide
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.itemsize])


def launch_tiles(kernel: Any, dense: Tensor, positions: Tensor, compact: Tensor, tile: Tile) -> None:
    """Run `kernel` over a compact tensor and its units of the dense one."""
    if compact.numel() == 0:
        return
    shape = dense.shape
    if dense.dtype == torch.complex128:  # as integers, each element is two columns
        if side_by_side(shape, tile):
            positions = (2 * positions.long()[:, None] + torch.arange(2, device=positions.device)).reshape(-1)
        else:
            tile = (tile[0], 2 * tile[1])
        m, n = matrix_of(shape)
        shape = torch.Size((*shape[:-2], m, 2 * n))
    grid, units = deal(positions.shape[0], shape, tile)
    with device_of(compact):
        kernel[grid](as_integers(dense), positions, as_integers(compact), **units)


@triton.jit
def square_root(x):
    # fp32 would get the approximate one, which flushes denormals; fp64 has the exact one only.
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def quotient(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


def tile(height: int, width: int, size: int) -> tuple[int, int]:
    """Rows and columns of a program, `size` elements in all."""
    block_j = min(triton.next_power_of_2(max(width, 1)), 128)
    return min(triton.next_power_of_2(max(height, 1)), size // block_j), block_j
