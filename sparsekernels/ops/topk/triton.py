"""Exact top-k over a list of tensors, in Triton: radix select, eight bits of the scores a pass.

The host waits once, to learn whether a score is NaN: the digits are chosen on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gather_scatter.triton import device_of

BLOCK = 1024  # scores that a program takes at a time: at least its threads, or tl.histogram would count some twice
PROGRAMS = 1024  # at most so many for a tensor
BITS = tl.constexpr(8)  # of a digit

# For each size of a score in bytes: its integer dtype, the sign bit, and the bits of infinity by floating dtype.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@triton.jit
def load_keys(scores, offsets, mask, MAGNITUDE: tl.constexpr, WIDTH: tl.constexpr):
    """Keys of scores given as integers of WIDTH bits, and their magnitudes: a larger score has a larger signed key.

    A float's bits without its sign ascend with its magnitude, so key = -magnitude where the sign is set; 0.0 and -0.0
    both get 0.
    """
    bits = tl.load(scores + offsets, mask=mask, other=0)
    if WIDTH == 16:
        bits = bits.to(tl.int32)
    magnitude = bits & ((1 << (WIDTH - 1)) - 1)
    if MAGNITUDE:
        return magnitude, magnitude
    else:
        return tl.where(bits < 0, -magnitude, magnitude), magnitude


@triton.jit
def ascending(key, WIDTH: tl.constexpr):
    """The key with its sign bit turned over: its digits, read as an unsigned number, then order the keys."""
    return key ^ (-(1 << (WIDTH - 1)))


@triton.jit
def histogram_kernel(
    scores, n, chunk, state, histogram, nan_count,
    MAGNITUDE: tl.constexpr, WIDTH: tl.constexpr, INFINITY: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns `chunk` scores: histogram[b] += number of them with digit b that share the prefix so far.

    Counts meet in integer atomics, whose order does not matter. The first pass counts NaNs too.
    """
    begin = tl.program_id(0).to(tl.int64) * chunk
    prefix = tl.load(state)
    bins = tl.arange(0, 1 << BITS)
    counts = tl.zeros((1 << BITS,), tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, chunk, BLOCK):
        offsets = begin + start + tl.arange(0, BLOCK)
        mask = offsets < n
        key, magnitude = load_keys(scores, offsets, mask, MAGNITUDE, WIDTH)
        key = ascending(key, WIDTH)
        if SHIFT + BITS == WIDTH:
            nans += (magnitude > INFINITY).to(tl.int32)
        else:
            mask = mask & (((key ^ prefix.to(key.dtype)) >> (SHIFT + BITS)) == 0)
        digit = (key >> SHIFT) & ((1 << BITS) - 1)
        counts += tl.histogram(digit.to(tl.int32), 1 << BITS, mask=mask)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0)
    if SHIFT + BITS == WIDTH:
        tl.atomic_add(nan_count, tl.sum(nans).to(tl.int64))


@triton.jit
def choose_digit_kernel(histogram, state, next_state, SHIFT: tl.constexpr):
    """The one program picks the digit of the k-th largest key: the highest with `remaining` scores at or above it.

    state holds the prefix, as the ascending key's bits, and how many scores are still wanted among those that share it.
    """
    bins = tl.arange(0, 1 << BITS)
    counts = tl.load(histogram + bins)
    remaining = tl.load(state + 1)
    reached = tl.cumsum(counts, reverse=True) >= remaining
    digit = tl.sum(reached.to(tl.int64)) - 1
    tl.store(next_state, tl.load(state) | (digit << SHIFT))
    tl.store(next_state + 1, remaining - tl.sum(tl.where(bins > digit, counts, 0)))


@triton.jit
def count_kernel(
    scores, n, chunk, state, above, equal, MAGNITUDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One program owns `chunk` scores: how many are above the k-th largest, and how many equal to it."""
    program = tl.program_id(0).to(tl.int64)
    threshold = tl.load(state)
    above_here = tl.zeros((BLOCK,), tl.int32)
    equal_here = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, chunk, BLOCK):
        offsets = program * chunk + start + tl.arange(0, BLOCK)
        mask = offsets < n
        key, _ = load_keys(scores, offsets, mask, MAGNITUDE, WIDTH)
        limit = ascending(threshold.to(key.dtype), WIDTH)
        above_here += (mask & (key > limit)).to(tl.int32)
        equal_here += (mask & (key == limit)).to(tl.int32)
    tl.store(above + program, tl.sum(above_here).to(tl.int64))
    tl.store(equal + program, tl.sum(equal_here).to(tl.int64))


@triton.jit
def collect_kernel(
    scores, n, chunk, state, starts, ties, totals, positions, count,
    MAGNITUDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns `chunk` scores: it writes, ascending, the offsets of those above the k-th largest and of its
    first `ties` equals, from positions[starts] on; count += how many.
    """
    program = tl.program_id(0).to(tl.int64)
    threshold = tl.load(state)
    start = tl.load(starts + program)
    ties_left = tl.load(ties + program)
    total = tl.load(totals + program)
    # Most programs have nothing to write where k is small; their scores are not read again.
    for first in range(0, tl.where(total > 0, chunk, 0), BLOCK):
        offsets = program * chunk + first + tl.arange(0, BLOCK)
        mask = offsets < n
        key, _ = load_keys(scores, offsets, mask, MAGNITUDE, WIDTH)
        limit = ascending(threshold.to(key.dtype), WIDTH)
        equal = (mask & (key == limit)).to(tl.int32)
        tied = (equal > 0) & (tl.cumsum(equal) <= ties_left)
        chosen = (tied | (mask & (key > limit))).to(tl.int32)
        tl.store(positions + start + tl.cumsum(chosen) - 1, offsets, mask=chosen > 0)
        start += tl.sum(chosen)
        ties_left -= tl.sum(equal)
    tl.atomic_add(count, total)


def topk(scores: Sequence[Tensor], k: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    scores = [score.detach().reshape(-1) for score in scores]
    with device_of(scores[0]):
        return _topk(scores, k, magnitude)


def _topk(scores: Sequence[Tensor], k: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    width = 8 * scores[0].itemsize
    constants = {"MAGNITUDE": magnitude, "WIDTH": width, "BLOCK": BLOCK}
    passes = range(width - BITS.value, -1, -BITS.value)  # by the shift of the digit
    zeros = torch.zeros((len(passes) + 1) * 2 + (len(passes) << BITS.value) + 2 * len(scores), dtype=torch.int64, device=scores[0].device)
    ...
