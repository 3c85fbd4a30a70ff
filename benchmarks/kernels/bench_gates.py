"""Stochastic gates on a Linear, and the narrow layer that is left where gates have closed.

The alternatives are lines of PyTorch. Those of gated_weight and gate_gradient are given gates that somebody has drawn
already, while the ops draw theirs within the timed region. take_columns stands beside index_select, put_columns beside
zeros with columns assigned or copied into them. The compressed linear layer, of which 40 % was removed (77.5 % of the
rows and of the columns are left), stands beside the whole layer, zeros and all, and beside the same in PyTorch's lines.

The floor is memory for all but that layer: each op reads its operands once and writes its results once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from compare import DEVICE, Case, Contender, Problem, backends
from torch import Tensor

from sparsekernels import ops

FP32, BF16 = torch.float32, torch.bfloat16
LEFT = 0.775  # of rows and of columns: 40 % of the weight is gone
SIGMA = 0.5
STG: dict[str, Any] = {"kind": "stg", "noise": SIGMA}
SCALE, SUMS = "(W * z_r[:, None] * z_c).to(dtype)", "(a * b).sum(0), a.sum(0)"
SELECT, INDEX = "x.index_select(1, columns)", "x[:, columns]"
ASSIGN, COPY = "x.new_zeros(T, N)[:, columns] = x", "x.new_zeros(T, N).index_copy_(1, columns, x)"
WHOLE, LINES = "the whole nn.Linear", "index_select, F.linear, index_copy_"


@dataclass
class Tensors(Problem):
    """What a job is about, in the order in which its op takes it."""

    given: tuple[Any, ...]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def computing(compute: Callable[[], Sequence[Tensor]]) -> Contender:
    found: list[Tensor] = []

    def call() -> None:
        found[:] = compute()

    return Contender(call, lambda: found)


def drawn(logits: Tensor, key: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    return ops.gate_values(logits, **STG, key=key, stream=stream)


def some(width: int) -> Tensor:
    return torch.randperm(width)[: round(LEFT * width)].sort().values.to(DEVICE)


def make_weight(m: int, n: int, dtype: torch.dtype, out: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    weight, bias = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((m, n), (m,)))
    rows, columns = (0.4 * torch.randn(width, device=DEVICE) for width in (m, n))
    key = torch.tensor([7], device=DEVICE)
    z_r, z_c = drawn(rows, key, 0)[0], drawn(columns, key, 1)[0]
    expected = [weight.double() * z_r.double()[:, None] * z_c.double(), bias.double() * z_r.double()]
    moved = size(weight, bias, rows, columns) + (m * n + m) * out.itemsize
    given = (weight, bias, rows, columns, key, out, z_r, z_c)
    return Tensors(f"{m} x {n}", 1.0, short(dtype), moved, "weight + gated weight", expected, given)


def weight_op(p: Tensors, backend: Any = None) -> Contender:
    weight, bias, rows, columns, key, out, *_ = p.given
    return computing(lambda: ops.gated_weight(weight, bias, rows, columns, **STG, key=key, dtype=out, backend=backend))


def weight_lines(p: Tensors) -> Contender:
    weight, bias, _, _, _, out, z_r, z_c = p.given
    return computing(lambda: [(weight * z_r[:, None] * z_c).to(out), (bias * z_r).to(out)])


def make_gradient(t: int, width: int, dtype: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    a, b = (torch.randn(t, width, device=DEVICE).to(dtype) for _ in range(2))
    logits, key = 0.4 * torch.randn(width, device=DEVICE), torch.tensor([7], device=DEVICE)
    z, slopes = drawn(logits, key, 0)
    logits[(z > 0) & (z < 0.05)] = 9.0  # 1 / z knows z no better than 1e-7 / z
    z, slopes = drawn(logits, key, 0)
    by_value = torch.where(z == 0, 0, (a.double() * b.double()).sum(0) / z.double())
    expected = [slopes.double() * by_value, by_value, z.double() * a.double().sum(0)]
    moved = size(a, b, logits) + 12 * width
    return Tensors(f"{t} x {width}", 1.0, short(dtype), moved, "a + b", expected, (a, b, logits, key, z, slopes))


def gradient_op(p: Tensors, backend: Any = None) -> Contender:
    a, b, logits, key, *_ = p.given
    return computing(lambda: ops.gate_gradient(a, b, logits, **STG, key=key, backend=backend))


def gradient_lines(p: Tensors) -> Contender:
    a, b, _, _, z, slopes = p.given

    def compute() -> list[Tensor]:
        x = a.float()
        by_value = torch.where(z == 0, 0, (x * b.float()).sum(0) / z)
        return [slopes * by_value, by_value, z * x.sum(0)]

    return computing(compute)


def make_gates(count: int, width: int) -> Tensors:
    torch.manual_seed(0)
    logits = [0.4 * torch.randn(width, device=DEVICE) for _ in range(count)]
    score = (torch.cat(logits).double() + 0.5) / SIGMA
    expected = [torch.special.ndtr(score), torch.exp(-score.square() / 2) / (math.sqrt(2 * math.pi) * SIGMA)]
    moved = 3 * size(*logits)
    return Tensors(f"{count} x {width}", 1.0, "float32", moved, "logits + results", expected, (logits,))


def probabilities_op(p: Tensors, backend: Any = None) -> Contender:
    (logits,) = p.given
    return computing(lambda: ops.gate_probabilities(logits, **STG, backend=backend))


def probabilities_lines(p: Tensors) -> Contender:
    (logits,) = p.given

    def compute() -> list[Tensor]:
        score = (torch.cat(logits) + 0.5) / SIGMA
        return [torch.special.ndtr(score), torch.exp(-score.square() / 2) / (math.sqrt(2 * math.pi) * SIGMA)]

    return computing(compute)


def make_values(width: int) -> Tensors:
    logits = 0.4 * torch.randn(width, device=DEVICE)
    key = torch.tensor([7], device=DEVICE)
    expected = [x.double() for x in ops.gate_values(logits, **STG, key=key, backend="reference")]
    return Tensors(f"{width}", 1.0, "float32", 3 * size(logits), "logits + results", expected, (logits, key))


def values_op(p: Tensors, backend: Any = None) -> Contender:
    logits, key = p.given
    return computing(lambda: ops.gate_values(logits, **STG, key=key, backend=backend))


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


def case(op: str, name: str, make: Any, ours: Any, others: dict[str, Any], tolerance: float = 1e-6) -> Case:
    served = "take_columns" if op == "compressed linear" else op
    each = {f"{op} {b}": partial(ours, backend=b) for b in backends(served)}
    every = {op: ours, **each, **others}
    return Case(f"{op}, {name}", make, every, op, dict.fromkeys(others), tolerance=tolerance)


def cases(small: bool) -> list[Case]:
    def error(dtype: torch.dtype, wide: float) -> float:
        return 2**-8 if dtype == BF16 else wide

    def weight(m: int, n: int, dtype: torch.dtype, out: torch.dtype) -> Case:
        name = f"{m} x {n}, {short(dtype)} to {short(out)}"
        make = partial(make_weight, m, n, dtype, out)
        return case("gated_weight", name, make, weight_op, {SCALE: weight_lines}, error(out, 1e-6))

    def gradient(t: int, width: int, dtype: torch.dtype) -> Case:
        make = partial(make_gradient, t, width, dtype)
        return case("gate_gradient", f"{t} x {width}, {short(dtype)}", make, gradient_op, {SUMS: gradient_lines}, 1e-5)

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
        return case("compressed linear", name, make, linear_op, others, error(dtype, 1e-5))

    shapes = [(20, 32)] if small else [(512, 384), (2048, 384), (2048, 1536), (1024, 4096)]
    weights = [(32, 48)] if small else [(384, 384), (384, 1536), (2048, 2048)]
    layers = [(20, 32, 48)] if small else [(t, *shape) for shape in ((384, 1536), (2048, 2048)) for t in (2048, 512)]
    lists, width = ((3, 20), 40) if small else ((48, 1024), 4096)
    probabilities = case(
        "gate_probabilities",
        f"{lists[0]} x {lists[1]}",
        partial(make_gates, *lists),
        probabilities_op,
        {"torch.special.ndtr of torch.cat": probabilities_lines},
    )
    return [
        *[weight(*shape, *dtypes) for shape in weights for dtypes in ((FP32, FP32), (FP32, BF16), (BF16, BF16))],
        *[gradient(*shape, dtype) for shape in shapes for dtype in (FP32, BF16)],
        case("gate_values", f"{width}", partial(make_values, width), values_op, {}),
        probabilities,
        *[each for shape in shapes for dtype in (FP32, BF16) for each in columns(*shape, dtype)],
        *[linear(*layer, dtype) for layer in layers for dtype in (FP32, BF16)],
    ]


def test_gates(compete: Callable[..., None], case: Case, name: str, state: str) -> None:
    compete(case, name, state)
