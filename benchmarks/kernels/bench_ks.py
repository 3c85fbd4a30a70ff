"""Kolmogorov-Smirnov tests over the rows of two matrices: ks_2samp, beside scipy's function called row by row.

scipy gets rows of fp32 that lie ready as numpy arrays; rows of bf16 are widened for it outside of the timed region.

The floor of a row on the CPU is four passes: the range of the values, their buckets, the counting, which adds to a
number in the cache for each of N + M elements and so cannot be vectorised, and the sum over the buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from compare import DEVICE, Case, Contender, Problem, backends
from scipy import stats
from torch import Tensor

from sparsekernels import ops

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
        str(dtype).removeprefix("torch."),
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
    found: list[list[Tensor]] = []

    def call() -> None:
        found[:] = [by_scipy(samples.rows)]

    return Contender(call, lambda: found[0])


def by_op(samples: Samples, backend: Any) -> Contender:
    found: list[Any] = []

    def call() -> None:
        found[:] = [ops.ks_2samp(samples.x, samples.y, backend=backend)]

    return Contender(call, lambda: [x.cpu()[samples.checked] for x in (found[0].statistic, found[0].pvalue)])


def cases(small: bool) -> list[Case]:
    rows, width = (4, 256) if small else (64, 4096)
    contenders: dict[str, Callable[[Any], Contender]] = {
        **{f"ks_2samp {backend}": partial(by_op, backend=backend) for backend in backends("ks_2samp")},
        SCIPY: scipy_rows,
    }
    ours = next(iter(contenders))
    kinds = [("a trained row", True), ("independent rows", False)]
    dtypes = [("", torch.float32, 40.0), (", bf16", torch.bfloat16, 80.0)]
    other = width - width // 40  # p-values of different sizes are counted, not looked up
    different = Case(
        f"ks_2samp, independent rows, {rows} x {width} and {other}",
        partial(make, rows, width, False, torch.float32, other),
        contenders,
        ours,
        {SCIPY: None},
        states=("warm",),
        tolerance=1e-12,
    )
    return [
        Case(
            f"ks_2samp, {kind}, {rows} x {width}{suffix}",
            partial(make, rows, width, trained, dtype),
            contenders,
            ours,
            {SCIPY: bar},
            states=("warm",),
            tolerance=1e-12,
        )
        for kind, trained in kinds
        for suffix, dtype, bar in dtypes
    ] + [different]


def test_ks(compete: Callable[..., None], case: Case, name: str, state: str) -> None:
    compete(case, name, state)
