"""Columns taken and put, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import as_integers, device_of, tile

TILE = 2048  # elements of activations that a program has in its registers


@triton.jit
def take_columns_kernel(x, columns, out, tokens, count, stride, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program owns BLOCK_T rows by BLOCK_C of the columns: out[t, k] = x[t, columns[k]]."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(count, BLOCK_C)
    t = program // across * BLOCK_T + tl.arange(0, BLOCK_T)
    k = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.load(columns + k, mask=k < count, other=0).to(tl.int64)
    inside = (t < tokens)[:, None] & (k < count)[None, :]
    found = tl.load(x + t[:, None] * stride + column[None, :], mask=inside)
    tl.store(out + t[:, None] * count + k[None, :], found, mask=inside)


@triton.jit
def put_columns_kernel(
    x, columns, out, tokens, count, width, stride, steps, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program owns BLOCK_T rows by BLOCK_C columns of the result: out[t, columns[k]] = x[t, k], or 0.

    It looks its columns up among the sorted ones, by halves: cheaper than a map of all of them, which is a launch.
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, BLOCK_C)
    t = program // across * BLOCK_T + tl.arange(0, BLOCK_T)
    j = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    low = tl.zeros((BLOCK_C,), tl.int64)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        less = tl.load(columns + middle, mask=low < high, other=0).to(tl.int64) < j
        right = less & (low < high)
        high = tl.where(right, high, middle)
        low = tl.where(right, middle + 1, low)
    found = (low < count) & (j < width)
    found = found & (tl.load(columns + low, mask=found, other=-1).to(tl.int64) == j)
    value = tl.load(x + t[:, None] * stride + low[None, :], mask=(t < tokens)[:, None] & found[None, :], other=0)
    tl.store(out + t[:, None] * width + j[None, :], value, mask=(t < tokens)[:, None] & (j < width)[None, :])


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    tokens, count = x.shape[0], columns.shape[0]
    out = x.new_empty((tokens, count))
    if out.numel():
        block_t, block_c = tile(tokens, count, TILE)
        with device_of(x):
            take_columns_kernel[(triton.cdiv(tokens, block_t) * triton.cdiv(count, block_c),)](
                as_integers(x), columns, as_integers(out), tokens, count, x.stride(0), BLOCK_T=block_t, BLOCK_C=block_c
            )
    return out


def put_columns(x: Tensor, columns: Tensor, width: int) -> Tensor:
    tokens, count = x.shape
    out = x.new_empty((tokens, width))
    if out.numel():
        block_t, block_c = tile(tokens, width, TILE)
        with device_of(x):
            put_columns_kernel[(triton.cdiv(tokens, block_t) * triton.cdiv(width, block_c),)](
                as_integers(x), columns, as_integers(out), tokens, count, width, x.stride(0), count.bit_length(),
                BLOCK_T=block_t, BLOCK_C=block_c,
            )  # fmt: skip
    return out
