"""Weight gradients at selected positions, in Triton: no atomics, so every run gives the same bits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.units import Tile, side_by_side
from ..common.arguments import accumulation_dtype
from ..common.products import product
from ..common.triton import TILE, as_integers, compact_tile, device_of, is_interpreted, tile_grid

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
# Rows and columns of a block that a program owns, at most, nothing spills; at least, what a tl.dot takes.
LARGEST = {torch.float32: 64, torch.float64: 32}
LARGEST_ON_TENSOR_CORES, SMALLEST = 128, 16
STAGE_BYTES, LINE_BYTES = 2**14, 128  # of both factors that it takes at a time, at most; of each of their columns


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
def block_product_kernel(
    grad_output, input, positions, out, count, tokens, m, n,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BESIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """One program owns TILE_M x TILE_N of a block: out[k, r, c] = sum over t of dy[t, i + r] * x[t, j + c],

    where dy is grad_output, x is input, and block positions[k] of the [m, n] weight begins at i, j; 0 where an edge
    cuts it off. BESIDE: the blocks are columns, out[r, k]. Products add up in the dtype of out.
    """
    program = tl.program_id(0).to(tl.int64)
    across: tl.constexpr = (WIDTH + TILE_N - 1) // TILE_N
    parts: tl.constexpr = (HEIGHT + TILE_M - 1) // TILE_M * across
    slot = program // parts
    r = program % parts // across * TILE_M + tl.arange(0, TILE_M)
    c = program % across * TILE_N + tl.arange(0, TILE_N)
    position = tl.load(positions + slot).to(tl.int64)
    per_row = tl.cdiv(n, WIDTH)
    i = position // per_row * HEIGHT + r
    j = position % per_row * WIDTH + c
    i_exists = (r < HEIGHT) & (i < m)
    j_exists = (c < WIDTH) & (j < n)
    s = tl.arange(0, TILE_S)
    dy_at = grad_output + s.to(tl.int64)[None, :] * m + i[:, None]
    x_at = input + s.to(tl.int64)[:, None] * n + j[None, :]
    total = tl.zeros((TILE_M, TILE_N), out.dtype.element_ty)
    for start in range(0, tokens, TILE_S):
        live = start + s < tokens
        dy = tl.load(dy_at, mask=live[None, :] & i_exists[:, None], other=0)
        x = tl.load(x_at, mask=live[:, None] & j_exists[None, :], other=0)
        if TILE_S == 1:  # an outer product: not every Triton has a tl.dot for fp64
            total += dy * x
        elif UPCAST:  # the interpreter gets products of bf16 wrong
            total = tl.dot(dy.to(total.dtype), x.to(total.dtype), total, input_precision=PRECISION)
        else:
            total = tl.dot(dy, x, total, input_precision=PRECISION)
        dy_at += tl.cast(m, tl.int64) * TILE_S
        x_at += tl.cast(n, tl.int64) * TILE_S
    total = tl.where(i_exists[:, None] & j_exists[None, :], total, 0.0)  # 0 times NaN is NaN
    if BESIDE:
        place = r[:, None] * count + (slot + c)[None, :]
    else:
        place = slot * (HEIGHT * WIDTH) + r[:, None] * WIDTH + c[None, :]
    tl.store(out + place, total, mask=(r < HEIGHT)[:, None] & (c < WIDTH)[None, :])


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
    ELEMENTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K positions by BLOCK_D columns: out[k, d] = sum of grad_output[t, d] over its tokens t.

    The tokens of slot k are order[firsts[k]:lasts[k]], ascending, and are added one after another. BLOCKS: slots are
    rows of blocks, which begin at column positions[k]; out is 0 beyond column `dim`.
    """
    slots, columns, inside = compact_tile(count, width, BLOCK_K, BLOCK_D)
    first = tl.load(firsts + slots, mask=slots < count, other=0)
    last = tl.load(lasts + slots, mask=slots < count, other=0)
    column, exists = columns[None, :], inside
    if ELEMENTS:
        column = (tl.load(positions + slots, mask=slots < count, other=0).to(tl.int64) % dim)[:, None]
    elif BLOCKS:
        column += tl.load(positions + slots, mask=slots < count, other=0)[:, None]
        exists = inside & (column < dim)
    total = tl.zeros((BLOCK_K, BLOCK_D), out.dtype.element_ty)
    for i in tl.range(0, tl.max(last - first, 0), loop_unroll_factor=4):
        token = tl.load(order + first + i, mask=first + i < last, other=-1)[:, None]
        mask = (token >= 0) & exists  # the comparison with `last` would be of another layout, which Triton gets wrong
        total += tl.load(grad_output + token * dim + column, mask=mask, other=0).to(total.dtype)
    tl.store(out + slots[:, None] * width + columns[None, :], total, mask=inside)


