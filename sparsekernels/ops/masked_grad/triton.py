"""Weight gradients at selected positions, in Triton: no atomics, so every run gives the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.arguments import accumulation_dtype
from ..common.products import product
from ..common.triton import TILE, as_integers, compact_tile, device_of, tile_grid

BLOCK_P, BLOCK_T = 32, 64  # positions that a program owns, tokens that it takes at a time
ELEMENTS_TILE = (
    256  # single elements read one column of a row each: more programs, and fewer registers, serve them better
)
TURNED = tl.constexpr(64)  # rows and columns that a program transposes
ALIGNMENT = 16  # Triton loads whole vectors where a stride is a multiple of this
# Past one element in so many, the dense product is cheaper than a dot product for each: that reads 2 * T elements from
# the L2 cache, at about 6 TB/s, where tensor cores have 790 TFLOP/s for halves, and 50 are left for fp32. To write a
# block and to read it again takes as long as so many tokens. Counted, not measured yet.
FEW = {torch.bfloat16: (256, 700), torch.float16: (256, 700)}
FEW_WIDE = (32, 50)
BLOCK_BYTES = 2**27  # of the dense product that exist at a time: enough rows for all multiprocessors
GATHERED = 1024  # positions of a program that takes them from such a block


@triton.jit
def masked_grad_linear_kernel(
    grad_output, input, positions, out, count, tokens, n, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr
):
    """One program owns BLOCK_P positions: out[p] = sum over t of grad_output[p // n, t] * input[p % n, t].

    Both factors come transposed, so a position reads two runs of neighbours. Products add up in the dtype of out.
    """
    slots = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = slots < count
    position = tl.load(positions + slots, mask=inside, other=0).to(tl.int64)
    grad_rows = grad_output + (position // n * tokens)[:, None]
    input_rows = input + (position % n * tokens)[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_T), out.dtype.element_ty)
    for start in range(0, tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)[None, :]
        mask = inside[:, None] & (token < tokens)
        g = tl.load(grad_rows + token, mask=mask, other=0).to(total.dtype)
        x = tl.load(input_rows + token, mask=mask, other=0).to(total.dtype)
        total += g * x
    tl.store(out + slots, tl.sum(total, 1), mask=inside)


@triton.jit
def transpose_kernel(x, real, out, tokens, width, padded, TILE: tl.constexpr):
    """One program owns TILE x TILE: out[b, j, s] = x[b, s, j]; 0 where there is no token, or none that is real."""
    program = tl.program_id(0).to(tl.int64)
    across, down = tl.cdiv(width, TILE), tl.cdiv(padded, TILE)
    b = program // (across * down)
    s = program // across % down * TILE + tl.arange(0, TILE)
    j = program % across * TILE + tl.arange(0, TILE)
    live = s < tokens
    if real is not None:
        live = live & (tl.load(real + b * tokens + s, mask=live, other=0) != 0)
    tile = tl.load(x + (b * tokens + s)[:, None] * width + j[None, :], mask=live[:, None] & (j < width), other=0)
    tl.store(out + (b * width + j)[:, None] * padded + s[None, :], tile.T, mask=(j < width)[:, None] & (s < padded))


@triton.jit
def take_from_block_kernel(block, positions, out, count, first, size, BLOCK: tl.constexpr):
    """One program owns BLOCK positions: out[p] = block[position - first], where that lies in the block."""
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < count
    place = tl.load(positions + slots, mask=inside, other=0).to(tl.int64) - first
    there = inside & (place >= 0) & (place < size)
    tl.store(out + slots, tl.load(block + place, mask=there), mask=there)


@triton.jit
def masked_grad_embedding_kernel(
    grad_output, order, firsts, lasts, positions, out, count, width, dim,
    ELEMENTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K positions by BLOCK_D columns: out[k, d] = sum of grad_output[t, d] over its tokens t.

    The tokens of slot k are order[firsts[k]:lasts[k]], ascending, and are added one after another.
    """
    slots, columns, inside = compact_tile(count, width, BLOCK_K, BLOCK_D)
    first = tl.load(firsts + slots, mask=slots < count, other=0)
    last = tl.load(lasts + slots, mask=slots < count, other=0)
    if ELEMENTS:
        column = (tl.load(positions + slots, mask=slots < count, other=0).to(tl.int64) % dim)[:, None]
    else:
        column = columns[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_D), out.dtype.element_ty)
    for i in tl.range(0, tl.max(last - first, 0), loop_unroll_factor=4):
        live = first + i < last
        token = tl.load(order + first + i, mask=live, other=0)
        mask = live[:, None] & inside
        total += tl.load(grad_output + token[:, None] * dim + column, mask=mask, other=0).to(total.dtype)
    tl.store(out + slots[:, None] * width + columns[None, :], total, mask=inside)


