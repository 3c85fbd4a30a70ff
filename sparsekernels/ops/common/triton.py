"""Code shared by the Triton kernels of several families."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a compact tensor that one program owns


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
def tile_offsets(positions, count, width, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where this program's tile lies in the compact tensor and in the dense one, and which of its elements exist."""
    slots, columns, inside = compact_tile(count, width, BLOCK_K, BLOCK_D)
    position = tl.load(positions + slots, mask=slots < count, other=0).to(tl.int64)
    compact = slots[:, None] * width + columns[None, :]
    return compact, position[:, None] * width + columns[None, :], inside


def tile_grid(count: int, width: int, tile: int = TILE) -> tuple[tuple[int], int, int]:
    """Programs, and the positions and columns that each of them owns, `tile` elements in all."""
    block_d = min(triton.next_power_of_2(width), tile)
    block_k = min(triton.next_power_of_2(count), tile // block_d)
    return (triton.cdiv(count, block_k) * triton.cdiv(width, block_d),), block_k, block_d


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; an interpreted kernel runs where its CPU tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers: copying bits needs no kernel per dtype, and leaves NaN unchanged."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.itemsize])


def launch_tiles(kernel: Any, count: int, dense: Tensor, positions: Tensor, compact: Tensor) -> None:
    """Run `kernel` over the tiles of `compact`, which has one row for each of `count` positions."""
    if compact.numel() == 0:
        return
    width = compact.numel() // count
    grid, block_k, block_d = tile_grid(count, width)
    with device_of(compact):
        kernel[grid](dense, positions, compact, count, width, BLOCK_K=block_k, BLOCK_D=block_d)


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
