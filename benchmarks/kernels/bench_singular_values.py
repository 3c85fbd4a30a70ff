"""Gradients of singular values: both ops, beside the two lines of PyTorch for each that give the same.

singular_value_grad_linear stands beside both projections, multiplied and summed, which take T x R of memory each, and
beside the weight's gradient, M x N, multiplied with V and row-dotted with U. Which of the two is the better one depends
on the sizes; the op chooses. singular_value_grad stands beside the latter, and beside the diagonal of U^T G V, which is
what one writes first. Where activations are bf16, the alternatives are given them widened, within the timed region; one
rounds the vectors to bf16 instead, and is as far off as that.

The floor is arithmetic: 2 T R (M + N) operations, or 2 M N (T + R) by way of the gradient, at the pace of a matmul.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekernels import ops

from ..timing import DEVICE
from .case import BF16, CUT_OFF, FP32, WARM, Case, Contender, Floor, Problem, called, computing, short

PROJECTIONS, GRADIENT = "((dY @ U) * (X @ V)).sum(0)", "(U * ((dY.T @ X) @ V)).sum(0)"
ROUNDED = "((dY @ U.bfloat16()) * (X @ V.bfloat16())).sum(0)"
PRODUCTS = "products alone"
BY_SAMPLE = "((dY @ U) * (X @ V)).sum(1)"
ROW_DOTS, DIAGONAL = "(U * (G @ V)).sum(-2)", "diagonal of U.mT @ G @ V"


@dataclass
class Factors(Problem):
    """`left` and `right` are dY and X, [B, S, M] and [B, S, N]; or the gradients, [L, M, N], and None."""

    left: Tensor
    right: Tensor | None
    u: Tensor
    v: Tensor


def make_linear(
    size: tuple[int, int], shape: tuple[int, int], rank: int, dtype: torch.dtype, per_sample: bool
) -> Factors:
    torch.manual_seed(0)
    (b, s), (m, n) = size, shape
    dy, x = (torch.randn(b, s, width, device=DEVICE).to(dtype) for width in shape)
    u, v = (torch.randn(width, rank, device=DEVICE) for width in shape)
    expected = ((dy.double() @ u.double()) * (x.double() @ v.double())).sum(1 if per_sample else (0, 1))
    moved = dtype.itemsize * b * s * (m + n) + 4 * (m + n) * rank + 4 * expected.numel()
    name = f"{b} x {s} tokens, {m} x {n}, {rank} pairs"
    return Factors(name, 1.0, short(dtype), moved, "activations + vectors + result", [expected], dy, x, u, v)


def make_whole(count: int, shape: tuple[int, int], rank: int) -> Factors:
    torch.manual_seed(0)
    grad = torch.randn(count, *shape, device=DEVICE)
    u, v = (torch.randn(count, width, rank, device=DEVICE) for width in shape)
    expected = torch.stack(
        [(uu.double() * (g.double() @ vv.double())).sum(0) for g, uu, vv in zip(grad, u, v, strict=True)]
    )
    moved = 4 * (grad.numel() + u.numel() + v.numel() + expected.numel())
    name = f"{count} x {shape[0]} x {shape[1]}, {rank} pairs"
    return Factors(name, 1.0, "float32", moved, "gradients + vectors + result", [expected], grad, None, u, v)


def linear_op(p: Factors, backend: Any = None, per_sample: bool = False) -> Contender:
    assert p.right is not None
    x = p.right
    return computing(
        lambda: ops.singular_value_grad_linear(p.left, x, p.u, p.v, per_sample=per_sample, backend=backend)
    )


def projections(p: Factors, per_sample: bool = False, rounded: bool = False) -> Contender:
    assert p.right is not None
    dy, x = (p.left, p.right) if per_sample else (p.left.flatten(0, 1), p.right.flatten(0, 1))
    u, v = (p.u.to(dy.dtype), p.v.to(dy.dtype)) if rounded else (p.u, p.v)
    return computing(
        lambda: ((dy.to(u.dtype) @ u) * (x.to(v.dtype) @ v)).sum(1 if per_sample else 0).float(),
        tolerance=0.1 if rounded else None,
    )


def by_gradient(p: Factors) -> Contender:
    assert p.right is not None
    dy, x = p.left.flatten(0, 1), p.right.flatten(0, 1)
    return computing(lambda: (p.u * ((dy.float().T @ x.float()) @ p.v)).sum(0))


def whole_op(p: Factors, backend: Any = None) -> Contender:
    return computing(lambda: ops.singular_value_grad(p.left, p.u, p.v, backend=backend))


def row_dots(p: Factors) -> Contender:
    return computing(lambda: (p.u * (p.left @ p.v)).sum(-2))


def diagonal(p: Factors) -> Contender:
    return computing(lambda: torch.diagonal(p.u.mT @ p.left @ p.v, dim1=-2, dim2=-1))


def products_alone(p: Factors) -> Contender:
    assert p.right is not None
    dy, x = p.left[0].float(), p.right[0].float()
    expected = [dy.double() @ p.u.double(), x.double() @ p.v.double()]
    return computing(lambda: [dy @ p.u, x @ p.v], expected=expected)


LINEAR = {
    **called("singular_value_grad_linear", linear_op),
    PROJECTIONS: projections,
    GRADIENT: by_gradient,
}
PER_SAMPLE = {
    **called("singular_value_grad_linear", linear_op, per_sample=True),
    BY_SAMPLE: partial(projections, per_sample=True),
}
WHOLE = {**called("singular_value_grad", whole_op), ROW_DOTS: row_dots, DIAGONAL: diagonal}
# Tokens, rows and columns of the weight.
SHAPES = (
    (500, 384, 384),
    (2048, 384, 1536),
    (2048, 1536, 384),
    (2048, 768, 768),
    (1024, 2048, 2048),
    (1024, 4096, 1024),
)


def cases(small: bool, gpu: bool) -> list[Case]:
    if gpu:
        return [gpu_case(*(32, 48) if small else (4096, 4096))]

    def linear(
        size: tuple[int, int],
        shape: tuple[int, int],
        rank: int,
        dtype: torch.dtype = FP32,
        per_sample: bool = False,
    ) -> Case:
        kind = ("per sample, " if per_sample else "") + ("bf16, " if dtype == BF16 else "")
        tokens = f"{size[0]} x {size[1]} tokens" if per_sample else f"{size[1]} tokens"
        contenders = {**(PER_SAMPLE if per_sample else LINEAR)}
        if dtype == BF16:
            contenders[ROUNDED] = partial(projections, rounded=True)
        op = "singular_value_grad_linear"
        return Case(
            f"{op}, {kind}{tokens}, {shape[0]} x {shape[1]}, {rank} pairs",
            partial(make_linear, size, shape, rank, dtype, per_sample),
            contenders,
            op,
            {name: None for name in contenders if not name.startswith(op)},
            WARM,
            tolerance=1e-5,
        )

    def whole(count: int, shape: tuple[int, int], rank: int) -> Case:
        op = "singular_value_grad"
        return Case(
            f"{op}, {count} x {shape[0]} x {shape[1]}, {rank} pairs",
            partial(make_whole, count, shape, rank),
            WHOLE,
            op,
            {ROW_DOTS: None, DIAGONAL: None},
            WARM,
            tolerance=1e-5,
        )

    if small:
        return [
            linear((1, 40), (48, 32), 32),
            linear((1, 40), (48, 32), 3, BF16),
            linear((4, 10), (48, 32), 3, per_sample=True),
            whole(3, (48, 32), 32),
        ]
    ranks = {shape: (min(shape[1:]), min(shape[1:]) // 10) for shape in SHAPES}
    return [
        *[linear((1, t), (m, n), rank) for t, m, n in SHAPES for rank in ranks[t, m, n]],
        *[linear((1, 2048), (768, 768), rank, BF16) for rank in (768, 76)],
        *[linear((32, 64), (768, 768), rank, per_sample=True) for rank in (768, 76)],
        *[whole(6, shape, rank) for shape in ((384, 384), (768, 768)) for rank in (shape[0], shape[0] // 10)],
        *[whole(1, (2048, 2048), rank) for rank in (2048, 204)],
    ]


def gpu_case(tokens: int, width: int) -> Case:
    op = "singular_value_grad_linear"
    contenders = {
        **called(op, linear_op),
        PROJECTIONS: projections,
        ROUNDED: partial(projections, rounded=True),
        PRODUCTS: products_alone,
    }
    moved = (2.0 * tokens + 4.0 * width) * 2 * width
    return Case(
        f"{op}, {tokens} tokens, {width} x {width}, {width} pairs, bf16",
        partial(make_linear, (1, tokens), (width, width), width, BF16, False),
        contenders,
        op,
        {PROJECTIONS: None, ROUNDED: None, PRODUCTS: 0.7},
        tolerance=CUT_OFF,
        floor=Floor(moved, "activations + vectors", operations=4.0 * tokens * width * width),
    )
