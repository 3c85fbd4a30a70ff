"""Samples of gather and scatter_."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from sparsekernels import ops

from .case import (
    BF16,
    BY_NAME,
    FP16,
    FP32,
    Case,
    Layout,
    Maker,
    Sample,
    grid,
    put,
    raw_of,
    short,
    take,
    with_specials,
)


def gather(layout: Layout, dtype: torch.dtype, special: bool = False) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        source, index = maker.randn(*layout.shape, dtype=dtype), maker.index(layout)
        if special:
            with_specials(source)
        return Case(ops.gather, (source, index), (source, *raw_of(index)), [take(source, index)], exact=True)

    return make


def scatter_(
    layout: Layout, dtype: torch.dtype, values_dtype: torch.dtype, special: bool = False
) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        target, index = maker.randn(*layout.shape, dtype=dtype), maker.index(layout)
        values = maker.randn(*index.compact_shape, dtype=values_dtype)
        if special:
            with_specials(values)
        expected = put(target, index, values.cpu())
        raw = (target, index.positions, values.to(dtype), list(index.tile))
        touched = {"mutated": [target], "inside": [(target, index)]}
        return Case(ops.scatter_, (target, index, values), raw, [expected], exact=True, **touched)

    return make


def gather_scatter_samples() -> Iterator[Sample]:
    for layout, dtype in grid():
        tag = f"{layout.name}-{short(dtype)}"
        yield Sample("gather", tag, gather(layout, dtype))
        yield Sample("scatter_", tag, scatter_(layout, dtype, dtype))
    for dtype in (torch.int64, torch.uint8, torch.bool):
        yield Sample("gather", f"some-{short(dtype)}", gather(BY_NAME["some"], dtype))
    for name, dtype in itertools.product(("some", "many", "rows-3d", "columns-many", "blocks-cut"), (BF16, FP16)):
        yield Sample("scatter_", f"{name}-{short(dtype)}-from-f32", scatter_(BY_NAME[name], dtype, FP32))
    for dtype, name in itertools.product((FP32, BF16, FP16), ("int64", "columns-int64", "blocks-cut")):
        tag = f"special-{name}-{short(dtype)}"
        yield Sample("gather", tag, gather(BY_NAME[name], dtype, special=True))
        yield Sample("scatter_", tag, scatter_(BY_NAME[name], dtype, dtype, special=True))


def strided_values(maker: Maker) -> Case:
    """Compact values that are a transposed view."""
    layout = BY_NAME["rows-int64"]
    target, index = maker.randn(*layout.shape), maker.index(layout)
    values = maker.strided(*index.compact_shape, dtype=FP32)
    raw = (target, index.positions, values.contiguous(), list(index.tile))
    touched = {"mutated": [target], "inside": [(target, index)]}
    return Case(ops.scatter_, (target, index, values), raw, [put(target, index, values.cpu())], exact=True, **touched)
