"""The k largest scores over a list of tensors: topk, beside torch.topk of their concatenation.

A selection needs no order, so torch.topk runs with sorted=False, its faster setting. Its ties go anywhere; ours go to
the lowest position, which the tests compare. Here it is the selected values, and that every position occurs once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekernels import ops

from ..timing import DEVICE
from .case import BF16, FP32, Case, Contender, Floor, Problem, called, each_backend, short

JOINED = "torch.topk(torch.cat)"


@dataclass
class Ranking(Problem):
    scores: list[Tensor]
    k: int
    magnitude: bool


def make(count: int, numel: int, density: float, magnitude: bool, dtype: torch.dtype) -> Ranking:
    torch.manual_seed(0)
    scores = [torch.randn(numel, device=DEVICE).to(dtype) for _ in range(count)]
    k = max(1, int(density * count * numel))
    joined = torch.cat(scores)
    best = (joined.abs() if magnitude else joined).sort(descending=True).values[:k]
    passes = dtype.itemsize // 2 + 1
    return Ranking(
        f"{count} x {numel}",
        density,
        short(dtype),
        passes * joined.numel() * dtype.itemsize + 8 * k,
        f"{passes} x scores + 8 K",
        [best.double(), torch.tensor([k], dtype=torch.float64)],
        scores,
        k,
        magnitude,
    )


def solved(ranking: Ranking, select: Callable[[], Tensor | list[Tensor]]) -> Contender:
    """`select` returns positions in the concatenation, or in each tensor."""
    found: list[Any] = []

    def call() -> None:
        found[:] = [select()]

    def result() -> list[Tensor]:
        chosen = found[0]
        if not isinstance(chosen, Tensor):
            numel = ranking.scores[0].numel()
            chosen = torch.cat([part + i * numel for i, part in enumerate(chosen)])
        values = torch.cat(ranking.scores)[chosen].double()
        values = values.abs() if ranking.magnitude else values
        return [values.sort(descending=True).values, torch.tensor([float(chosen.unique().numel())])]

    return Contender(call, result)


def by_op(ranking: Ranking, backend: Any) -> Contender:
    return solved(ranking, lambda: ops.topk(ranking.scores, ranking.k, magnitude=ranking.magnitude, backend=backend))


def by_torch(ranking: Ranking) -> Contender:
    def select() -> Tensor:
        joined = torch.cat([score.abs() if ranking.magnitude else score for score in ranking.scores])
        return torch.topk(joined, ranking.k, sorted=False).indices

    return solved(ranking, select)


def cases(small: bool, gpu: bool) -> list[Case]:
    contenders: dict[str, Callable[[Any], Contender]] = (called if gpu else each_backend)("topk", by_op)
    ours = next(iter(contenders))
    contenders[JOINED] = by_torch

    def case(name: str, *arguments: Any, floor: Floor | None = None) -> Case:
        return Case(
            f"topk, {name}", partial(make, *arguments), contenders, ours, {JOINED: None}, tolerance=0.0, floor=floor
        )

    if gpu:
        count, numel = (5, 2000) if small else (50, 20_000_000)
        every = count * numel
        floor = Floor(4.0 * every + 8 * (every // 100), "scores once + positions", share=1 / 3)
        return [case(f"1 % of {every:.0e} in {count} tensors, fp32", count, numel, 0.01, False, FP32, floor=floor)]
    numel = 2**13 if small else 2**19
    sizes = f"of 8 x {numel}"
    return [
        case(f"1 % {sizes}", 8, numel, 0.01, False, FP32),
        case(f"1 % of |x|, {sizes}", 8, numel, 0.01, True, FP32),
        case(f"50 % {sizes}", 8, numel, 0.5, False, FP32),
        case(f"1 % {sizes}, bf16", 8, numel, 0.01, False, BF16),
        case("1 % of 8 x 1000", 8, 1000, 0.01, False, FP32),
        case("1 % of 1 x 1000", 1, 1000, 0.01, False, FP32),
    ]