def masked_grad_linear(grad_output: Tensor, input: Tensor, positions: Tensor, tile: Tile) -> Tensor:
    count = positions.shape[0]
    out = input.new_empty(count * math.prod(tile), dtype=accumulation_dtype(input.dtype))
    if out.numel() == 0:
        return out
    if input.shape[0] == 0:
        return out.zero_()
    m, n = grad_output.shape[1], input.shape[1]
    if tuple(tile) != (1, 1):
        _multiply_blocks(grad_output, input, positions, tile, out)
        return out
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


def masked_grad_embedding(grad_output: Tensor, ids: Tensor, positions: Tensor, tile: Tile, padding_idx: int) -> Tensor:
    (height, width), dim = tile, grad_output.shape[1]
    out = grad_output.new_empty(positions.shape[0] * height * width, dtype=accumulation_dtype(grad_output.dtype))
    if out.numel() == 0:
        return out
    rows, elements = (height, width) == (1, dim), (height, width) == (1, 1)
    selected = positions if rows else positions // dim
    if not rows and not elements:  # the rows of blocks
        across = triton.cdiv(dim, width)
        places = torch.arange(height, device=positions.device) + (positions // across * height)[:, None]
        selected = places.reshape(-1)
        positions = (positions.long() % across * width).repeat_interleave(height)
    selected = selected.to(ids.dtype)
    sorted_ids, order = ids.sort(stable=True)
    firsts, lasts = runs(sorted_ids, selected)
    if padding_idx >= 0:
        lasts = torch.where(selected == padding_idx, firsts, lasts)
    count = selected.shape[0]
    grid, block_k, block_d = tile_grid(count, width, ELEMENTS_TILE if elements else TILE)
    with device_of(out):
        masked_grad_embedding_kernel[grid](
            grad_output, order, firsts, lasts, positions, out, count, width, dim,
            ELEMENTS=elements and not rows, BLOCKS=not rows and not elements, BLOCK_K=block_k, BLOCK_D=block_d,
        )  # fmt: skip
    return out


def _multiply_blocks(grad_output: Tensor, input: Tensor, positions: Tensor, tile: Tile, out: Tensor) -> None:
    """A product of its own for each block; in fp32 with TF32 where torch's matmul may use that."""
    m, n = grad_output.shape[1], input.shape[1]
    tf32 = input.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    largest = LARGEST_ON_TENSOR_CORES if tf32 else LARGEST.get(input.dtype, LARGEST_ON_TENSOR_CORES)
    tile_m, tile_n = (min(max(triton.next_power_of_2(size), SMALLEST), largest) for size in tile)
    tile_s = min(STAGE_BYTES // (2 * max(tile_m, tile_n)), LINE_BYTES) // input.itemsize
    warps = min(max(tile_m * tile_n // 1024, max(tile_m, tile_n) * tile_s // 2048, 1), 8)
    if input.dtype == torch.float64:
        tile_s, warps = 1, 4
    programs = positions.shape[0] * triton.cdiv(tile[0], tile_m) * triton.cdiv(tile[1], tile_n)
    with device_of(out):
        block_product_kernel[(programs,)](
            grad_output, input, positions, out, positions.shape[0], input.shape[0], m, n,
            HEIGHT=tile[0], WIDTH=tile[1], BESIDE=side_by_side(torch.Size((m, n)), tile),
            PRECISION="tf32" if tf32 else "ieee", UPCAST=is_interpreted(block_product_kernel),
            TILE_M=tile_m, TILE_N=tile_n, TILE_S=tile_s, num_warps=warps, num_stages=4,
        )  # fmt: skip


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
