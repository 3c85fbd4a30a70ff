"""Squares of per-sample gradients, in Triton: a gradient lives in the registers of a program, one sample at a time.

No atomics: a program leaves its share of a norm at a place of its own, and every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.arguments import accumulation_dtype
from ..common.triton import TILE, compact_tile, device_of, is_interpreted, tile_grid
from ..gather_scatter.triton import scatter_
from ..masked_grad.triton import BLOCK_P, BLOCK_T, ELEMENTS_TILE, by_column, runs

BLOCK = 1024  # elements of a tensor that a program owns
BLOCK_M, BLOCK_S = 64, 32  # columns of a vector that a program owns, tokens that it takes at a time
FEW = 100  # where less than one element in so many is selected, a dot product for each is cheaper than whole tiles
# Rows and columns of a weight that a program owns, tokens that it takes at a time, warps, stages: nothing spills.
TILES = {torch.float32: (64, 32, 16, 4, 1), torch.float64: (32, 32, 1, 4, 3)}
HALF_TILE = (64, 64, 32, 4, 3)
LARGE_TILE, LARGE_TILE_OF_HOPPER = (128, 128, 32, 8, 4), (128, 128, 64, 8, 4)
ENOUGH = 128  # large tiles, for a GPU to be busy with them
GROUP = 8  # tiles that follow each other downwards


@triton.jit
def fisher_squares_kernel(total, grad, n, BLOCK: tl.constexpr):
    """One program owns BLOCK elements: total[i] += grad[i]^2."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    before = tl.load(total + offsets, mask=inside, other=0)
    g = tl.load(grad + offsets, mask=inside, other=0).to(before.dtype)
    tl.store(total + offsets, before + g * g, mask=inside)


