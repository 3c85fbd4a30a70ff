"""Samples of gather, scatter_ and scatter_add_."""

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
    layout: Layout, dtype: torch.dtype, values_dtype: torch.dtype, add: bool, special: bool = False
) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        target, index = maker.randn(*layout.shape, dtype=dtype), maker.index(layout)
        values = maker.randn(*index.compact_shape, dtype=values_dtype)
        if special:
            with_specials(values)
        op_dtype = dtype
        written = values.cpu()
        if add:
            op_dtype = torch.promote_types(dtype, FP32)  # the sum is formed here and rounded once
            written = take(target, index).to(op_dtype) + written.to(op_dtype)
        expected = put(target, index, written)
        call = ops.scatter_add_ if add else ops.scatter_
        raw = (target, index.positions, values.to(op_dtype), index.rows)
        touched = {"mutated": [target], "inside": [(target, index)]}
        return Case(call, (target, index, values), raw, [expected], exact=True, **touched)

    return make


def gather_scatter_samples() -> Iterator[Sample]:
    for layout, dtype in grid():
        tag = f"{layout.name}-{short(dtype)}"
        yield Sample("gather", tag, gather(layout, dtype))
        yield Sample("scatter_", tag, scatter_(layout, dtype, dtype, add=False))
        yield Sample("scatter_add_", tag, scatter_(layout, dtype, dtype, add=True))
    for dtype in (torch.int64, torch.uint8, torch.bool):
        yield Sample("gather", f"some-{short(dtype)}", gather(BY_NAME["some"], dtype))
    for name, dtype in itertools.product(("some", "many", "rows-3d"), (BF16, FP16)):
        for op, add in (("scatter_", False), ("scatter_add_", True)):
            yield Sample(op, f"{name}-{short(dtype)}-from-f32", scatter_(BY_NAME[name], dtype, FP32, add))
    for dtype in (FP32, BF16, FP16):
        layout = BY_NAME["int64"]
        yield Sample("gather", f"special-{short(dtype)}", gather(layout, dtype, special=True))
        yield Sample("scatter_", f"special-{short(dtype)}", scatter_(layout, dtype, dtype, False, special=True))
        yield Sample("scatter_add_", f"special-{short(dtype)}", scatter_(layout, dtype, dtype, True, special=True))


def strided_values(add: bool) -> Callable[[Maker], Case]:
    """Compact values that are a transposed view."""

    def make(maker: Maker) -> Case:
        layout = BY_NAME["rows-int64"]
        target, index = maker.randn(*layout.shape), maker.index(layout)
        values = maker.strided(*index.compact_shape, dtype=FP32)
        written = values.cpu() + (take(target, index) if add else 0)
        call = ops.scatter_add_ if add else ops.scatter_
        raw = (target, index.positions, values.contiguous(), index.rows)
        touched = {"mutated": [target], "inside": [(target, index)]}
        return Case(call, (target, index, values), raw, [put(target, index, written)], exact=True, **touched)

    return make
