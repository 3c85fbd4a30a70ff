"""Stochastic rounding inside Triton kernels; the same bits as csrc/rules/round.h."""

from __future__ import annotations

import triton
import triton.language as tl

ARRAYS = tl.constexpr(4)


@triton.jit
def random_bits(seed, position, step, stream, ARRAY: tl.constexpr):
    """uint32 of each position; see rounding.py."""
    low = position.to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    third = (low * 0 + step).to(tl.uint32)
    fourth = (low * 0 + stream * ARRAYS + ARRAY).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, third, fourth)
    return word


@triton.jit
def round_mantissa(x, random, DROPPED: tl.constexpr):
    bits = x.to(tl.uint32, bitcast=True)
    down = bits >> DROPPED << DROPPED
    up = bits + (random >> (32 - DROPPED)) >> DROPPED << DROPPED
    infinite = (up & 0x7F800000) == 0x7F800000
    found = tl.where(infinite, down, up).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, found)


@triton.jit
def rounded(x, like, seed, position, step, stream, STOCHASTIC: tl.constexpr, ARRAY: tl.constexpr):
    """x in the dtype of what `like` points to: to nearest, or stochastically where that is bf16 or fp16."""
    target = like.dtype.element_ty
    if STOCHASTIC and target == tl.bfloat16:
        x = round_mantissa(x, random_bits(seed, position, step, stream, ARRAY), 16)
    if STOCHASTIC and target == tl.float16:
        random = random_bits(seed, position, step, stream, ARRAY)
        magnitude = tl.abs(x)
        normal = round_mantissa(x, random, 13)
        over = (tl.abs(normal) > 65504.0) & (magnitude < 65520.0)
        normal = tl.where(over, tl.where(x < 0, -65504.0, 65504.0), normal)
        steps = magnitude * 16777216.0
        below = tl.floor(tl.where(magnitude < 1.0, steps, 0.0))
        up = (random >> 8).to(tl.float32) * 5.9604644775390625e-08 < steps - below
        small = (below + tl.where(up, 1.0, 0.0)) * 5.9604644775390625e-08
        small = tl.where(x < 0, -small, small)
        x = tl.where((magnitude >= 6.103515625e-05) | (x != x), normal, small)
    return x.to(target)
