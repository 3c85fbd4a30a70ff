"""Samples of the gradients of singular values; the oracle takes the diagonal of the whole product, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsekernels import ops

from .case import BF16, FP16, FP32, FP64, Case, Maker, Sample, short

NAN = float("nan")
SIZES = {  # rows and columns of the weight, pairs of singular vectors
    "one": (1, 1, 1),
    "odd": (17, 33, 13),
    "rank-0": (17, 33, 0),
    "rank-1": (17, 33, 1),
    "over-rank": (5, 7, 40),
    "wide": (3, 200, 5),
    "tall": (300, 5, 2),
    "row": (1, 33, 9),
    "column": (33, 1, 9),
    "no-rows": (0, 7, 3),
    "no-columns": (7, 0, 3),
    "whole-blocks": (64, 48, 96),  # no block of a native loop is cut off
}
LARGE = {
    "panels": (40, 70, 101),  # more than one panel of vectors, the last one narrow
    "deep": (70, 530, 49),  # more columns than are summed at once
    "pages": (16, 1024, 5),  # rows as long as a page
    "301x299": (301, 299, 60),
}
BY_NAME = {**SIZES, **LARGE}
# Where tokens are many beside the vectors, the weight's gradient is the cheaper way, a few rows at a time.
FEW, MANY = (40, 40, 7), (17, 33, 60)
Size = tuple[int, int, int]


def diagonal(u: Tensor, grad: Tensor, v: Tensor) -> Tensor:
    return (u.cpu().double().T @ grad @ v.cpu().double()).diagonal()


def tensor(maker: Maker, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Tensor:
    if not strided or len(shape) < 2:
        return maker.randn(*shape, dtype=dtype)
    lead = torch.Size(shape[:-1]).numel()
    return maker.strided(lead, shape[-1], dtype=dtype).unflatten(0, shape[:-1])


def whole(
    size: Size, dtype: torch.dtype = FP32, matrices: int | None = 2, strided: bool = False, special: float | None = None
) -> Callable[[Maker], Case]:
    """matrices: None for one, without a dimension for it. special: the last number of the last gradient."""

    def make(maker: Maker) -> Case:
        (m, n, r), lead = size, () if matrices is None else (matrices,)
        grad = tensor(maker, (*lead, m, n), dtype, strided)
        u, v = (tensor(maker, (*lead, x, r), torch.promote_types(dtype, FP32), strided) for x in (m, n))
        if special is not None:
            grad[..., -1, -1, -1] = special
        raw = [x.contiguous() if matrices is not None else x.contiguous()[None] for x in (grad, u, v)]
        each = [diagonal(uu, g.cpu().double(), vv) for g, uu, vv in zip(*raw, strict=True)]
        expected = torch.stack(each) if each else torch.zeros(0, r, dtype=FP64)
        expected = expected if matrices is not None else expected[0]
        return Case(ops.singular_value_grad, (grad, u, v), tuple(raw), [expected])

    return make


def whole_samples() -> Iterator[Sample]:
    def sample(name: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("singular_value_grad", name, whole(*args, **more), heavy)

    for name, size in SIZES.items():
        yield sample(name, size)
    for name, size in LARGE.items():
        yield sample(name, size, heavy=True)
    for dtype in (BF16, FP16, FP64):
        for name in ("one", "odd", "over-rank", "whole-blocks", "no-columns"):
            yield sample(f"{name}-{short(dtype)}", SIZES[name], dtype)
        for name in LARGE:
            yield sample(f"{name}-{short(dtype)}", LARGE[name], dtype, heavy=True)
    for dtype in (FP32, FP16):
        for matrices in (None, 0, 1, 3):
            yield sample(f"{matrices}-matrices-{short(dtype)}", SIZES["odd"], dtype, matrices)
        yield sample(f"strided-{short(dtype)}", SIZES["odd"], dtype, strided=True)
        yield sample(f"strided-single-{short(dtype)}", SIZES["odd"], dtype, None, strided=True)
    yield sample("many-matrices", (5, 7, 3), matrices=70, heavy=True)
    yield sample("groups", (20, 1000, 900), matrices=5, heavy=True)  # more than are packed at once
    for value in (NAN, 1e-40, 1e18):
        yield sample(f"special-{value}", SIZES["odd"], special=value)


def linear(
    size: Size,
    dtype: torch.dtype = FP32,
    tokens: tuple[int, ...] = (2, 7),
    per_sample: bool = False,
    ragged: bool = False,
    strided: bool = False,
    special: float | None = None,
) -> Callable[[Maker], Case]:
    """`tokens` are the leading dimensions of both activations.

    ragged: samples end early, one of them at once; the rest is zeros. special: a number in the last token of the first
    sample, which must not be seen in others.
    """

    def make(maker: Maker) -> Case:
        m, n, r = size
        grad, x = (tensor(maker, (*tokens, width), dtype, strided) for width in (m, n))
        u, v = (tensor(maker, (width, r), torch.promote_types(dtype, FP32), strided) for width in (m, n))
        if ragged:
            lengths = torch.tensor([tokens[1], 0, tokens[1] // 2, 1]).repeat(tokens[0])[: tokens[0], None]
            padding = torch.arange(tokens[1]) >= lengths
            grad[padding], x[padding] = 0.0, 0.0
        if special is not None:
            grad[0, -1, 0] = special
        raw = [a.contiguous() if a.dim() == 3 else a.contiguous()[None] for a in (grad, x)]
        expected = torch.zeros(raw[0].shape[0], r, dtype=FP64)
        for b, (dy, xb) in enumerate(zip(*raw, strict=True)):
            expected[b] = diagonal(u, dy.cpu().double().T @ xb.cpu().double(), v)
        return Case(
            ops.singular_value_grad_linear,
            (grad, x, u, v),
            (*raw, u.contiguous(), v.contiguous(), per_sample),
            [expected if per_sample else expected.sum(0)],
            kwargs={"per_sample": True} if per_sample else {},
        )

    return make


def linear_samples() -> Iterator[Sample]:
    def sample(name: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("singular_value_grad_linear", name, linear(*args, **more), heavy)

    for by in (False, True):
        tag = "-per-sample" if by else ""
        for name, size in SIZES.items():
            yield sample(f"{name}{tag}", size, per_sample=by)
        for name, size in LARGE.items():
            yield sample(f"{name}{tag}", size, tokens=(3, 37), per_sample=by, heavy=True)
        for tokens in ((0, 7), (1, 1), (1, 70), (5, 0), (5, 1), (9, 3), (2, 8), (3, 33)):
            yield sample(f"{tokens[0]}x{tokens[1]}{tag}", FEW, tokens=tokens, per_sample=by)
            yield sample(f"{tokens[0]}x{tokens[1]}-bf16{tag}", MANY, BF16, tokens=tokens, per_sample=by)
        for dtype in (BF16, FP16, FP64):
            for name in ("one", "odd", "over-rank", "whole-blocks"):
                yield sample(f"{name}-{short(dtype)}{tag}", SIZES[name], dtype, per_sample=by)
            for name in LARGE:
                size = LARGE[name]
                yield sample(f"{name}-{short(dtype)}{tag}", size, dtype, (2, 90), per_sample=by, heavy=True)
        for dtype in (FP32, FP16):
            yield sample(f"strided-{short(dtype)}{tag}", FEW, dtype, per_sample=by, strided=True)
            yield sample(f"ragged-{short(dtype)}{tag}", FEW, dtype, (5, 11), per_sample=by, ragged=True)
            yield sample(f"ragged-many-{short(dtype)}{tag}", MANY, dtype, (5, 11), per_sample=by, ragged=True)
        for value in (NAN, 1e-40, 1e18):
            yield sample(f"special-{value}{tag}", FEW, tokens=(4, 5), per_sample=by, special=value)
        for tokens in ((1, 600), (7, 90), (150, 4)):  # longer than a task, or than what is summed at once
            yield sample(f"{tokens[0]}x{tokens[1]}-few{tag}", FEW, tokens=tokens, per_sample=by, heavy=True)
            yield sample(f"{tokens[0]}x{tokens[1]}-many{tag}", MANY, tokens=tokens, per_sample=by, heavy=True)
            yield sample(f"{tokens[0]}x{tokens[1]}-f64{tag}", MANY, FP64, tokens=tokens, per_sample=by, heavy=True)
        for rank in (2, 8):  # more tokens than have sums of their own, or are packed at once
            yield sample(f"long-{rank}{tag}", (9, 8, rank), tokens=(2, 9000), per_sample=by, heavy=True)
        yield sample(f"large-many{tag}", (301, 299, 330), tokens=(2, 300), per_sample=by, heavy=True)
    for dtype in (FP32, BF16):
        yield sample(f"2d-{short(dtype)}", FEW, dtype, (29,))
        yield sample(f"2d-many-{short(dtype)}", MANY, dtype, (29,), strided=True)


def singular_values_samples() -> Iterator[Sample]:
    yield from whole_samples()
    yield from linear_samples()
