"""The largest difference of two empirical distribution functions, in plain PyTorch: oracle, and fallback everywhere.

`alternative` is 1 for the largest difference ("greater"), -1 for the smallest ("less"), 0 for the larger of the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements of both samples that are sorted at a time


def ks_2samp(x: Tensor, y: Tensor, alternative: int) -> tuple[Tensor, Tensor]:
    rows = max(1, CHUNK // (x.shape[1] + y.shape[1]))
    parts = [_differences(*pair, alternative) for pair in zip(x.split(rows), y.split(rows), strict=True)]
    differences, locations = zip(*parts, strict=True)
    return torch.cat(differences), torch.cat(locations)


def _differences(x: Tensor, y: Tensor, alternative: int) -> tuple[Tensor, Tensor]:
    n, m = x.shape[1], y.shape[1]
    divisor = math.gcd(n, m)
    values, order = torch.cat([x, y], 1).sort(1)
    in_x = order < n
    steps = torch.where(in_x, m // divisor, -(n // divisor))
    differences = steps.cumsum(1)  # in units of 1 / lcm(n, m)

    # Among equal values, only the last has seen them all; scipy looks at all of x first, then at y.
    last = torch.ones_like(in_x)
    last[:, :-1] = values[:, 1:] != values[:, :-1]
    positions = torch.arange(n + m, device=x.device).expand_as(order)
    ends = torch.where(last, positions, n + m).flip(1).cummin(1).values.flip(1)
    differences = differences.gather(1, ends.clamp(max=n + m - 1))
    rank = torch.where(in_x, positions, positions + n + m)

    largest, smallest = differences.amax(1), differences.amin(1)
    if alternative == 0:
        best = torch.where(-smallest > largest, smallest, largest)
    else:
        best = largest if alternative > 0 else smallest
    first = torch.where(differences == best[:, None], rank, 2 * (n + m)).argmin(1, keepdim=True)
    locations = values.gather(1, first).squeeze(1) + 0  # -0 becomes 0
    nan = x.isnan().any(1) | y.isnan().any(1)
    return best.masked_fill(nan, 0), locations.masked_fill(nan, math.nan)


def ks_2samp_fake(x: Tensor, y: Tensor, alternative: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0],), dtype=torch.int64), x.new_empty((x.shape[0],))