def masked_grad_linear(grad_output: Tensor, input: Tensor, positions: Tensor) -> Tensor:
    count = positions.shape[0]
    out = input.new_empty(count, dtype=accumulation_dtype(input.dtype))
    if count == 0:
        return out
    if input.shape[0] == 0:
        return out.zero_()
    m, n = grad_output.shape[1], input.shape[1]
    few, writing = FEW.get(input.dtype, FEW_WIDE)
    if count * few * input.shape[0] > m * n * (input.shape[0] + writing):
        _take_from_blocks(grad_output, input, positions, out)
        return out
    grad_output, input = by_column(grad_output[None])[0], by_column(input[None])[0]
    with device_of(out):
        masked_grad_linear_kernel[(triton.cdiv(count, BLOCK_P),)](
            grad_output, input, positions, out, count, input.shape[1], n, BLOCK_P=BLOCK_P, BLOCK_T=BLOCK_T
        )
    return out


def masked_grad_embedding(grad_output: Tensor, ids: Tensor, positions: Tensor, rows: bool, padding_idx: int) -> Tensor:
    count, dim = positions.shape[0], grad_output.shape[1]
    width = dim if rows else 1
    dtype = accumulation_dtype(grad_output.dtype)
    out = grad_output.new_empty((count, dim) if rows else (count,), dtype=dtype)
    if out.numel() == 0:
        return out
    selected = (positions if rows else positions // dim).to(ids.dtype)
    sorted_ids, order = ids.sort(stable=True)
    firsts, lasts = runs(sorted_ids, selected)
    if padding_idx >= 0:
        lasts = torch.where(selected == padding_idx, firsts, lasts)
    grid, block_k, block_d = tile_grid(count, width, TILE if rows else ELEMENTS_TILE)
    with device_of(out):
        masked_grad_embedding_kernel[grid](
            grad_output, order, firsts, lasts, positions, out, count, width, dim,
            ELEMENTS=not rows, BLOCK_K=block_k, BLOCK_D=block_d,
        )  # fmt: skip
    return out


def _take_from_blocks(grad_output: Tensor, input: Tensor, positions: Tensor, out: Tensor) -> None:
    """The dense product, some rows at a time, and what is selected of it.

    Each block looks at all positions: to ask which are its own, the host would wait for the device.
    """
    m, n = grad_output.shape[1], input.shape[1]
    height = max(1, BLOCK_BYTES // (out.itemsize * n))
    for first in range(0, m, height):
        block = product(grad_output[:, first : first + height].T, input, out.dtype)
        with device_of(out):
            take_from_block_kernel[(triton.cdiv(positions.shape[0], GATHERED),)](
                block, positions, out, positions.shape[0], first * n, block.numel(), BLOCK=GATHERED
            )
        del block  # before the next one is made


def runs(ids: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of each owner begin and end, among ids that a stable sort has left in the order of tokens."""
    return torch.searchsorted(ids, owners), torch.searchsorted(ids, owners, right=True)


def by_column(x: Tensor, real: Tensor | None = None) -> Tensor:
    """A copy of x [B, S, W] as [B, W, S], filled up with zeros to whole vectors, and zero where a token is not real."""
    samples, tokens, width = x.shape
    out = x.new_empty((samples, width, triton.cdiv(tokens, ALIGNMENT) * ALIGNMENT))
    tiles = triton.cdiv(width, TURNED.value) * triton.cdiv(out.shape[2], TURNED.value)
    with device_of(x):
        transpose_kernel[(samples * tiles,)](
            as_integers(x), real, as_integers(out), tokens, width, out.shape[2], TILE=TURNED
        )
    return out
