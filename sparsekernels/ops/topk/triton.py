"""Exact top-k over a list of tensors, in Triton: radix select, eight bits of the scores a pass.

The host waits once, to learn whether a score is NaN; the digits are chosen on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import as_integers, device_of

BLOCK = 1024  # scores that a program takes at a time: never fewer than its threads, each of which then has its own
PROGRAMS = 1024  # at most so many for a tensor
BITS = tl.constexpr(8)  # of a digit
BINS = tl.constexpr(256)

_INFINITY = {  # its bits, those of 16-bit dtypes moved up to 32 bits
    torch.bfloat16: 0x7F800000,
    torch.float16: 0x7C000000,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@triton.jit
def load_keys(scores, offsets, mask, MAGNITUDE: tl.constexpr):
    """Keys of scores that are given as integers, and their magnitudes: the larger the score, the larger the key.

    The bits of a float without its sign ascend with its magnitude, so key = -magnitude where the sign is set; 0.0 and
    -0.0 both get 0. Scores of 16 bits become keys of 32 bits whose lower half is 0.
    """
    bits = tl.load(scores + offsets, mask=mask, other=0)
    if bits.dtype == tl.int16:
        bits = bits.to(tl.int32) << 16
    magnitude = bits & (0x7FFFFFFF if bits.dtype == tl.int32 else 0x7FFFFFFFFFFFFFFF)
    return (magnitude if MAGNITUDE else tl.where(bits < 0, -magnitude, magnitude)), magnitude


@triton.jit
def flip(key):
    """Turns the sign bit over: signed keys become numbers whose digits order them, and back."""
    return key ^ (-0x80000000 if key.dtype == tl.int32 else -0x8000000000000000)


@triton.jit(do_not_specialize=["shift"])  # one compilation serves every pass
def histogram_kernel(
    scores, n, chunk, state, shift, histogram, nan_count,
    MAGNITUDE: tl.constexpr, INFINITY: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns `chunk` scores: histogram[b] += how many of those that share the prefix so far have digit b.

    A digit is the BITS bits of a key from `shift` on, the prefix what is above them.

    Counts meet in integer atomics, whose order does not matter. The first pass counts NaNs too.
    """
    begin = tl.program_id(0).to(tl.int64) * chunk
    prefix = tl.load(state)
    counts = tl.zeros((BINS,), tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, chunk, BLOCK):
        offsets = begin + start + tl.arange(0, BLOCK)
        mask = offsets < n
        key, magnitude = load_keys(scores, offsets, mask, MAGNITUDE)
        key = flip(key)
        if FIRST:
            nans += (magnitude > INFINITY).to(tl.int32)
        else:
            mask = mask & (((key ^ prefix.to(key.dtype)) >> (shift + BITS)) == 0)
        counts += tl.histogram(((key >> shift) & (BINS - 1)).to(tl.int32), BINS, mask=mask)
    tl.atomic_add(histogram + tl.arange(0, BINS), counts.to(tl.int64), mask=counts > 0)
    if FIRST:
        tl.atomic_add(nan_count, tl.sum(nans).to(tl.int64))


