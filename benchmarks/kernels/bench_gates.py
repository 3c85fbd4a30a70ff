"""Stochastic gates on a Linear.

The alternatives are lines of PyTorch. Those of gated_weight and gate_gradient are given gates that somebody has drawn
already, while the ops draw theirs within the timed region.

The floor is memory: each op reads its operands once and writes its results once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compare import DEVICE, Case, Contender, Problem, backends
from torch import Tensor

from sparsekernels import ops

FP32, BF16 = torch.float32, torch.bfloat16
SIGMA = 0.5
STG: dict[str, Any] = {"kind": "stg", "noise": SIGMA}
SCALE, SUMS = "(W * z_r[:, None] * z_c).to(dtype)", "(a * b).sum(0), a.sum(0)"


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


def error(dtype: torch.dtype, wide: float) -> float:
    return 2**-8 if dtype == BF16 else wide


def case(
    op: str, name: str, make: Any, ours: Any, others: dict[str, Any], tolerance: float = 1e-6, served: str | None = None
) -> Case:
    """`served`: the op whose backends there are, where it is called otherwise."""
    each = {f"{op} {b}": partial(ours, backend=b) for b in backends(served or op)}
    every = {op: ours, **each, **others}
    return Case(f"{op}, {name}", make, every, op, dict.fromkeys(others), tolerance=tolerance)


def cases(small: bool) -> list[Case]:
    def weight(m: int, n: int, dtype: torch.dtype, out: torch.dtype) -> Case:
        name = f"{m} x {n}, {short(dtype)} to {short(out)}"
        make = partial(make_weight, m, n, dtype, out)
        return case("gated_weight", name, make, weight_op, {SCALE: weight_lines}, error(out, 1e-6))

    def gradient(t: int, width: int, dtype: torch.dtype) -> Case:
        make = partial(make_gradient, t, width, dtype)
        return case("gate_gradient", f"{t} x {width}, {short(dtype)}", make, gradient_op, {SUMS: gradient_lines}, 1e-5)

    shapes = [(20, 32)] if small else [(512, 384), (2048, 384), (2048, 1536), (1024, 4096)]
    weights = [(32, 48)] if small else [(384, 384), (384, 1536), (2048, 2048)]
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
    ]


def test_gates(compete: Callable[..., None], case: Case, name: str, state: str) -> None:
    compete(case, name, state)
