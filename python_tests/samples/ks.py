"""Samples of ks_2samp; the oracle counts with numpy's searchsorted, as scipy does, but in integers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sparsekernels import ops
from sparsekernels.ops.backend import Backend

from .case import BF16, FP16, FP32, FP64, Case, Maker, Sample, short

INF, NAN = float("inf"), float("nan")
CODES = {"two-sided": 0, "less": -1, "greater": 1}
Pair = tuple[Tensor, Tensor]
Build = Callable[[torch.Generator], Pair]


def difference(x: np.ndarray, y: np.ndarray, alternative: str) -> tuple[int, float]:
    """The difference of distribution functions in units of 1 / lcm, and the first place of it in sorted x, then y."""
    x, y = np.sort(x), np.sort(y)
    both = np.concatenate([x, y])
    divisor = math.gcd(len(x), len(y))
    up, down = len(y) // divisor, len(x) // divisor
    differences = np.searchsorted(x, both, "right") * up - np.searchsorted(y, both, "right") * down
    low, high = differences.argmin(), differences.argmax()
    is_low = alternative == "less" or (alternative == "two-sided" and -differences[low] > differences[high])
    found = low if is_low else high
    return int(differences[found]), float(both[found])


def oracle(x: Tensor, y: Tensor, alternative: str) -> list[Tensor]:
    """statistic, location and sign, exactly, and whether the p-value is NaN; what it is, test_ks.py compares."""
    rows = []
    for a, b in zip(x.cpu().double().numpy(), y.cpu().double().numpy(), strict=True):
        if np.isnan(a).any() or np.isnan(b).any():
            rows.append((NAN, NAN, 0, True))
            continue
        units, location = difference(a, b, alternative)
        negative = alternative == "less" or (alternative == "two-sided" and units < 0)
        rows.append((abs(units) / math.lcm(len(a), len(b)), location + 0.0, -1 if negative else 1, False))
    statistic, location, sign, nan = torch.tensor(rows, dtype=FP64).reshape(-1, 4).unbind(1)
    return [statistic, location.to(x.dtype), sign.to(torch.int8), nan.bool()]


def exact_part(x: Tensor, y: Tensor, alternative: str, *, backend: Backend | None = None) -> list[Tensor]:
    found = ops.ks_2samp(x, y, alternative, backend=backend)
    return [found.statistic, found.statistic_location, found.statistic_sign, found.pvalue.isnan()]


def ks(build: Build, dtype: torch.dtype, alternative: str, strided: bool = False) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        x, y = (sample.to(dtype) for sample in build(maker.generator))
        if strided:
            x, y = (maker.put(sample.T.contiguous()).T for sample in (x, y))
        else:
            x, y = maker.put(x), maker.put(y)
        raw = (x.contiguous(), y.contiguous(), CODES[alternative])
        return Case(exact_part, (x, y, alternative), raw, oracle(x, y, alternative), exact=True)

    return make


def normal(rows: int, n: int, m: int, shift: float = 0.0, scale: float = 1.0) -> Build:
    def build(generator: torch.Generator) -> Pair:
        x = torch.randn(rows, n, generator=generator, dtype=FP64)
        return scale * x, scale * (torch.randn(rows, m, generator=generator, dtype=FP64) + shift)

    return build


def moved(by: Callable[[Tensor], Tensor], rows: int = 2, n: int = 128) -> Build:
    """x as a trained model might have it, y what became of it."""

    def build(generator: torch.Generator) -> Pair:
        x = 0.02 * torch.randn(rows, n, generator=generator, dtype=FP64)
        return x, by(x)

    return build


def tied(rows: int, n: int, m: int, levels: int) -> Build:
    def build(generator: torch.Generator) -> Pair:
        x, y = (torch.randint(0, levels, (rows, k), generator=generator).double() - levels // 2 for k in (n, m))
        return x, y

    return build


def with_outliers(*outliers: float, n: int = 200, m: int = 200) -> Build:
    """A few values so far out, or so close together, that buckets of equal width hold nearly all or nothing."""

    def build(generator: torch.Generator) -> Pair:
        x, y = normal(2, n, m)(generator)
        x[:, : len(outliers)] = torch.tensor(outliers, dtype=FP64)
        return x, y

    return build


def listed(x: list[float], y: list[float]) -> Build:
    return lambda _: (torch.tensor([x], dtype=FP64), torch.tensor([y], dtype=FP64))


def huge_and_tiny(generator: torch.Generator) -> Pair:
    x, y = normal(2, 300, 200, scale=20)(generator)
    return x.exp2() * x.sign(), y.exp2() * y.sign()


def magnitudes(generator: torch.Generator) -> Pair:
    """Values of both signs, spread evenly over 50 powers of two."""
    x, y = (torch.rand(2, 4096, generator=generator, dtype=FP64) * 50 - 25 for _ in range(2))
    sign = torch.randn(2, 4096, generator=generator).sign()
    return x.exp2() * sign, y.exp2() * sign


SMALL: dict[str, Build] = {
    "normal": normal(3, 30, 30),
    "unequal": normal(3, 30, 45),
    "one-element": normal(3, 1, 1),
    "one-against-many": normal(3, 1, 9),
    "tied": tied(3, 40, 30, 5),
    "all-equal": tied(2, 6, 4, 1),
    "zeros": listed([0.0, -0.0, -0.0, 1.0], [-0.0, 0.0, 1.0, 1.0]),
    "infinite": listed([INF, -INF, 0.0, INF, -INF, 2.0], [INF, INF, 1.0, -INF, 0.0]),
    "all-infinite": listed([INF, INF], [-INF, INF, INF]),
    "apart": listed([1.0, 2.0, 3.0], [4.0, 5.0]),
    "apart-below": listed([4.0, 5.0], [1.0, 2.0, 3.0]),
    "nan-in-x": lambda g: (torch.tensor([[1.0, NAN, 2.0], [1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0], [NAN, INF]])),
    "no-rows": normal(0, 3, 4),
}
LARGE: dict[str, Build] = {
    "shifted": moved(lambda x: x + 1e-3),
    "noisy": moved(lambda x: x + 1e-3 * torch.cos(1e5 * x)),
    "permuted": moved(lambda x: x.flip(1)),
    "identical": moved(lambda x: x.clone()),
    "identical-nan": moved(lambda x: x.index_fill_(1, torch.tensor([7]), NAN).clone()),
    "independent": normal(3, 200, 200),
    "unequal-large": normal(3, 300, 150, shift=0.2),
    "tied-large": tied(3, 160, 240, 30),
    "outlier": with_outliers(3e4),
    "outliers": with_outliers(3e4, 3e3, -3e2, 30.0, n=300),
    "infinities": with_outliers(INF, -INF, INF),
    "huge-and-tiny": huge_and_tiny,
    "denormal": normal(2, 200, 200, scale=1e-40),
    "all-equal-large": tied(2, 100, 150, 1),
}
INTERPRETED = ("shifted", "infinities", "all-equal-large")  # the others take other ways on the CPU alone


def ks_samples() -> Iterator[Sample]:
    for name, alternative in itertools.product(SMALL, CODES):
        yield Sample("ks_2samp", f"{name}-{alternative}", ks(SMALL[name], FP32, alternative))
    for i, (name, build) in enumerate(LARGE.items()):
        alternatives = CODES if name in ("shifted", "tied-large") else [list(CODES)[i % 3]]
        for alternative in alternatives:
            heavy = name not in INTERPRETED
            yield Sample("ks_2samp", f"{name}-{alternative}", ks(build, FP32, alternative), heavy=heavy)
    for dtype in (BF16, FP16, FP64):
        for i, (name, build) in enumerate({**SMALL, **LARGE}.items()):
            alternative = list(CODES)[i % 3]
            tag = f"{name}-{alternative}-{short(dtype)}"
            yield Sample("ks_2samp", tag, ks(build, dtype, alternative), heavy=name in LARGE)
    for dtype in (FP32, BF16):
        yield Sample("ks_2samp", f"strided-{short(dtype)}", ks(normal(3, 40, 60), dtype, "two-sided", strided=True))
    largest = 3e38  # the range of a row overflows
    spread = listed([largest, -largest, *map(float, range(100))], [0.5 * largest, *map(float, range(1, 90))])
    yield Sample("ks_2samp", "overflowing-range", ks(spread, FP32, "two-sided"))
    many = {
        "4096": normal(2, 4096, 4096),
        "4096-shifted": moved(lambda x: x + 1e-4, 2, 4096),
        "tied": tied(2, 4096, 4096, 90),
    }
    for (name, build), dtype in itertools.product(many.items(), (FP32, BF16, FP16)):
        yield Sample("ks_2samp", f"many-{name}-{short(dtype)}", ks(build, dtype, "two-sided"), heavy=True)
    far = {  # beyond the first histogram: buckets by value hold next to all of it
        "4096-outliers": with_outliers(1e6, -1e14, 1e22, 1e30, n=4096, m=4096),
        "4096-magnitudes": magnitudes,
        "rows": normal(70, 500, 400, shift=0.1),  # so many that several threads share them
    }
    for (name, build), alternative in itertools.product(far.items(), CODES):
        yield Sample("ks_2samp", f"{name}-{alternative}", ks(build, FP32, alternative), heavy=True)
    wide = {
        "counts": normal(1, 65_600, 3),  # more elements than 16 bits count
        "differences": normal(1, 16_384, 16_385),  # lcm past 2^28
    }
    for (name, build), dtype in itertools.product(wide.items(), (FP32, BF16)):
        yield Sample("ks_2samp", f"wide-{name}-{short(dtype)}", ks(build, dtype, "two-sided"), heavy=True)
