"""Samples of take_columns and put_columns: bits must move unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsekernels import ops

from .case import BF16, FP16, FP32, FP64, Case, Maker, Sample, short

ALL, NONE, FIRST, LAST, EVEN, RUNS = 1.0, 0.0, "first", "last", "even", "runs"
Which = float | str  # a share, drawn at random, or a name
Shape = tuple[int, ...]


def chosen(maker: Maker, width: int, which: Which, wide: bool) -> Tensor:
    i = torch.arange(width)
    if isinstance(which, str):
        named = {FIRST: i < 1, LAST: i >= width - 1, EVEN: i % 2 == 0, RUNS: i // 19 % 2 == 0}
        mask = named[which]
    else:
        order = torch.randperm(width, generator=maker.generator)
        mask = order < round(which * width)
    return maker.put(i[mask].to(torch.int64 if wide else torch.int32))


def matrix(maker: Maker, shape: Shape, dtype: torch.dtype, apart: int, strided: bool) -> Tensor:
    """apart: elements between rows."""
    if strided:
        return maker.strided(torch.Size(shape[:-1]).numel(), shape[-1], dtype=dtype).unflatten(0, shape[:-1])
    x = maker.randn(*shape[:-1], shape[-1] + apart, dtype=dtype)
    special = torch.tensor([float("inf"), -0.0, 1e-40, -float("inf")], dtype=FP64).to(dtype)
    x.view(-1)[: 4 * (x.numel() // 12)] = special.repeat(x.numel() // 12)  # NaN is test_gates.py's
    return x[..., : shape[-1]]


def flat(x: Tensor) -> Tensor:
    x = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def taken(
    shape: Shape, which: Which, dtype: torch.dtype = FP32, wide: bool = False, apart: int = 0, strided: bool = False
) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        x = matrix(maker, shape, dtype, apart, strided)
        columns = chosen(maker, shape[-1], which, wide)
        expected = [x.cpu()[..., columns.cpu().long()].clone()]
        return Case(ops.take_columns, (x, columns), (flat(x), columns), expected, exact=True)

    return make


def put(
    shape: Shape, which: Which, dtype: torch.dtype = FP32, wide: bool = False, apart: int = 0, strided: bool = False
) -> Callable[[Maker], Case]:
    """`shape` is that of the result."""

    def make(maker: Maker) -> Case:
        columns = chosen(maker, shape[-1], which, wide)
        x = matrix(maker, (*shape[:-1], len(columns)), dtype, apart, strided)
        expected = torch.zeros(shape, dtype=dtype)
        expected[..., columns.cpu().long()] = x.cpu()
        raw = (flat(x), columns, shape[-1])
        return Case(ops.put_columns, (x, columns, shape[-1]), raw, [expected], exact=True)

    return make


def columns_samples() -> Iterator[Sample]:
    for op, make in (("take_columns", taken), ("put_columns", put)):
        for dtype in (FP32, BF16, FP64):
            for width in (1, 15, 16, 17, 33, 100):
                for which in (ALL, 0.7, LAST):
                    yield Sample(op, f"5x{width}-{which}-{short(dtype)}", make((5, width), which, dtype))
            for which in (NONE, FIRST, EVEN, RUNS, 0.1):
                yield Sample(op, f"3x77-{which}-{short(dtype)}", make((3, 77), which, dtype, wide=True))
            yield Sample(op, f"apart-{short(dtype)}", make((7, 37), 0.6, dtype, apart=3))
            yield Sample(op, f"strided-{short(dtype)}", make((7, 37), 0.6, dtype, strided=True))
        for name, shape in {"1d": (37,), "3d": (2, 3, 37), "4d": (2, 1, 3, 37)}.items():
            yield Sample(op, f"{name}", make(shape, 0.5))
            yield Sample(op, f"{name}-apart", make(shape, 0.5, apart=2))
        for name, shape in {"no-rows": (0, 37), "no-rows-3d": (2, 0, 37), "no-columns": (4, 0), "one": (1, 1)}.items():
            yield Sample(op, name, make(shape, ALL))
            yield Sample(op, f"{name}-none", make(shape, NONE, BF16, wide=True))
        yield Sample(op, "fp16", make((9, 50), 0.775, FP16))
        for dtype in (FP32, BF16, FP64):
            yield Sample(op, f"large-{short(dtype)}", make((301, 1536), 0.775, dtype), heavy=True)
