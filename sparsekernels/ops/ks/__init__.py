"""Two-sample Kolmogorov-Smirnov tests over the rows of two matrices."""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backend import Backend, select
from ..common.arguments import check_floating, packed

ALTERNATIVES = {"less": -1, "two-sided": 0, "greater": 1}


class KsResult(NamedTuple):
    """The result of `scipy.stats.ks_2samp`, with one entry for each row; see `ks_2samp`."""

    statistic: Tensor
    pvalue: Tensor
    statistic_location: Tensor
    statistic_sign: Tensor


def ks_2samp(
    x: Tensor,
    y: Tensor,
    alternative: Literal["two-sided", "less", "greater"] = "two-sided",
    method: Literal["auto", "exact", "asymp"] = "auto",
    *,
    backend: Backend | None = None,
) -> KsResult:
    """Test, row by row, whether two samples come from the same distribution (Kolmogorov-Smirnov).

    Equivalent to `[scipy.stats.ks_2samp(a, b, alternative, method) for a, b in zip(x, y)]`, except that differences of
    distribution functions are compared as integers: between equal ones the first is taken, where scipy's depends on
    rounding.

    Args:
        x ([R, N], fp32, fp64, bf16 or fp16): one sample per row; not changed. Infinities are numbers, -0.0 equals 0.0.
        y ([R, M], same dtype): the other samples; not changed.
        alternative: "greater" measures how far x's distribution function exceeds y's, "less" how far it falls below,
            "two-sided" the larger of the two.
        method: "exact" p-values, "asymp" for asymptotic ones, or "auto": exact if neither N nor M exceeds 10,000.

    Returns:
        KsResult of statistic (fp64), pvalue (fp64), statistic_location (dtype of x) and statistic_sign (int8), each
        [R]. If the difference is largest at several values, the location is the lowest of them in x, or else in y. A
        row with NaN gets NaN, and sign 0; so do all rows, with a RuntimeWarning, if N or M is 0.

    Numerics: statistics are integers divided by lcm(N, M). Exact p-values are accurate down to 1e-300. Asymptotic ones
    are returned instead, with a RuntimeWarning, if N != M and either lcm(N, M) / gcd(N, M) exceeds 2^31 or, one-sided,
    the number of paths C(N + M, N) overflows; scipy does so in some more cases. Deterministic.
    Cost: R*(N + M) reads. On the CPU, four passes over samples in the cache and the sorting of a few buckets; values
    spread over many magnitudes, or permuted rows, take up to eight times as long. In Triton one sort on the chip for
    N + M <= 8192; longer rows and fp64 are sorted by torch. p-values are computed on the host, one for each distinct
    statistic: from a table if N = M; else in (N + M)*min(N, M)*statistic steps, for up to 64 of them at once, where
    scipy is faster if they are few.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or alternative or method is unknown.
        RuntimeError: the named backend is not available.

    Source: Hodges, The significance probability of the Smirnov two-sample test, 1958; as scipy.stats.ks_2samp defines
        it.

    Examples:
        >>> x = torch.arange(6.0).expand(2, 6)
        >>> result = sk.ops.ks_2samp(x, torch.stack([x[0].flip(0), x[0] + 10]))
        >>> result.statistic, result.pvalue
        (tensor([0., 1.], dtype=torch.float64), tensor([1.0000, 0.0022], dtype=torch.float64))
    """
    _check(x, y)
    if alternative not in ALTERNATIVES:
        raise ValueError(f'alternative must be "two-sided", "less" or "greater", got {alternative!r}')
    if method not in ("auto", "exact", "asymp"):
        raise ValueError(f'method must be "auto", "exact" or "asymp", got {method!r}')
    (rows, n), m = x.shape, y.shape[1]
    if n == 0 or m == 0:
        if rows:
            warnings.warn(
                f"a sample is empty: x is {list(x.shape)}, y {list(y.shape)}; every result is NaN",
                RuntimeWarning,
                stacklevel=2,
            )
        nan = torch.full((rows,), math.nan, dtype=torch.float64, device=x.device)
        return KsResult(nan, nan.clone(), nan.to(x.dtype), nan.nan_to_num().to(torch.int8))
    run = select("ks_2samp", x.device.type, backend)
    differences, locations = run(packed(x), packed(y), ALTERNATIVES[alternative])
    nan = locations.isnan()
    signs = (differences < 0) if alternative == "two-sided" else torch.full_like(nan, alternative == "less")
    h, place = differences.abs().unique(return_inverse=True)
    lcm = math.lcm(n, m)

    from .pvalues import pvalues  # scipy.stats takes a second to import

    table = torch.from_numpy(pvalues(h.cpu().numpy(), n, m, alternative, method)).to(x.device)
    return KsResult(
        (differences.abs().double() / lcm).masked_fill(nan, math.nan),
        table[place].masked_fill(nan, math.nan),
        locations,
        (1 - 2 * signs.to(torch.int8)).masked_fill(nan, 0),
    )


def _check(x: Tensor, y: Tensor) -> None:
    for name, sample in (("x", x), ("y", y)):
        if sample.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, a sample in each row, got {list(sample.shape)}")
        check_floating(name, sample)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"x and y must have the same number of rows, got {list(x.shape)} and {list(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"x and y must share dtype and device: x is {x.dtype} on {x.device}, y is {y.dtype} on {y.device}"
        )
