"""Draws of gates from logits and random words, for Triton kernels; csrc/cpu/gate_rule.h is the same."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton import square_root

STG, FINEGATES, HARD_CONCRETE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def logarithm(x):
    """ln x of a normal x > 0. In fp32 by a polynomial (Cephes): the one that GPUs have is off where x is near 1."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23
        f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
        e = e.to(tl.float32)
        z = f * f
        y = 7.0376836292e-2 * f - 1.1514610310e-1
        y = y * f + 1.1676998740e-1
        y = y * f - 1.2420140846e-1
        y = y * f + 1.4249322787e-1
        y = y * f - 1.6668057665e-1
        y = y * f + 2.0000714765e-1
        y = y * f - 2.4999993993e-1
        y = y * f + 3.3333331174e-1
        return (f + (y * f * z - 0.5 * z - 2.12194440e-4 * e)) + 0.693359375 * e
    else:
        return tl.log(x)


@triton.jit
def cosine_of_turns(u, TERMS: tl.constexpr):
    """cos(2 pi u) for u in (0, 1), as the sine of an angle in [-pi/2, pi/2]: no reduction, which would need a stack."""
    x = 6.283185307179586 * (tl.abs(u - 0.5) - 0.25)
    z = x * x
    y = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(TERMS):
        y = 1.0 - z * y * (1.0 / ((2 * (TERMS - i)) * (2 * (TERMS - i) + 1)))
    return x * y


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp(tl.where(x > 30.0, 60.0, 2.0 * x)) + 1.0)


@triton.jit
def uniform(word, like):
    """A number in (0, 1), exact in fp32."""
    return ((word >> 9).to(tl.int32).to(like.dtype) + 0.5) * 1.1920928955078125e-07


@triton.jit
def number_of(noise, IN_MEMORY: tl.constexpr):
    """A float argument is fp32: for gates in fp64 it is in memory."""
    if IN_MEMORY:
        return tl.load(noise)
    else:
        return noise


@triton.jit
def draw_gates(x, i, noise, key, stream, KIND: tl.constexpr):
    """Values and slopes of gates i, whose logits are x. No key: no noise."""
    if key is not None:
        low = i.to(tl.uint32)
        first, second, _, _ = tl.philox(
            tl.load(key), low, (i >> 32).to(tl.uint32), (low * 0 + stream).to(tl.uint32), low * 0
        )
        u = uniform(first, x)
        if KIND == HARD_CONCRETE:
            x = (logarithm(u) - logarithm(1.0 - u) + x) / noise
        else:
            radius = square_root(-2.0 * logarithm(u))
            shift = noise * (radius * cosine_of_turns(uniform(second, x), 12 if x.dtype == tl.float64 else 7))
    if KIND == HARD_CONCRETE:
        s = sigmoid(x)
        before = 1.2 * s - 0.1
        slope = 1.2 * s * (1.0 - s)
        if key is not None:
            slope = slope / noise
    else:
        slope = tl.full(x.shape, 1.0, x.dtype)
        if KIND == FINEGATES:
            x = tanh(x)
            slope = 1.0 - x * x
        before = x + 0.5
        if key is not None:
            before += shift
    value = tl.where(before < 0.0, 0.0, tl.where(before > 1.0, 1.0, before))
    return value, tl.where((before > 0.0) & (before < 1.0), slope, 0.0)


@triton.jit
def open_gates(x, noise, KIND: tl.constexpr):
    """The probability that gates are above 0, and its derivative."""
    if KIND == HARD_CONCRETE:
        share = sigmoid(x - noise * -2.3978952727983707)  # ln(0.1 / 1.1)
        return share, share * (1.0 - share)
    else:
        slope = tl.full(x.shape, 1.0, x.dtype)
        if KIND == FINEGATES:
            x = tanh(x)
            slope = 1.0 - x * x
        score = (x + 0.5) / noise
        slope *= 0.3989422804014327 * tl.exp(-0.5 * score * score) / noise
        return 0.5 + 0.5 * tl.erf(0.7071067811865476 * score), slope
