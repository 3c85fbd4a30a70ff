"""Philox4x32-10 and stochastic rounding in plain PyTorch; csrc/rules/{philox,round}.h are the same in C++ and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHT, EXP_AVG, EXP_AVG_SQ, MAXIMUM, ARRAYS = range(5)  # which array of a step a random number is for
WORD = 0xFFFFFFFF


def philox(key: int, low: Tensor, third: int | Tensor, fourth: int) -> Tensor:
    """The first word (int64 in [0, 2^32)) of the counters (low [...] int64, third, fourth) under a key of 64 bits."""
    return philox_words(key, low, third, fourth)[0]


def philox_words(
    key: int | Tensor, low: Tensor, third: int | Tensor, fourth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four of them. A key in memory, int64, stays on its device."""
    c0, c1 = low & WORD, low >> 32 & WORD
    c2, c3 = torch.zeros_like(c0) + (third & WORD), torch.full_like(c0, fourth & WORD)
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(10):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a b, which has 64: more than a signed int64 holds."""
    upper, lower = b * (a >> 16), b * (a & 0xFFFF)
    return upper + (lower >> 16) >> 16, ((upper & 0xFFFF) << 16) + lower & WORD


def rounded(x: Tensor, dtype: torch.dtype, rounding: Sequence[int | Tensor], positions: Tensor, array: int) -> Tensor:
    """`x` in `dtype`: to nearest, or for bf16 and fp16 stochastically if `rounding` is (seed, step, stream);
    the step may be one for each element.

    Rounds up with a probability proportional to the nearness of the upper neighbour, so that the mean is x. Infinity
    and NaN are kept, and values out of range round to nearest or stay finite, as in csrc/rules/round.h.
    """
    if not rounding or dtype not in (torch.bfloat16, torch.float16) or x.dtype != torch.float32:
        return x.to(dtype)
    seed, step, stream = rounding
    assert isinstance(seed, int)
    assert isinstance(stream, int)
    random = philox(seed, positions, step, stream * ARRAYS + array)
    if dtype == torch.bfloat16:
        return _mantissa(x, 16, random).to(dtype)
    magnitude = x.abs()
    normal = _mantissa(x, 13, random)
    normal = torch.where((normal.abs() > 65504) & (magnitude < 65520), x.sign() * 65504, normal)
    steps = magnitude * 2.0**24
    below = torch.where(magnitude < 1, steps, 0).floor()
    up = (random >> 8).float() * 2.0**-24 < steps - below
    subnormal = torch.copysign((below + up) * 2.0**-24, x)
    return torch.where(magnitude >= 2.0**-14, normal, torch.where(x.isnan(), x, subnormal)).to(dtype)


def _mantissa(x: Tensor, dropped: int, random: Tensor) -> Tensor:
    """A neighbour of x whose last `dropped` bits of mantissa are zero."""
    mask = (1 << dropped) - 1
    bits = x.contiguous().view(torch.int32)
    down = bits & ~mask
    up = bits + (random >> 32 - dropped).int() & ~mask
    infinite = (up & 0x7F800000) == 0x7F800000
    found = torch.where(infinite, down, up).view(torch.float32)
    return torch.where(x.isfinite(), found, x)
