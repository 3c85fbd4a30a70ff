"""The narrow activations of a layer that lost rows and columns, and such a layer.

take_columns stands beside index_select, put_columns beside zeros with columns assigned or copied into them. The
compressed linear layer, of which 40 % was removed (77.5 % of the rows and of the columns are left), stands beside the
whole layer, zeros and all, and beside the same in PyTorch's lines.

The floor is memory for all but that layer: each op reads its operands once and writes its results once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekernels import ops

from ..timing import DEVICE
from .bench_gates import Tensors, case, error
from .case import BF16, FP32, Case, Contender, Floor, computing, short, size

LEFT = 0.775  # of rows and of columns: 40 % of the weight is gone
SELECT, INDEX = "x.index_select(1, columns)", "x[:, columns]"
ASSIGN, COPY = "x.new_zeros(T, N)[:, columns] = x", "x.new_zeros(T, N).index_copy_(1, columns, x)"
SMALL = "F.linear of the small size"
WHOLE, LINES = "the whole nn.Linear", "index_select, F.linear, index_copy_"


def left(width: int, multiple: int = 1) -> int:
    return round(LEFT * width) // multiple * multiple


def some(width: int, multiple: int = 1) -> Tensor:
    return torch.randperm(width)[: left(width, multiple)].sort().values.to(DEVICE)


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
    return computing(lambda: ops.take_columns(x, columns, backend=backend))


def put_op(p: Tensors, backend: Any = None) -> Contender:
    return computing(lambda: ops.put_columns(*p.given, backend=backend))


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


def make_linear(t: int, m: int, n: int, dtype: torch.dtype, multiple: int = 1) -> Tensors:
    """`multiple` of the rows and columns are left: tensor cores are slow where sizes are no multiple of 8."""
    torch.manual_seed(0)
    rows, columns = some(m, multiple), some(n, multiple)
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
    return computing(lambda: F.linear(x, weight, bias))


def linear_lines(p: Tensors) -> Contender:
    x, rows, columns, small, bias, weight, _ = p.given
    m = weight.shape[0]
    return computing(lambda: [spread_by_lines(F.linear(x.index_select(1, columns), small, bias), rows, m, True)])


def linear_small(p: Tensors) -> Contender:
    """The product alone, of columns that lie apart already."""
    x, rows, columns, small, bias, *_ = p.given
    narrow = x[:, columns].contiguous()
    return computing(lambda: F.linear(narrow, small, bias), expected=[p.expected[0][:, rows]])


TAKERS = {SELECT: partial(take_lines, index=False), INDEX: partial(take_lines, index=True)}
PUTTERS = {ASSIGN: partial(put_lines, copy=False), COPY: partial(put_lines, copy=True)}


def cases(small: bool, gpu: bool) -> list[Case]:
    if gpu:
        return gpu_cases(small)

    def columns(t: int, width: int, dtype: torch.dtype) -> list[Case]:
        name, put = f"{LEFT:.1%} of {t} x {width}, {short(dtype)}", partial(make_columns, t, width, dtype)
        return [
            case("take_columns", name, partial(put, put=False), take_op, TAKERS, 0),
            case("put_columns", name, partial(put, put=True), put_op, PUTTERS, 0),
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


def gpu_cases(small: bool) -> list[Case]:
    tokens, width = (32, 64) if small else (16_384, 14_336)
    fewer, m, n = (32, 64, 48) if small else (4096, 14_336, 4096)

    def columns(op: str, ours: Any, other: str, lines: Any) -> Case:
        name, make = f"{LEFT:.1%} of {tokens} x {width}, bf16", partial(make_columns, tokens, width, BF16)
        floor = Floor(2.0 * tokens * (width + left(width)), "wide + narrow")
        return case(op, name, partial(make, put=op == "put_columns"), ours, {other: lines[other]}, 0, floor=floor)

    def linear(multiple: int) -> Case:
        sizes = [left(width, multiple) for width in (m, n)]
        moved = 2.0 * (fewer * (m + n) + sizes[0] * sizes[1])
        return Case(
            f"compressed linear, {sizes[0]} x {sizes[1]} of {m} x {n}, {fewer} tokens, bf16",
            partial(make_linear, fewer, m, n, BF16, multiple),
            {"compressed linear": linear_op, SMALL: linear_small, WHOLE: linear_whole},
            "compressed linear",
            {SMALL: 0.85, WHOLE: None},
            tolerance=2**-7,
            floor=Floor(moved, "x + narrow weight + y", operations=2.0 * fewer * sizes[0] * sizes[1]),
        )

    return [
        columns("take_columns", take_op, SELECT, TAKERS),
        columns("put_columns", put_op, COPY, PUTTERS),
        linear(1),
        linear(8),
    ]
