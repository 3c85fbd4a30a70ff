"""The largest difference of two empirical distribution functions, in Triton: one sort on the chip for each row."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import as_integers, device_of
from . import reference

MOST = 8192  # elements of both samples that one program sorts

_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


@triton.jit
def ks_kernel(
    x, y, differences, locations, n, m, up, down,
    ALTERNATIVE: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns a row of both samples, n elements of x and m of y, given as integers of the same bits.

    It sorts keys 2 * (the bits of a float without its sign, negated where that is set) + (1 for x), so that -0.0 equals
    0.0, and the last key of a value tells whether x has it. An element of x lifts the difference by `up`, one of y
    lowers it by `down`; it counts where the next key is another value.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    of_x = place < n
    inside = place < n + m
    bits = tl.load(x + row * n + place, mask=of_x, other=0)
    bits = tl.where(of_x, bits, tl.load(y + row * m + (place - n), mask=inside & (place >= n), other=0))
    if bits.dtype == tl.int16:
        wide = bits.to(tl.int32)
    else:
        wide = bits.to(tl.int64)
    magnitude = wide & (0x7FFF if bits.dtype == tl.int16 else 0x7FFFFFFF)
    nan = tl.max((magnitude > INFINITY).to(tl.int32))
    key = tl.where(wide < 0, -magnitude, magnitude) * 2 + tl.where(of_x, 1, 0)
    beyond = 0x7FFFFFFF if bits.dtype == tl.int16 else 0x7FFFFFFFFFFFFFFF
    key = tl.sort(tl.where(inside, key, beyond))

    value = key >> 1
    in_x = (key & 1) == 1
    count = tl.cumsum(in_x.to(tl.int32))
    difference = count * up - (place + 1 - count) * down
    # The last element has itself for a next one, and is no less the end of its value.
    ahead = tl.gather(value, tl.minimum(place + 1, BLOCK - 1), 0)
    end = inside & ((value != ahead) | (place == n + m - 1))
    most = tl.max(tl.where(end, difference, -0x80000000))
    least = tl.min(tl.where(end, difference, 0x7FFFFFFF))
    if ALTERNATIVE == 0:
        best = tl.where(-least > most, least, most)
    else:
        best = most if ALTERNATIVE > 0 else least

    reached = end & (difference == best)
    found = tl.min(tl.where(reached, value, beyond))
    if ALTERNATIVE <= 0:
        # The smallest difference may be reached at values of y alone; values of x come first.
        also = tl.min(tl.where(reached & in_x, value, beyond))
        found = tl.where(also == beyond, found, also)
    location = tl.where(found < 0, -found | (0x8000 if bits.dtype == tl.int16 else 0x80000000), found)
    location = tl.where(nan > 0, INFINITY + 1, location)
    tl.store(differences + row, tl.where(nan > 0, 0, best).to(tl.int64))
    tl.store(locations + row, location.to(bits.dtype))


def ks_2samp(x: Tensor, y: Tensor, alternative: int) -> tuple[Tensor, Tensor]:
    (rows, n), m = x.shape, y.shape[1]
    if n + m > MOST or x.dtype not in _INFINITY:
        return reference.ks_2samp(x, y, alternative)
    differences, locations = reference.ks_2samp_fake(x, y, alternative)
    block = max(triton.next_power_of_2(n + m), 32)
    divisor = math.gcd(n, m)
    if rows:
        with device_of(x):
            ks_kernel[(rows,)](
                as_integers(x), as_integers(y), differences, as_integers(locations), n, m, m // divisor,
                n // divisor, ALTERNATIVE=alternative, INFINITY=_INFINITY[x.dtype], BLOCK=block,
                num_warps=min(max(block // 256, 1), 16),
                maxnreg=128,  # what 16 warps have; ptxas by itself may settle for 64, and spill
            )  # fmt: skip
    return differences, locations
