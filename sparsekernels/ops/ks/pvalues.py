"""p-values of the two-sample Kolmogorov-Smirnov statistic, as scipy.stats.ks_2samp defines them, by distinct statistic.

Notation as in scipy: samples of n and m, g their greatest common divisor, h the statistic in units of 1 / lcm(n, m).
"""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

MOST_AUTO = 10_000  # method="auto" is exact for samples up to this size
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def pvalues(h: Integers, n: int, m: int, alternative: str, method: str) -> Floats:
    """The p-value of each h >= 0; ascending, distinct h."""
    g = math.gcd(n, m)
    lcm = n // g * m
    if method == "auto":
        method = "exact" if max(n, m) <= MOST_AUTO else "asymp"
    elif method == "exact" and lcm // g >= np.iinfo(np.int32).max:
        warnings.warn(
            f"an exact p-value is not possible with samples of {n} and {m}; the asymptotic one is returned",
            RuntimeWarning,
            stacklevel=3,
        )
        method = "asymp"
    if method == "exact":
        if n == m:
            return _table(n, alternative == "two-sided")[h]
        if alternative == "two-sided":
            return _outside(h, max(n, m), min(n, m), two_sided=True)
        if np.isfinite(special.binom(n + m, n)):
            return _outside(h, max(n, m), min(n, m), two_sided=False)
        if not h.any():
            return np.ones(len(h))
        warnings.warn(
            f"the number of paths for samples of {n} and {m} overflows; asymptotic p-values are returned",
            RuntimeWarning,
            stacklevel=3,
        )
    return _asymptotic(h / lcm, n, m, alternative)


@functools.lru_cache(maxsize=8)
def _table(n: int, two_sided: bool) -> Floats:
    """p-values of h = 0, ..., n for two samples of n.

    With C_k = C(2n, n - k) / C(2n, n), one-sided p = C_h, and two-sided p = 2 (C_h - C_2h + C_3h - ...).
    """
    j = np.arange(n, dtype=np.longdouble)
    chances = np.concatenate([np.ones(1, np.longdouble), np.cumprod((n - j) / (n + j + 1))])
    if not two_sided:
        return chances.astype(np.float64)
    last = int(np.flatnonzero(chances > np.finfo(np.float64).smallest_subnormal)[-1])
    sums = np.zeros(n + 1, np.longdouble)
    for k in range(1, last + 1):
        multiples = chances[k : last + 1 : k]
        sums[1 : len(multiples) + 1] += multiples if k % 2 else -multiples
    table = np.clip(2 * sums, 0, 1).astype(np.float64)
    table[0] = 1
    return table


def _outside(h: Integers, n: int, m: int, two_sided: bool) -> Floats:
    """The share of lattice paths from (0, 0) to (m, n), m <= n, that reach a difference of h somewhere."""
    found = np.ones(len(h))
    for chosen in np.array_split(np.flatnonzero(h), len(h) // 64 + 1):
        if len(chosen):
            found[chosen] = _outside_each(h[chosen], n, m, two_sided)
    return found


def _outside_each(h: Integers, n: int, m: int, two_sided: bool) -> Floats:
    """Of all paths to (i, s - i), after s steps, the share that reached h: the mean of the two points one step before,
    weighted by i / s and 1 - i / s. Nothing is subtracted, so small shares are as precise as large ones.

    The difference at (i, s - i) is n' i - m' (s - i), in units of 1 / lcm. Where it is h or more, the share is 1.
    """
    g = math.gcd(n, m)
    up, down = n // g, m // g
    widest = int(h.max())
    width = 2 * widest // (up + down) + 3 if two_sided else m + 1
    bound = h[:, None].astype(np.float64)
    shares = np.ones((len(h), width + 2))  # between a share of 1 on the left and one on the right
    fresh = np.empty((len(h), width))
    first = _first(0, widest, up, down, two_sided)
    shares[:, 1 - first] = 0
    for s in range(1, n + m + 1):
        before, first = first, _first(s, widest, up, down, two_sided)
        i = np.arange(first, first + width)
        share = np.clip(i, 0, s)
        old = first - before
        np.multiply(shares[:, old : old + width], share / s, out=fresh)
        same = shares[:, old + 1 : old + 1 + width]
        same *= (s - share) / s
        fresh += same
        difference = (up * i - down * (s - i)).astype(np.float64)
        shares[:, 1:-1] = np.where((np.abs(difference) if two_sided else difference) >= bound, 1, fresh)
        shares[:, -1] = 1
    return shares[:, 1 + m - first]


def _first(s: int, widest: int, up: int, down: int, two_sided: bool) -> int:
    """The lowest i that is looked at after s steps: the next one may be inside."""
    return (down * s - widest) // (up + down) if two_sided else 0


def _asymptotic(d: Floats, n: int, m: int, alternative: str) -> Floats:
    """Smirnov's limit; one-sided with Hodges' correction (1958), equation 5.3."""
    larger, smaller = float(max(n, m)), float(min(n, m))
    effective = larger * smaller / (larger + smaller)
    if alternative == "two-sided":
        found = stats.kstwo.sf(d, np.round(effective))
    else:
        z = np.sqrt(effective) * d
        scale = np.sqrt(larger * smaller * (larger + smaller))
        found = np.exp(-2 * z**2 - 2 * z * (larger + 2 * smaller) / scale / 3)
    return np.asarray(np.clip(found, 0, 1), np.float64)
