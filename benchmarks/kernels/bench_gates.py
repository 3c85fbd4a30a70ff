"""Stochastic gates on a Linear.

The alternatives are lines of PyTorch. Those of gated_weight and gate_gradient are given gates that somebody has drawn
already, while the ops draw theirs within the timed region.

The floor is memory: each op reads its operands once and writes its results once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekernels import ops
from sparsekernels.nn.gated import Gating, gate

from ..timing import DEVICE
from .case import BF16, FP32, Case, Contender, Floor, Problem, called, computing, short, size

SIGMA = 0.5
STG: dict[str, Any] = {"kind": "stg", "noise": SIGMA}
PLAIN = "frozen nn.Linear"
SCALE, SUMS = "(W * z_r[:, None] * z_c).to(dtype)", "(a * b).sum(0), a.sum(0)"


@dataclass
class Tensors(Problem):
    """What a job is about, in the order in which its op takes it."""

    given: tuple[Any, ...]


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
    op: str,
    name: str,
    make: Any,
    ours: Any,
    others: dict[str, Any],
    tolerance: float = 1e-6,
    served: str | None = None,
    floor: Floor | None = None,
) -> Case:
    """`served`: the op whose backends there are, where it is called otherwise."""
    every = {**called(op, ours, served), **others}
    return Case(f"{op}, {name}", make, every, op, dict.fromkeys(others), tolerance=tolerance, floor=floor)


def cases(small: bool, gpu: bool) -> list[Case]:
    def weight(m: int, n: int, dtype: torch.dtype, out: torch.dtype, floor: Floor | None = None) -> Case:
        name = f"{m} x {n}, " + ("bf16" if gpu else f"{short(dtype)} to {short(out)}")
        make = partial(make_weight, m, n, dtype, out)
        others = {SCALE: weight_lines}
        return case("gated_weight", name, make, weight_op, others, error(out, 1e-6), floor=floor)

    def gradient(t: int, width: int, dtype: torch.dtype, floor: Floor | None = None) -> Case:
        make, others = partial(make_gradient, t, width, dtype), {SUMS: gradient_lines}
        name = f"{t} x {width}, " + ("bf16" if gpu else short(dtype))
        return case("gate_gradient", name, make, gradient_op, others, 1e-5, floor=floor)

    if gpu:
        m, n, tokens = (48, 64, 32) if small else (4096, 14_336, 16_384)
        fewer = 32 if small else 4096
        return [
            weight(m, n, BF16, BF16, Floor(4.0 * m * n + 4 * m + 4 * (m + n), "weight + gated weight")),
            gradient(tokens, n, BF16, Floor(4.0 * tokens * n + 16 * n, "a + b")),
            gated(fewer, n, m),
        ]
    shapes = [(20, 32)] if small else [(512, 384), (2048, 384), (2048, 1536), (1024, 4096)]
    weights = [(32, 48)] if small else [(384, 384), (384, 1536), (2048, 2048)]
    lists, width = ((3, 20), 40) if small else ((48, 1024), 4096)
    drawn_together = partial(make_gates, *lists)
    others = {"torch.special.ndtr of torch.cat": probabilities_lines}
    return [
        *[weight(*shape, *dtypes) for shape in weights for dtypes in ((FP32, FP32), (FP32, BF16), (BF16, BF16))],
        *[gradient(*shape, dtype) for shape in shapes for dtype in (FP32, BF16)],
        case("gate_values", f"{width}", partial(make_values, width), values_op, {}),
        case("gate_probabilities", f"{lists[0]} x {lists[1]}", drawn_together, probabilities_op, others),
    ]


class Layer:
    """A Linear with random weights, its input, and the gradient of its output; gates on both sides."""

    def __init__(self, tokens: int, m: int, n: int) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.linear = nn.Linear(n, m).to(BF16).requires_grad_(False)
            self.x, self.dy = torch.randn(tokens, n).to(BF16), torch.randn(tokens, m).to(BF16)
            self.logits = [0.4 * torch.randn(width) for width in (m, n)]
        self.seed = 5

    def key(self) -> Tensor:
        """What a forward right after seeding draws."""
        torch.manual_seed(self.seed)
        return torch.randint(2**63 - 1, (1,), device=DEVICE)

    def step(self, linear: nn.Module) -> list[Tensor]:
        x = self.x.detach().requires_grad_()
        y = linear(x)
        y.backward(self.dy)
        assert x.grad is not None
        return [y.detach(), x.grad]

    def by_hand(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
        """Output, gradient of the input, and gradients of the logits, of (values, slopes) of both; in fp64."""
        weight, bias = self.linear.weight.double(), self.linear.bias.double()
        (z_r, slope_r), (z_c, slope_c) = ([t.double() for t in side] for side in (rows, columns))
        x, dy = self.x.double(), self.dy.double()
        inner = F.linear(x * z_c, weight, bias)
        back = (dy * z_r) @ weight
        return [inner * z_r, back * z_c, slope_r * (dy * inner).sum(0), slope_c * (x * back).sum(0)]


def gated_layer(p: Tensors) -> Contender:
    (layer,) = p.given
    gate(layer.linear, Gating("stg", SIGMA), rows=layer.logits[0], columns=layer.logits[1])
    gates = layer.linear.gates

    def compute() -> list[Tensor]:
        gates.rows.grad = gates.columns.grad = None
        torch.manual_seed(layer.seed)
        return [*layer.step(layer.linear), gates.rows.grad, gates.columns.grad]

    return computing(compute)


def plain_layer(p: Tensors) -> Contender:
    (layer,) = p.given
    m, n = layer.linear.weight.shape
    linear = nn.Linear(n, m, device="meta")
    linear.weight, linear.bias = layer.linear.weight, layer.linear.bias
    ones = [[torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)] for width in (m, n)]
    return computing(lambda: layer.step(linear), expected=layer.by_hand(*ones)[:2])


def gated(tokens: int, m: int, n: int) -> Case:
    """A whole layer, forward and backward."""

    def make() -> Tensors:
        layer = Layer(tokens, m, n)
        sides = (drawn(logits, layer.key(), stream) for stream, logits in enumerate(layer.logits))
        expected = layer.by_hand(*sides)
        return Tensors(f"{tokens} tokens, {m} x {n}", 1.0, short(BF16), 0, "", expected, (layer,))

    return Case(
        f"gated Linear, forward and backward, {tokens} tokens, {m} x {n}, bf16",
        make,
        {"gated Linear": gated_layer, PLAIN: plain_layer},
        "gated Linear",
        {PLAIN: 1 / 1.1},
        tolerance=2**-6,
        floor=Floor(
            2.0 * (3 * tokens * (m + n) + 2 * m * n),
            "x, y, their gradients, x and y again for the gates, the weight twice",
            operations=4.0 * tokens * m * n,
        ),
    )