@triton.jit(do_not_specialize=["shift"])
def choose_digit_kernel(histogram, state, shift, next_state):
    """The one program picks a digit of the k-th largest key: the highest with enough scores at or above it.

    state is the prefix of that key, and how many of the scores that share it are among the k.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins)
    wanted = tl.load(state + 1)
    enough = tl.cumsum(counts, reverse=True) >= wanted
    digit = tl.sum(enough.to(tl.int64)) - 1
    tl.store(next_state, tl.load(state) | (digit << shift))
    tl.store(next_state + 1, wanted - tl.sum(tl.where(bins > digit, counts, 0)))


@triton.jit
def count_kernel(scores, n, chunk, state, above, equal, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """One program owns `chunk` scores: how many are above the k-th largest, and how many equal to it."""
    program = tl.program_id(0).to(tl.int64)
    threshold = tl.load(state)
    above_here = tl.zeros((BLOCK,), tl.int32)
    equal_here = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, chunk, BLOCK):
        offsets = program * chunk + start + tl.arange(0, BLOCK)
        mask = offsets < n
        key, _ = load_keys(scores, offsets, mask, MAGNITUDE)
        limit = flip(threshold.to(key.dtype))
        above_here += (mask & (key > limit)).to(tl.int32)
        equal_here += (mask & (key == limit)).to(tl.int32)
    tl.store(above + program, tl.sum(above_here).to(tl.int64))
    tl.store(equal + program, tl.sum(equal_here).to(tl.int64))


@triton.jit
def collect_kernel(
    scores, n, chunk, state, firsts, ties, totals, positions, count, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program owns `chunk` scores, of which totals[program] are among the k: it writes their offsets, ascending,
    from positions[firsts[program]] on, and takes the first ties[program] of those equal to the k-th largest.
    """
    program = tl.program_id(0).to(tl.int64)
    threshold = tl.load(state)
    first = tl.load(firsts + program)
    ties_left = tl.load(ties + program)
    total = tl.load(totals + program)
    # Most programs have nothing to write where k is small; their scores are not read again.
    for start in range(0, tl.where(total > 0, chunk, 0), BLOCK):
        offsets = program * chunk + start + tl.arange(0, BLOCK)
        mask = offsets < n
        key, _ = load_keys(scores, offsets, mask, MAGNITUDE)
        limit = flip(threshold.to(key.dtype))
        equal = (mask & (key == limit)).to(tl.int32)
        tied = (equal > 0) & (tl.cumsum(equal) <= ties_left)
        chosen = (tied | (mask & (key > limit))).to(tl.int32)
        tl.store(positions + first + tl.cumsum(chosen) - 1, offsets, mask=chosen > 0)
        first += tl.sum(chosen)
        ties_left -= tl.sum(equal)
    tl.atomic_add(count, total)


def topk(scores: Sequence[Tensor], k: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    infinity = _INFINITY[scores[0].dtype]
    scores = [as_integers(score.reshape(-1)) for score in scores]
    with device_of(scores[0]):
        positions, counts, nans = _select(scores, k, magnitude, infinity)
    for i, found in enumerate(nans.tolist()):
        if found:
            raise ValueError(f"scores[{i}] holds NaN")
    return positions, counts


def _select(scores: Sequence[Tensor], k: int, magnitude: bool, infinity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the k largest, how many of them are in each tensor, and how many NaNs are."""
    device = scores[0].device
    grids = [_grid(score.numel()) for score in scores]
    counts, nans = torch.zeros((2, len(scores)), dtype=torch.int64, device=device)

    key_bits = max(32, scores[0].itemsize * 8)
    state = torch.zeros(2, dtype=torch.int64, device=device)
    state[1] = k
    for number in range(scores[0].itemsize):
        shift = key_bits - BITS.value * (number + 1)
        histogram = torch.zeros(BINS.value, dtype=torch.int64, device=device)
        for i, (score, (programs, chunk)) in enumerate(zip(scores, grids, strict=True)):
            if programs:
                histogram_kernel[(programs,)](
                    score, score.numel(), chunk, state, shift, histogram, nans[i:],
                    MAGNITUDE=magnitude, INFINITY=infinity, FIRST=number == 0, BLOCK=BLOCK,
                )  # fmt: skip
        before, state = state, torch.empty_like(state)
        choose_digit_kernel[(1,)](histogram, before, shift, state, num_warps=1)

    every = sum(programs for programs, _ in grids)
    above, equal = torch.empty((2, every), dtype=torch.int64, device=device)
    done = 0
    for score, (programs, chunk) in zip(scores, grids, strict=True):
        if programs:
            count_kernel[(programs,)](
                score, score.numel(), chunk, state, above[done:], equal[done:], MAGNITUDE=magnitude, BLOCK=BLOCK
            )
            done += programs
    # Ties go to the programs in their order, which is that of the tensors and of the offsets in them.
    ties = (state[1] - (equal.cumsum(0) - equal)).clamp_(min=0).minimum(equal)
    totals = above + ties
    firsts = totals.cumsum(0) - totals

    positions = torch.empty(k, dtype=torch.int64, device=device)
    done = 0
    for i, (score, (programs, chunk)) in enumerate(zip(scores, grids, strict=True)):
        if programs:
            collect_kernel[(programs,)](
                score, score.numel(), chunk, state, firsts[done:], ties[done:], totals[done:], positions, counts[i:],
                MAGNITUDE=magnitude, BLOCK=BLOCK,
            )  # fmt: skip
            done += programs
    return positions, counts, nans


def _grid(n: int) -> tuple[int, int]:
    """Programs for n scores, and the scores that each of them owns."""
    chunk = triton.cdiv(max(n, 1), BLOCK * PROGRAMS) * BLOCK
    return triton.cdiv(n, chunk), chunk
