"""Samples of topk; the oracle is numpy's stable sort of everything joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sparsekernels import ops

from .case import BF16, FP16, FP32, FP64, Case, Maker, Sample, short

INF = float("inf")
Build = Callable[[Maker], list[Tensor]]


def oracle(scores: list[Tensor], k: int, magnitude: bool) -> list[Tensor]:
    values = np.concatenate([s.cpu().double().numpy().reshape(-1) for s in scores])
    best = np.sort(np.argsort(-np.abs(values) if magnitude else -values, kind="stable")[:k])
    ends = np.cumsum([s.numel() for s in scores])
    pieces = np.split(best, np.searchsorted(best, ends[:-1]))
    return [torch.from_numpy(piece - (end - s.numel())) for piece, end, s in zip(pieces, ends, scores, strict=True)]


def topk(build: Build, k: int | float, magnitude: bool) -> Callable[[Maker], Case]:
    """`k` is a number of entries, or a share of them if it is a float."""

    def make(maker: Maker) -> Case:
        scores = build(maker)
        total = sum(score.numel() for score in scores)
        count = k if isinstance(k, int) else max(1, round(k * total))
        return Case(
            ops.topk,
            (scores, count),
            ([score.contiguous() for score in scores], count, magnitude),
            oracle(scores, count, magnitude),
            kwargs={"magnitude": magnitude},
            exact=True,
        )

    return make


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = FP32, scale: float = 1.0) -> Build:
    return lambda maker: [maker.randn(*shape, dtype=dtype, scale=scale) for shape in shapes]


def ties(*shapes: tuple[int, ...], levels: int, dtype: torch.dtype = FP32) -> Build:
    """Few different values, so that the cut falls among equal ones."""

    def build(maker: Maker) -> list[Tensor]:
        sizes = [torch.Size(shape) for shape in shapes]
        return [maker.put((maker.integers(levels, s.numel()) - levels // 2).to(dtype).view(s)) for s in sizes]

    return build


def listed(*values: float, dtype: torch.dtype = FP32) -> Build:
    return lambda maker: [maker.put(torch.tensor(values, dtype=dtype))]


def strided(maker: Maker) -> list[Tensor]:
    return [maker.strided(9, 14, dtype=FP32), maker.randn(5)]


SHAPES = ((17, 33), (4,), (3, 5, 7))
BUILDS: dict[str, Build] = {
    "normal": normal((40, 50)),
    "list": normal(*SHAPES),
    "list-with-empty": normal((0,), (17, 3), (0, 5), (11,), (0,)),
    "tiny-spread": lambda maker: [1 + t * 2**-20 for t in normal((40, 50))(maker)],  # differ in the low bits only
    "huge-and-tiny": lambda maker: [t.exp2() for t in normal((30, 30), scale=40.0)(maker)],
    "denormal": normal((20, 20), scale=1e-41),
    "ties": ties(*SHAPES, levels=5),
    "all-equal": ties((7, 9), (5,), levels=1),
    "zeros": listed(0.0, -0.0, -0.0, 0.0, -1.0, 0.0),
    "infinite": listed(1.0, -INF, INF, 3e38, -3e38, INF, 0.0, -INF),
    "negative": lambda maker: [-t.abs() for t in normal(*SHAPES)(maker)],
    "strided": strided,
    "blocks": normal((61, 59), (7, 300)),
    "blocks-ties": ties((61, 59), (7, 300), levels=9),
}


def topk_samples() -> Iterator[Sample]:
    for name, build in BUILDS.items():
        for k in (1, 0.1, 0.5, 1.0):
            for magnitude in (False, True):
                tag = f"{name}-k{k}{'-magnitude' * magnitude}"
                yield Sample("topk", tag, topk(build, k, magnitude))
    for dtype in (BF16, FP16, FP64):
        for magnitude in (False, True):
            tag = f"{short(dtype)}{'-magnitude' * magnitude}"
            yield Sample("topk", f"normal-{tag}", topk(normal(*SHAPES, dtype=dtype), 0.3, magnitude))
            yield Sample("topk", f"ties-{tag}", topk(ties(*SHAPES, levels=7, dtype=dtype), 0.3, magnitude))
            yield Sample("topk", f"infinite-{tag}", topk(listed(1, -INF, INF, -5, INF, dtype=dtype), 2, magnitude))
    for k in (0.01, 0.5):  # more than one thread's worth
        many = {"normal": normal((301, 299), (70, 1000)), "ties": ties((301, 299), (70, 1000), levels=9)}
        for name, build in many.items():
            yield Sample("topk", f"many-{name}-k{k}", topk(build, k, magnitude=True), heavy=True)
    for k in range(1, 7):  # the cut at every place, across two tensors
        yield Sample("topk", f"zeros-cut-{k}", topk(BUILDS["zeros"], k, False))