@triton.jit
def fisher_linear_kernel(
    grad_output, input, real, slots, total, shares, samples, tokens, m, n,
    SLOTS: tl.constexpr, TOTAL: tl.constexpr, NORMS: tl.constexpr, UPCAST: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_S: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program owns TILE_M x TILE_N of a weight: total[i, j] += sum over b of g[b, i, j]^2, where

    g[b, i, j] = sum over s of grad_output[b, s, i] * input[b, s, j]; only tokens that are real count.

    shares[b, program] = sum of g[b]^2 over the tile. With SLOTS an element counts only where slots[i, j] is not
    negative; that is its place in a compact total.
    """
    program = tl.program_id(0).to(tl.int64)
    down, across = tl.cdiv(m, TILE_M), tl.cdiv(n, TILE_N)
    # Programs that run together own a block of tiles that is as high as wide: they read few activations in all.
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    i = (first + within % height) * TILE_M + tl.arange(0, TILE_M)
    j = within // height * TILE_N + tl.arange(0, TILE_N)
    place = i[:, None] * n + j[None, :]
    chosen = (i < m)[:, None] & (j < n)[None, :]
    if SLOTS:
        place = tl.load(slots + place, mask=chosen, other=-1)
        chosen = place >= 0
    step = tl.arange(0, TILE_S)
    squares = tl.zeros((TILE_M, TILE_N), shares.dtype.element_ty)
    g = tl.zeros((TILE_M, TILE_N), shares.dtype.element_ty)
    steps = tl.cdiv(tokens, TILE_S)
    # One loop over the tokens of all samples: loads run ahead into the next sample.
    for number in range(samples * steps):
        sample = (number // steps).to(tl.int64)
        start = number % steps * TILE_S
        s = sample * tokens + start + step
        live = start + step < tokens
        dy = tl.load(grad_output + s[None, :] * m + i[:, None], mask=live[None, :] & (i < m)[:, None], other=0)
        # What the input holds at padding might be NaN, and 0 * NaN is NaN.
        live = live & (tl.load(real + s, mask=live, other=0) != 0)
        x = tl.load(input + s[:, None] * n + j[None, :], mask=live[:, None] & (j < n)[None, :], other=0)
        if TILE_S == 1:  # an outer product: not every Triton has a tl.dot for fp64
            g += dy * x
        elif UPCAST:  # the interpreter gets products of bf16 wrong
            g = tl.dot(dy.to(g.dtype), x.to(g.dtype), g, input_precision="ieee")
        else:
            g = tl.dot(dy, x, g, input_precision="ieee")
        if start + TILE_S >= tokens:
            square = tl.where(chosen, g * g, 0.0)
            squares += square
            if NORMS:
                tl.store(shares + sample * tl.num_programs(0) + program, tl.sum(square))
            g = tl.zeros((TILE_M, TILE_N), shares.dtype.element_ty)
    if TOTAL:
        tl.store(total + place, tl.load(total + place, mask=chosen, other=0) + squares, mask=chosen)


@triton.jit
def fisher_elements_kernel(
    grad_output, input, positions, total, shares, count, samples, tokens, m, n,
    TOTAL: tl.constexpr, NORMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_P positions: total[p] += sum over b of g[b, p]^2, where

    g[b, p] = sum over s of grad_output[b, p // n, s] * input[b, p % n, s]. shares[b, program] = sum over p of g[b]^2.

    Both factors come transposed, so a position reads two runs of neighbours.
    """
    program = tl.program_id(0).to(tl.int64)
    slots = program * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = slots < count
    position = tl.load(positions + slots, mask=inside, other=0).to(tl.int64)
    row, column = position // n, position % n
    squares = tl.zeros((BLOCK_P,), shares.dtype.element_ty)
    for _ in range(samples):
        g = tl.zeros((BLOCK_P, BLOCK_T), shares.dtype.element_ty)
        for start in range(0, tokens, BLOCK_T):
            s = start + tl.arange(0, BLOCK_T)[None, :]
            mask = inside[:, None] & (s < tokens)
            dy = tl.load(grad_output + (row * tokens)[:, None] + s, mask=mask, other=0).to(g.dtype)
            x = tl.load(input + (column * tokens)[:, None] + s, mask=mask, other=0).to(g.dtype)
            g += dy * x
        row += m
        column += n
        sums = tl.sum(g, 1)
        squares += sums * sums
        if NORMS:
            tl.store(shares + program, tl.sum(sums * sums))
            shares += tl.num_programs(0)
    if TOTAL:
        tl.store(total + slots, tl.load(total + slots, mask=inside, other=0) + squares, mask=inside)


@triton.jit
def fisher_embedding_kernel(
    grad_output, order, firsts, lasts, ids, positions, total, shares, count, width, dim, samples, tokens,
    WHOLE: tl.constexpr, ELEMENTS: tl.constexpr, TOTAL: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K slots by BLOCK_D columns: total[k, d] += sum over b of g[b, k, d]^2, where

    g[b, k, d] = sum of grad_output[t, d] over the tokens t of slot k that lie in sample b.

    The tokens of slot k are order[firsts[k]:lasts[k]], ascending. shares[program, b] = sum of g[b]^2 over the tile;
    it holds zeros before. With WHOLE, slot k is row ids[k] of total.
    """
    slots, columns, inside = compact_tile(count, width, BLOCK_K, BLOCK_D)
    there = slots < count
    cursor = tl.load(firsts + slots, mask=there, other=0)
    last = tl.load(lasts + slots, mask=there, other=0)
    inside = inside & (cursor < last)[:, None]
    if ELEMENTS:
        column = (tl.load(positions + slots, mask=there, other=0).to(tl.int64) % dim)[:, None]
    else:
        column = columns[None, :]
    shares += tl.program_id(0).to(tl.int64) * samples
    squares = tl.zeros((BLOCK_K, BLOCK_D), shares.dtype.element_ty)
    while tl.max(last - cursor, 0) > 0:  # for each sample that has tokens of this tile
        token = tl.load(order + cursor, mask=cursor < last, other=samples * tokens)
        sample = tl.min(token, 0) // tokens
        end = (sample + 1) * tokens
        g = tl.zeros((BLOCK_K, BLOCK_D), shares.dtype.element_ty)
        while tl.min(token, 0) < end:
            live = token < end
            mask = live[:, None] & inside
            g += tl.load(grad_output + token[:, None] * dim + column, mask=mask, other=0).to(g.dtype)
            cursor += live.to(cursor.dtype)
            token = tl.load(order + cursor, mask=cursor < last, other=samples * tokens)
        squares += g * g
        if NORMS:
            tl.store(shares + sample, tl.sum(g * g))
    if TOTAL:
        row = tl.load(ids + slots, mask=there, other=0).to(tl.int64) if WHOLE else slots
        places = total + row[:, None] * width + columns[None, :]
        tl.store(places, tl.load(places, mask=inside, other=0) + squares, mask=inside)


@triton.jit
def fisher_vector_kernel(
    grad_output, input, positions, squares, count, tokens, m,
    POSITIONS: tl.constexpr, INPUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M entries of a sample: squares[b, k] = g[b, k]^2, where

    g[b, k] = sum over s of grad_output[b, s, p] * input[b, s, p] for p = positions[k].
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(count, BLOCK_M)
    b = program // blocks
    slots = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = slots < count
    column = tl.load(positions + slots, mask=inside, other=0).to(tl.int64) if POSITIONS else slots
    g = tl.zeros((BLOCK_S, BLOCK_M), squares.dtype.element_ty)
    for start in range(0, tokens, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        places = (b * tokens + s)[:, None] * m + column[None, :]
        mask = (s < tokens)[:, None] & inside[None, :]
        dy = tl.load(grad_output + places, mask=mask, other=0).to(g.dtype)
        if INPUT:
            dy *= tl.load(input + places, mask=mask, other=0).to(g.dtype)
        g += dy
    sums = tl.sum(g, 0)
    tl.store(squares + b * count + slots, sums * sums, mask=inside)


def fisher_squares_(totals: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for total, grad in zip(totals, grads, strict=True):
        if total.numel():
            with device_of(total):
                fisher_squares_kernel[(triton.cdiv(total.numel(), BLOCK),)](total, grad, total.numel(), BLOCK=BLOCK)


def fisher_linear_(
    grad_output: Tensor, input: Tensor, total: Tensor | None, norms: Tensor | None, positions: Tensor | None, rows: bool
) -> None:
    if grad_output.numel() == 0 or input.numel() == 0 or (positions is not None and positions.numel() == 0):
        return
    real = grad_output.any(2)  # of the whole row, whether or not it is selected
    if positions is not None and rows:
        grad_output, positions = grad_output.index_select(2, positions), None
    m, n = grad_output.shape[2], input.shape[2]
    if positions is not None and positions.shape[0] * FEW < m * n:
        _linear_elements(by_column(grad_output), by_column(input, real), total, norms, positions, m, n)
        return
    slots = None
    if positions is not None:
        slots = positions.new_full((m * n,), -1, dtype=torch.int32)
        scatter_(slots, positions, torch.arange(positions.shape[0], dtype=torch.int32, device=slots.device), (1, 1))
    tile_m, tile_n, tile_s, warps, stages = tile(input, m, n, slots)
    programs = triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n)
    shares = _shares(grad_output, (grad_output.shape[0], programs))
    with device_of(input):
        fisher_linear_kernel[(programs,)](
            grad_output, input, real, slots, total, shares, *grad_output.shape[:2], m, n,
            SLOTS=slots is not None, TOTAL=total is not None, NORMS=norms is not None,
            UPCAST=is_interpreted(fisher_linear_kernel), TILE_M=tile_m, TILE_N=tile_n, TILE_S=tile_s,
            GROUP=GROUP, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    _add_shares(norms, shares, 1)


def tile(input: Tensor, m: int, n: int, slots: Tensor | None) -> tuple[int, int, int, int, int]:
    if input.dtype in TILES:
        return TILES[input.dtype]
    if slots is not None or triton.cdiv(m, LARGE_TILE[0]) * triton.cdiv(n, LARGE_TILE[1]) < ENOUGH:
        return HALF_TILE
    if is_interpreted(fisher_linear_kernel) or -input.shape[1] % LARGE_TILE_OF_HOPPER[2] >= LARGE_TILE[2]:
        return LARGE_TILE  # fewer tokens that are none
    with device_of(input):
        architecture = triton.runtime.driver.active.get_current_target().arch
    return LARGE_TILE_OF_HOPPER if architecture == 90 else LARGE_TILE


def _linear_elements(
    grad_output: Tensor, input: Tensor, total: Tensor | None, norms: Tensor | None, positions: Tensor, m: int, n: int
) -> None:
    """Both activations are [B, width, tokens]."""
    samples, _, tokens = input.shape
    count = positions.shape[0]
    programs = triton.cdiv(count, BLOCK_P)
    shares = _shares(grad_output, (samples, programs))
    with device_of(input):
        fisher_elements_kernel[(programs,)](
            grad_output, input, positions, total, shares, count, samples, tokens, m, n,
            TOTAL=total is not None, NORMS=norms is not None, BLOCK_P=BLOCK_P, BLOCK_T=BLOCK_T,
        )  # fmt: skip
    _add_shares(norms, shares, 1)


def fisher_embedding_(
    grad_output: Tensor, ids: Tensor, total: Tensor | None, norms: Tensor | None, positions: Tensor | None, rows: bool,
    padding_idx: int,
) -> None:  # fmt: skip
    samples, tokens, dim = grad_output.shape
    if grad_output.numel() == 0 or (positions is not None and positions.numel() == 0):
        return
    ids, order = ids.flatten().sort(stable=True)
    elements = positions is not None and not rows
    if positions is None:  # each token has a slot, and the first one of an id does the work
        owners = ids
    else:
        owners = (positions // dim if elements else positions).to(ids.dtype)
    firsts, lasts = runs(ids, owners)
    idle = owners == padding_idx
    if positions is None:
        idle |= firsts != torch.arange(firsts.shape[0], device=firsts.device)
        if total is not None:  # never write outside
            idle |= (owners < 0) | (owners >= total.shape[0])
    lasts = torch.where(idle, firsts, lasts)
    count, width = owners.shape[0], 1 if elements else dim
    # Of fp64, half a tile and half the warps: nothing spills.
    tile, warps = (TILE // 2, 2) if grad_output.dtype == torch.float64 else (TILE, 4)
    grid, block_k, block_d = tile_grid(count, width, ELEMENTS_TILE if elements else tile)
    shares = _shares(grad_output, (*grid, samples)).zero_()
    with device_of(grad_output):
        fisher_embedding_kernel[grid](
            grad_output, order, firsts, lasts, owners, positions, total, shares, count, width, dim, samples, tokens,
            WHOLE=positions is None, ELEMENTS=elements, TOTAL=total is not None, NORMS=norms is not None,
            BLOCK_K=block_k, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    _add_shares(norms, shares, 0)


def fisher_vector_(
    grad_output: Tensor, input: Tensor | None, total: Tensor | None, norms: Tensor | None, positions: Tensor | None
) -> None:
    samples, tokens, m = grad_output.shape
    count = m if positions is None else positions.shape[0]
    if grad_output.numel() == 0 or count == 0:
        return
    squares = _shares(grad_output, (samples, count))
    with device_of(grad_output):
        fisher_vector_kernel[(samples * triton.cdiv(count, BLOCK_M),)](
            grad_output, input, positions, squares, count, tokens, m,
            POSITIONS=positions is not None, INPUT=input is not None, BLOCK_M=BLOCK_M, BLOCK_S=BLOCK_S,
        )  # fmt: skip
    if total is not None:
        total += squares.sum(0)
    _add_shares(norms, squares, 1)


def _shares(activation: Tensor, shape: tuple[int, ...]) -> Tensor:
    return activation.new_empty(shape, dtype=accumulation_dtype(activation.dtype))


def _add_shares(norms: Tensor | None, shares: Tensor, dim: int) -> None:
    """What the programs left for each sample, added up in fp64."""
    if norms is not None:
        norms += shares.sum(dim, dtype=torch.float64)
