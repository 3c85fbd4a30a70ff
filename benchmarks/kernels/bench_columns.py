"""The narrow activations of a layer that lost rows and columns, and such a layer.

take_columns stands beside index_select, put_columns beside zeros with columns assigned or copied into them. The
compressed linear layer, of which 40 % was removed (77.5 % of the rows and of the columns are left), stands beside the
whole layer, zeros and all, and beside the same in PyTorch's lines.

The floor is memory for all but that layer: each op reads its operands once and writes its results once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_gates import BF16, FP32, Tensors, case, computing, error, short, size
from compare import DEVICE, Case, Contender
from torch import Tensor

from sparsekernels import ops

LEFT = 0.775  # of rows and of columns: 40 % of the weight is gone
SELECT, INDEX = "x.index_select(1, columns)", "x[:, columns]"
ASSIGN, COPY = "x.new_zeros(T, N)[:, columns] = x", "x.new_zeros(T, N).index_copy_(1, columns, x)"
WHOLE, LINES = "the whole nn.Linear", "index_select, F.linear, index_copy_"


def some(width: int) -> Tensor:
    return torch.randperm(width)[: round(LEFT * width)].sort().values.to(DEVICE)


def make_columns(t: int, width: int, dtype: torch.dtype, put: bool) -> Tensors:
    torch.manual_seed(0)
    columns, whole = some(width), torch.randn(t, width, device=DEVICE).to(dtype)
    narrow = whole[:, columns].contiguous()
    spread = torch.zeros_like(whole)
    spread[:, columns] = narrow
    given = (narrow if put else whole, columns, width)
    expected = [(spread if put else narrow).double()]
    return Tensors(f"{t} x {width}", LEFT, short(dtype), size(whole, narrow), "wide + narrow", expected, given)


def take_op(p: Tensors, backend: Any = None) -> Contender:
    x, columns, _ = p.given
    return computing(lambda: [ops.take_columns(x, columns, backend=backend)])


def put_op(p: Tensors, backend: Any = None) -> Contender:
    return computing(lambda: [ops.put_columns(*p.given, backend=backend)])


def take_lines(p: Tensors, index: bool) -> Contender:
    x, columns, _ = p.given
    return computing(lambda: [x[:, columns]] if index else [x.index_select(1, columns)])


def spread_by_lines(x: Tensor, columns: Tensor, width: int, copy: bool) -> Tensor:
    out = x.new_zeros(x.shape[0], width)
    if copy:
        return out.index_copy_(1, columns, x)
    out[:, columns] = x
    return out


def put_lines(p: Tensors, copy: bool) -> Contender:
    return computing(lambda: [spread_by_lines(*p.given, copy)])


def make_linear(t: int, m: int, n: int, dtype: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    rows, columns = some(m), some(n)
    x = torch.randn(t, n, device=DEVICE).to(dtype)
    small, bias = torch.randn(len(rows), len(columns), device=DEVICE) / n**0.5, torch.randn(len(rows), device=DEVICE)
    small, bias = small.to(dtype), bias.to(dtype)
    weight, whole_bias = x.new_zeros(m, n), x.new_zeros(m)
    weight[rows[:, None], columns], whole_bias[rows] = small, bias
    expected = [F.linear(x.double(), weight.double(), whole_bias.double())]
    moved = size(x, small, bias) + t * m * dtype.itemsize
    given = (x, rows, columns, small, bias, weight, whole_bias)
    return Tensors(f"{t} tokens, {m} x {n}", LEFT**2, short(dtype), moved, "x + narrow weight + y", expected, given)


def linear_op(p: Tensors, backend: Any = None) -> Contender:
    x, rows, columns, small, bias, weight, _ = p.given
    m = weight.shape[0]

    def compute() -> list[Tensor]:
        narrow = F.linear(ops.take_columns(x, columns, backend=backend), small, bias)
        return [ops.put_columns(narrow, rows, m, backend=backend)]

    return computing(compute)


def linear_whole(p: Tensors) -> Contender:
    x, *_, weight, bias = p.given
    return computing(lambda: [F.linear(x, weight, bias)])


def linear_lines(p: Tensors) -> Contender:
    x, rows, columns, small, bias, weight, _ = p.given
    m = weight.shape[0]
    return computing(lambda: [spread_by_lines(F.linear(x.index_select(1, columns), small, bias), rows, m, True)])


def cases(small: bool) -> list[Case]:
    def columns(t: int, width: int, dtype: torch.dtype) -> list[Case]:
        name, put = f"{LEFT:.1%} of {t} x {width}, {short(dtype)}", partial(make_columns, t, width, dtype)
        takers = {SELECT: partial(take_lines, index=False), INDEX: partial(take_lines, index=True)}
        putters = {ASSIGN: partial(put_lines, copy=False), COPY: partial(put_lines, copy=True)}
        return [
            case("take_columns", name, partial(put, put=False), take_op, takers, 0),
            case("put_columns", name, partial(put, put=True), put_op, putters, 0),
        ]

    def linear(t: int, m: int, n: int, dtype: torch.dtype) -> Case:
        name, make = f"{t} tokens, {m} x {n}, {short(dtype)}", partial(make_linear, t, m, n, dtype)
        others = {WHOLE: linear_whole, LINES: linear_lines}
        return case("compressed linear", name, make, linear_op, others, error(dtype, 1e-5), served="take_columns")

    shapes = [(20, 32)] if small else [(512, 384), (2048, 384), (2048, 1536), (1024, 4096)]
    layers = [(20, 32, 48)] if small else [(t, *shape) for shape in ((384, 1536), (2048, 2048)) for t in (2048, 512)]
    return [
        *[each for shape in shapes for dtype in (FP32, BF16) for each in columns(*shape, dtype)],
        *[linear(*layer, dtype) for layer in layers for dtype in (FP32, BF16)],
    ]


def test_columns(compete: Callable[..., None], case: Case, name: str, state: str) -> None:
    compete(case, name, state)
