"""Samples of the squared gradients of vectors, sample by sample, and of whole gradients; see fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparsekernels import ops

from .case import BF16, FP32, Case, Layout, Maker, Sample, short
from .fisher import HALVES_AND_DOUBLE, OUTPUTS, SIZES, activation, adding, index_of, padding_tokens
from .masked_grad import INF, NAN

LAYOUTS = (
    Layout("whole", (33,), 1),
    Layout("whole-one", (1,), 1),
    Layout("whole-long", (1100,), 1),
    Layout("none", (33,), 0),
    Layout("all", (33,), 1),
    Layout("last", (33,), -1.0),
    Layout("some", (300,), 0.3),
    Layout("int64", (300,), 0.3, wide=True),
    Layout("rows", (33,), 0.5, "row"),
)


def vector(
    layout: Layout,
    dtype: torch.dtype = FP32,
    size: tuple[int, int] = (2, 7),
    wanted: str = "both",
    norm: bool = False,
    padding: str | None = None,
    strided: bool = False,
    special: float | None = None,
) -> Callable[[Maker], Case]:
    """`norm`: the weight of a norm, with an input; else a bias. Padding has rows of 0 in grad_output."""

    def make(maker: Maker) -> Case:
        index = index_of(maker, layout)
        grad = activation(maker, (*size, *layout.shape), dtype, strided)
        x = activation(maker, (*size, *layout.shape), dtype, strided) if norm else None
        if padding is not None:
            grad[padding_tokens(padding, size)] = 0.0
        if special is not None:
            (grad if x is None else x)[0, -1, -1] = special
        grads = grad.cpu().double() * (1.0 if x is None else x.cpu().double())
        return adding(
            maker, ops.fisher_vector_, (grad, x), grads.sum(1), index, None, wanted, special is not None
        )  # fmt: skip

    return make


def vector_samples() -> Iterator[Sample]:
    layouts = {layout.name: layout for layout in LAYOUTS}

    def sample(name: str, layout: str, *args: Any, **more: Any) -> Sample:
        return Sample("fisher_vector_", name, vector(layouts[layout], *args, **more))

    for norm, tag in ((False, "bias"), (True, "norm")):
        for name in layouts:
            yield sample(f"{tag}-{name}", name, norm=norm)
        for dtype in HALVES_AND_DOUBLE:
            yield sample(f"{tag}-whole-{short(dtype)}", "whole", dtype, (5, 33), norm=norm)
            yield sample(f"{tag}-some-{short(dtype)}", "some", dtype, norm=norm)
        for size in (*SIZES, (0, 7), (70, 5), (2, 1100)):
            yield sample(f"{tag}-whole-{size[0]}x{size[1]}", "whole", size=size, norm=norm)
        for name in ("whole", "some"):
            for wanted in OUTPUTS:
                yield sample(f"{tag}-{name}-{wanted}", name, wanted=wanted, norm=norm)
            for padding in ("right", "left", "holes", "all"):
                yield sample(f"{tag}-{name}-padding-{padding}", name, size=(5, 9), norm=norm, padding=padding)
            for dtype in (FP32, BF16):
                yield sample(f"{tag}-{name}-strided-{short(dtype)}", name, dtype, norm=norm, strided=True)
        for value in (NAN, INF, 1e30, 1e-40):
            yield sample(f"{tag}-special-{value}", "whole", norm=norm, special=value)
        yield sample(f"{tag}-all-special-nan", "all", norm=norm, special=NAN)


ODD_SHAPES = ((17, 33), (1,), (0,), (3, 4, 5), (5003,), (), (2, 0, 3), (64, 64))


def squares(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, strided: bool = False, special: bool = False
) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        wide = torch.promote_types(dtype, FP32)
        totals = [maker.randn(*shape, dtype=wide) for shape in shapes]
        grads = [maker.strided(*s, dtype=dtype) if strided else maker.randn(*s, dtype=dtype) for s in shapes]
        if special:
            for grad in grads:
                grad.view(-1)[:5] = torch.tensor([NAN, INF, -INF, 1e30, 1e-30], dtype=dtype)[: grad.numel()]
        pairs = zip(totals, grads, strict=True)
        expected = [total.cpu().double() + grad.cpu().double().square() for total, grad in pairs]
        if special:
            expected = [x.to(wide) for x in expected]
        raw = (totals, [grad.contiguous() for grad in grads])
        return Case(ops.fisher_squares_, (totals, grads), raw, expected, mutated=totals)

    return make


def squares_samples() -> Iterator[Sample]:
    for dtype in (FP32, *HALVES_AND_DOUBLE):
        tag = short(dtype)
        yield Sample("fisher_squares_", f"odd-{tag}", squares(ODD_SHAPES, dtype))
        yield Sample("fisher_squares_", f"one-{tag}", squares(((1023,),), dtype))
        yield Sample("fisher_squares_", f"strided-{tag}", squares(((17, 33), (1, 5), (64, 2)), dtype, strided=True))
    for dtype in (FP32, BF16):
        yield Sample("fisher_squares_", f"special-{short(dtype)}", squares(((3, 4), (1,), (19,)), dtype, special=True))
    yield Sample("fisher_squares_", "all-empty", squares(((0,), (3, 0)), FP32))
    yield Sample("fisher_squares_", "many", squares(tuple((n % 7, 3) for n in range(40)), FP32))
    yield Sample("fisher_squares_", "no-tensors", squares((), FP32))


def fisher_vector_samples() -> Iterator[Sample]:
    yield from vector_samples()
    yield from squares_samples()
