"""What gpu.py measures, second part: kernels whose cost is arithmetic, in bf16, at the sizes of a layer of Llama.

The floor of a row is the longer of two: bytes over the copy bandwidth, as in gpu_rows.py, and operations over the rate
of a bf16 product. Operations are those that the result needs: of a gradient at selected positions one dot product for
each, of projections onto fp32 vectors those of a single bf16 product, which no implementation in fp32 can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import bench_columns
import bench_fisher
import bench_gates
import bench_masked_grad
import bench_singular_values
import torch
import torch.nn.functional as F
from bench_masked_grad import DENSE
from compare import DEVICE, Case, Contender, positions, random_elements, random_rows
from gpu_rows import Row
from torch import Tensor, nn

from sparsekernels.nn.gated import Gating, gate

BF16 = torch.bfloat16
TOLERANCE = 1e-4  # tensor cores cut off what they add: thousands of terms in fp32 are not exact to 1e-5
BUFFER = 2**27  # bytes of the dense product that may exist at a time
PRODUCT, PRODUCTS = "grad_output.T @ input", "products alone"
PLAIN = "frozen nn.Linear"
SMALL = "F.linear of the small size"


def rows(small: bool) -> list[Row]:
    tokens, shape = (32, (48, 64)) if small else (4096, (4096, 14_336))
    found = [_elements(tokens, shape, density, bar) for density, bar in ((0.001, 3), (0.01, 1), (0.05, 1))]
    return [
        *found,
        _rows(tokens, shape),
        _fisher((2, 16) if small else (8, 512), shape),
        _singular_values(tokens, (48, 48) if small else (4096, 4096)),
        _gated(tokens, shape[::-1]),
        *[_compressed(tokens, *shape[::-1], multiple) for multiple in (1, 8)],
    ]


def _elements(tokens: int, shape: tuple[int, int], density: float, bar: float) -> Row:
    k = density * shape[0] * shape[1]
    case = Case(
        f"masked_grad_linear, {density:.1%} of {shape[0]} x {shape[1]}, {tokens} tokens, bf16",
        partial(bench_masked_grad.make_linear, tokens, shape, partial(random_elements, shape, density), BF16),
        bench_masked_grad.LINEAR,
        "masked_grad_linear",
        {DENSE: bar},
        tolerance=TOLERANCE,
    )
    moved = 2.0 * tokens * sum(shape) + 8 * k
    # A transposed copy of both activations, or a block of the product.
    return Row(
        case,
        moved,
        "activations + positions + result",
        operations=2 * tokens * k,
        most_extra=max(1.1 * moved, 1.1 * BUFFER),
    )


def _rows(tokens: int, shape: tuple[int, int]) -> Row:
    count = shape[0] // 20

    def product(b: bench_masked_grad.Backward) -> Contender:
        found: list[Tensor] = []

        def call() -> None:
            found[:] = [b.grad.T @ b.input]

        return Contender(call, lambda: [found[0].index_select(0, positions(b.index))], tolerance=2**-8)

    case = Case(
        f"masked_grad_linear, {count} rows of {shape[0]} x {shape[1]}, {tokens} tokens, bf16",
        partial(bench_masked_grad.make_linear, tokens, shape, lambda: random_rows(shape, count), BF16),
        {"masked_grad_linear": bench_masked_grad.linear_op, PRODUCT: product},
        "masked_grad_linear",
        {PRODUCT: 10},
        tolerance=2**-8,
    )
    moved = 2.0 * tokens * (count + shape[1]) + 4.0 * count * shape[1]
    return Row(case, moved, "selected columns + input + result", operations=2.0 * tokens * count * shape[1])


def _fisher(size: tuple[int, int], shape: tuple[int, int]) -> Row:
    def make() -> bench_fisher.Batch:
        return bench_fisher.make_linear(size, shape, None, dtype=BF16)

    def products(b: bench_fisher.Batch) -> Contender:
        assert b.input is not None
        grad, input, found = b.grad, b.input, []

        def call() -> None:
            for i in range(len(grad)):
                found[:] = [grad[i].T @ input[i]]

        last = grad[-1].double().T @ input[-1].double()
        return Contender(call, lambda: found, expected=[last], tolerance=2**-8)

    contenders = {
        **bench_fisher.on_each_backend("fisher_linear_", bench_fisher.linear_op),
        bench_fisher.LOOP: bench_fisher.linear_loop,
        PRODUCTS: products,
    }
    case = Case(
        f"fisher_linear_, {size[0]} x {size[1]} tokens, {shape[0]} x {shape[1]}, bf16",
        make,
        contenders,
        "fisher_linear_",
        {bench_fisher.LOOP: 4, PRODUCTS: 0.6},
        tolerance=TOLERANCE,
    )
    tokens, numel = size[0] * size[1], shape[0] * shape[1]
    return Row(
        case,
        2.0 * tokens * sum(shape) + 8.0 * numel,
        "activations + the sums twice",
        operations=2.0 * tokens * numel,
        most_extra=0.1 * 2 * size[0] * numel,  # the gradients of all samples are ten times as much
    )


def _singular_values(tokens: int, shape: tuple[int, int]) -> Row:
    rank = min(shape)

    def products(p: bench_singular_values.Factors) -> Contender:
        assert p.right is not None
        dy, x, found = p.left[0].float(), p.right[0].float(), []

        def call() -> None:
            found[:] = [dy @ p.u, x @ p.v]

        return Contender(call, lambda: found, expected=[dy.double() @ p.u.double(), x.double() @ p.v.double()])

    name = "singular_value_grad_linear"
    contenders = {
        **bench_singular_values.on_each_backend(name, bench_singular_values.linear_op),
        bench_singular_values.PROJECTIONS: bench_singular_values.projections,
        bench_singular_values.ROUNDED: partial(bench_singular_values.projections, rounded=True),
        PRODUCTS: products,
    }
    case = Case(
        f"{name}, {tokens} tokens, {shape[0]} x {shape[1]}, {rank} pairs, bf16",
        partial(bench_singular_values.make_linear, (1, tokens), shape, rank, BF16, False),
        contenders,
        name,
        {bench_singular_values.PROJECTIONS: None, bench_singular_values.ROUNDED: None, PRODUCTS: 0.7},
        tolerance=TOLERANCE,
    )
    moved = (2.0 * tokens + 4.0 * rank) * sum(shape)
    return Row(case, moved, "activations + vectors", operations=2.0 * tokens * rank * sum(shape))


class _Layer:
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


def _gated(tokens: int, shape: tuple[int, int]) -> Row:
    m, n = shape

    def make() -> bench_gates.Tensors:
        layer = _Layer(tokens, m, n)
        rows, columns = (bench_gates.drawn(logits, layer.key(), stream) for stream, logits in enumerate(layer.logits))
        expected = _by_hand(layer, rows, columns)
        return bench_gates.Tensors(f"{tokens} tokens, {m} x {n}", 1.0, "bfloat16", 0, "", expected, (layer,))

    def gated(p: bench_gates.Tensors) -> Contender:
        (layer,) = p.given
        gating = Gating("stg", bench_gates.SIGMA)
        gate(layer.linear, gating, rows=layer.logits[0], columns=layer.logits[1])
        gates = layer.linear.gates

        def call() -> None:
            gates.rows.grad = gates.columns.grad = None
            torch.manual_seed(layer.seed)
            step(layer, layer.linear)

        def result() -> list[Tensor]:
            return [found[0], found[1], gates.rows.grad, gates.columns.grad]

        found: list[Tensor] = []
        step = _step(found)
        return Contender(call, result)

    def plain(p: bench_gates.Tensors) -> Contender:
        (layer,) = p.given
        linear = nn.Linear(n, m, device="meta")
        linear.weight, linear.bias = layer.linear.weight, layer.linear.bias
        found: list[Tensor] = []
        step = _step(found)
        ones = (
            (torch.ones(m, device=DEVICE), torch.zeros(m, device=DEVICE)),
            (
                torch.ones(n, device=DEVICE),
                torch.zeros(n, device=DEVICE),
            ),
        )
        return Contender(lambda: step(layer, linear), lambda: found, expected=_by_hand(layer, *ones)[:2])

    case = Case(
        f"gated Linear, forward and backward, {tokens} tokens, {m} x {n}, bf16",
        make,
        {"gated Linear": gated, PLAIN: plain},
        "gated Linear",
        {PLAIN: 1 / 1.1},
        tolerance=2**-6,
    )
    moved = 2.0 * (3 * tokens * (m + n) + 2 * m * n)
    words = "x, y, their gradients, x and y again for the gates, the weight twice"
    return Row(case, moved, words, operations=4.0 * tokens * m * n)


def _step(found: list[Tensor]) -> Callable[[_Layer, nn.Module], None]:
    def step(layer: _Layer, linear: nn.Module) -> None:
        x = layer.x.detach().requires_grad_()
        y = linear(x)
        y.backward(layer.dy)
        assert x.grad is not None
        found[:] = [y.detach(), x.grad]

    return step


def _by_hand(layer: _Layer, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
    """Output, gradient of the input, and gradients of the logits, of (values, slopes) of both; in fp64."""
    weight, bias = layer.linear.weight.double(), layer.linear.bias.double()
    (z_r, slope_r), (z_c, slope_c) = ([t.double() for t in side] for side in (rows, columns))
    x, dy = layer.x.double(), layer.dy.double()
    inner = F.linear(x * z_c, weight, bias)
    back = (dy * z_r) @ weight
    return [inner * z_r, back * z_c, slope_r * (dy * inner).sum(0), slope_c * (x * back).sum(0)]


def _compressed(tokens: int, m: int, n: int, multiple: int) -> Row:
    """`multiple` of the rows and columns that are left: tensor cores are slow where sizes are no multiple of 8."""

    def make() -> bench_gates.Tensors:
        problem = bench_columns.make_linear(tokens, m, n, BF16)
        if multiple == 1:
            return problem
        x, rows, columns, small, bias, weight, whole_bias = problem.given
        rows, columns = (index[: len(index) // multiple * multiple] for index in (rows, columns))
        small, bias = small[: len(rows), : len(columns)].contiguous(), bias[: len(rows)].contiguous()
        weight, whole_bias = torch.zeros_like(weight), torch.zeros_like(whole_bias)
        weight[rows[:, None], columns], whole_bias[rows] = small, bias
        expected = [F.linear(x.double(), weight.double(), whole_bias.double())]
        moved = bench_gates.size(x, small, bias) + tokens * m * BF16.itemsize
        return replace(
            problem, bytes_moved=moved, expected=expected, given=(x, rows, columns, small, bias, weight, whole_bias)
        )

    def alone(p: bench_gates.Tensors) -> Contender:
        x, rows, columns, small, bias, *_ = p.given
        narrow = x[:, columns].contiguous()
        contender = bench_gates.computing(lambda: [F.linear(narrow, small, bias)])
        contender.expected = [p.expected[0][:, rows]]
        return contender

    sizes = [round(bench_columns.LEFT * width) // multiple * multiple for width in (m, n)]
    contenders = {
        "compressed linear": bench_columns.linear_op,
        SMALL: alone,
        bench_columns.WHOLE: bench_columns.linear_whole,
    }
    case = Case(
        f"compressed linear, {sizes[0]} x {sizes[1]} of {m} x {n}, {tokens} tokens, bf16",
        make,
        contenders,
        "compressed linear",
        {SMALL: 0.85, bench_columns.WHOLE: None},
        tolerance=2**-7,
    )
    moved = 2.0 * (tokens * (m + n) + sizes[0] * sizes[1])
    return Row(case, moved, "x + narrow weight + y", operations=2.0 * tokens * sizes[0] * sizes[1])
