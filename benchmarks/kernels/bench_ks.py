"""Kolmogorov-Smirnov tests over the rows of two matrices: ks_2samp, beside scipy's function called row by row.

scipy gets rows of fp32 that lie ready as numpy arrays; rows of bf16 are widened for it outside of the timed region.

The floor of a row on the CPU is four passes: the range of the values, their buckets, the counting, which adds to a
number in the cache for each of N + M elements and so cannot be vectorised, and the sum over the buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from sparsekernels import ops

from ..timing import DEVICE
from .case import BF16, FP32, WARM, Case, Contender, Floor, Problem, called, computing, each_backend, short

SCIPY = "scipy.stats.ks_2samp, row by row"


@dataclass
class Samples(Problem):
    x: Tensor
    y: Tensor
    checked: Tensor  # the rows whose results are compared
    rows: list[tuple[np.ndarray, np.ndarray]]  # those, for scipy


def make(
    rows: int,
    width: int,
    trained: bool,
    dtype: torch.dtype,
    other_width: int | None = None,
    checked: int | None = None,
) -> Samples:
    """An embedding, and either what a little training makes of it or another one, of another width if one is given.

    The results of `checked` rows, evenly spread, are compared; None: of all.
    """
    torch.manual_seed(0)
    before = 0.02 * torch.randn(rows, width)
    after = before + 1e-3 * torch.randn(rows, 1) if trained else 0.02 * torch.randn(rows, other_width or width)
    x, y = before.to(dtype), after.to(dtype)
    chosen = torch.linspace(0, rows - 1, checked or rows).round().long()
    pairs = list(zip(x[chosen].float().numpy(), y[chosen].float().numpy(), strict=True))
    return Samples(
        f"{rows} x {width}",
        1.0,
        short(dtype),
        (x.numel() + y.numel()) * dtype.itemsize,
        "samples",
        [expected.double() for expected in by_scipy(pairs)],
        x.to(DEVICE),
        y.to(DEVICE),
        chosen,
        pairs,
    )


def by_scipy(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[Tensor]:
    results = [stats.ks_2samp(x, y) for x, y in pairs]
    return [torch.tensor([getattr(result, name) for result in results]) for name in ("statistic", "pvalue")]


def scipy_rows(samples: Samples) -> Contender:
    return computing(lambda: by_scipy(samples.rows))


def by_op(samples: Samples, backend: Any) -> Contender:
    found: list[Any] = []

    def call() -> None:
        found[:] = [ops.ks_2samp(samples.x, samples.y, backend=backend)]

    return Contender(call, lambda: [x.cpu()[samples.checked] for x in (found[0].statistic, found[0].pvalue)])


def cases(small: bool, gpu: bool) -> list[Case]:
    contenders = (called if gpu else each_backend)("ks_2samp", by_op)
    ours = next(iter(contenders))

    def case(name: str, problem: Any, versus: dict[str, float | None], floor: Floor | None = None) -> Case:
        every = {**contenders, **dict.fromkeys(versus, scipy_rows)}
        return Case(f"ks_2samp, {name}", problem, every, ours, versus, WARM, tolerance=1e-12, floor=floor)

    if gpu:
        rows, width = (16, 64) if small else (128_256, 4096)
        return [
            case(
                f"{rows} x {width}, {short(dtype)}, p-values included",
                partial(make, rows, width, True, dtype, checked=min(rows, 64)),
                {},
                Floor(2.0 * rows * width * dtype.itemsize, "samples", most=most),
            )
            for dtype, most in ((BF16, 25e-3), (FP32, 50e-3))
        ]
    rows, width = (4, 256) if small else (64, 4096)
    other = width - width // 40  # p-values of different sizes are counted, not looked up
    different = partial(make, rows, width, False, FP32, other)
    table_rows, table_width = (16, 64) if small else (262_144, 640)  # Gemma 3 270M
    table = partial(make, table_rows, table_width, True, BF16, checked=min(table_rows, 64))
    floor = Floor(4.0 * table_rows * table_width, "samples", most=3.0)
    return [
        *[
            case(f"{kind}, {rows} x {width}{suffix}", partial(make, rows, width, trained, dtype), {SCIPY: bar})
            for kind, trained in (("a trained row", True), ("independent rows", False))
            for suffix, dtype, bar in (("", FP32, 40.0), (", bf16", BF16, 80.0))
        ],
        case(f"independent rows, {rows} x {width} and {other}", different, {SCIPY: None}),
        case(f"a whole trained table, {table_rows} x {table_width}, bf16", table, {}, floor),
    ]
