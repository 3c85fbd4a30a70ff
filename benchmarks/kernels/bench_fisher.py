"""Squares of per-sample gradients: the four fisher ops, beside what plain PyTorch has for the same sums.

fisher_linear_ stands beside a loop over samples and beside all the gradients of a batch at once (bmm, einsum), which
take B x M x N of memory; where few elements are selected, also beside a dot product for each, by gathered columns;
where only norms are wanted, beside the Gram matrices of both activations, from which they follow. Where rows are
selected, the alternatives are given those alone. fisher_embedding_ stands beside a loop of index_add_ into a whole
table, and beside one index_add_ into as many rows as there are pairs of a sample and an id. fisher_squares_ stands
beside torch._foreach_addcmul_, and beside the line that the authors of FISH have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sparsekernels as sk
from sparsekernels import ops

from ..timing import DEVICE
from .case import (
    BF16,
    BOTH,
    CUT_OFF,
    FP32,
    WARM,
    Case,
    Contender,
    Floor,
    Problem,
    called,
    computing,
    positions,
    random_elements,
    random_rows,
    short,
    take,
)

LOOP, SQUARING_LOOP = "loop over samples, addcmul_", "loop over samples, square_ and add_"
BMM, EINSUM = "bmm, square_, sum", "einsum, square, sum"
GATHERED = "gathered columns, product, sum"
GRAM = "Gram matrices"
TABLE, PAIRS = "loop over samples, index_add_ into a table", "unique pairs, index_add_"
SUMS = "sum, square, sum"
PRODUCTS = "products alone"
FOREACH, FISH = "torch._foreach_addcmul_", "total += torch.square(grad)"


@dataclass
class Batch(Problem):
    """`grad` is [B, S, M]; `input` [B, S, N], for an Embedding the ids [B, S], for a bias None."""

    grad: Tensor
    input: Tensor | None
    index: sk.Index | None


def make_linear(
    size: tuple[int, int], shape: tuple[int, int], select: Any, norms: bool = False, dtype: torch.dtype = FP32
) -> Batch:
    torch.manual_seed(0)
    (b, s), (m, n) = size, shape
    grad, input = (torch.randn(b, s, width, device=DEVICE).to(dtype) for width in shape)
    index = None if select is None else select(shape)
    expected = torch.zeros((b,) if norms else chosen_shape(index, shape), dtype=torch.float64, device=DEVICE)
    for i in range(b):
        square = (grad[i].double().T @ input[i].double()).square_()
        if norms:
            expected[i] = square.sum()
        else:
            expected += square if index is None else take(square, index)
    moved = dtype.itemsize * b * s * (m + n) + 8 * expected.numel() + (0 if index is None else 4 * len(index))
    density = 1.0 if index is None else index.numel / (m * n)
    formula = "both activations, positions, and the sums twice"
    return Batch(f"{b} x {s} tokens, {m} x {n}", density, short(dtype), moved, formula, [expected], grad, input, index)


def chosen_shape(index: sk.Index | None, shape: Sequence[int]) -> torch.Size:
    return torch.Size(shape) if index is None else index.compact_shape


def make_embedding(size: tuple[int, int], shape: tuple[int, int]) -> Batch:
    torch.manual_seed(0)
    (b, s), (v, d) = size, shape
    ids = (v * torch.rand(b, s, device=DEVICE) ** 3).long()  # some rows are looked up far more often than others
    grad = torch.randn(b, s, d, device=DEVICE)
    expected = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    for i in range(b):
        expected += torch.zeros_like(expected).index_add_(0, ids[i], grad[i].double()).square_()
    pairs = sum(len(row.unique()) for row in ids)
    moved = 4 * b * s * d + 8 * b * s + 8 * len(ids.unique()) * d
    formula = "gradient 4 B S D + ids 8 B S + looked-up rows of the total twice"
    name = f"{b} x {s} tokens, {pairs} pairs, {v} x {d}"
    return Batch(name, 1.0, "float32", moved, formula, [expected], grad, ids, None)


def make_vector(size: tuple[int, int], width: int, norm: bool) -> Batch:
    torch.manual_seed(0)
    grad = torch.randn(*size, width, device=DEVICE)
    input = torch.randn(*size, width, device=DEVICE) if norm else None
    product = grad.double() if input is None else grad.double() * input.double()
    expected = product.sum(1).square_().sum(0)
    moved = 4 * grad.numel() * (1 + norm) + 8 * width
    name = f"{size[0]} x {size[1]} tokens, {width}"
    return Batch(name, 1.0, "float32", moved, "activations + the total twice", [expected], grad, input, None)


@dataclass
class Gradients(Problem):
    grads: list[Tensor]


def make_squares(shapes: Sequence[tuple[int, ...]]) -> Gradients:
    torch.manual_seed(0)
    grads = [torch.randn(shape, device=DEVICE) for shape in shapes]
    expected = [grad.double().square_() for grad in grads]
    count = sum(grad.numel() for grad in grads)
    name = f"{len(shapes)} tensors, {count / 1e6:.2g}M"
    return Gradients(name, 1.0, "float32", 12 * count, "gradients + totals twice", expected, grads)


def adding(problem: Problem, add: Callable[[Tensor], Any]) -> Contender:
    """A contender whose call adds to a total; the first call makes it what is expected."""
    total = torch.zeros(problem.expected[0].shape, device=DEVICE)
    return Contender(lambda: add(total), lambda: [total])


def linear_op(b: Batch, backend: Any = None, norms: bool = False) -> Contender:
    def add(sums: Tensor) -> None:
        total, by_sample = (None, sums) if norms else (sums, None)
        ops.fisher_linear_(b.grad, b.input, total, by_sample, b.index, backend=backend)  # type: ignore[arg-type]

    return adding(b, add)


def of_rows(b: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both activations, and the flat positions in their product; of rows, only those are multiplied at all."""
    assert b.input is not None
    if b.index is None:
        return b.grad, b.input, None
    chosen = positions(b.index)
    return (
        (b.grad.index_select(2, chosen), b.input, None) if b.index.granularity == "row" else (b.grad, b.input, chosen)
    )


def linear_loop(b: Batch, addcmul: bool = True) -> Contender:
    def add(total: Tensor) -> None:
        grad, input, chosen = of_rows(b)
        for dy, x in zip(grad, input, strict=True):
            g = dy.T @ x
            if chosen is not None:
                g = g.view(-1).index_select(0, chosen)
            if addcmul:
                total.addcmul_(g, g)
            else:
                total.add_(g.square_())

    contender = adding(b, add)
    if b.grad.dtype == BF16:
        contender.tolerance = 2**-6  # the product is rounded to bf16, then squared
    return contender


def linear_at_once(b: Batch, einsum: bool = False) -> Contender:
    def add(total: Tensor) -> None:
        grad, input, chosen = of_rows(b)
        g = torch.einsum("bsm,bsn->bmn", grad, input) if einsum else torch.bmm(grad.transpose(1, 2), input)
        if chosen is not None:
            g = g.flatten(1).index_select(1, chosen)
        total.add_((g.square() if einsum else g.square_()).sum(0))

    return adding(b, add)


def linear_gathered(b: Batch) -> Contender:
    """B x S x K of memory."""
    assert b.index is not None
    assert b.input is not None
    input, chosen = b.input, positions(b.index)
    rows, columns = chosen // input.shape[2], chosen % input.shape[2]

    def add(total: Tensor) -> None:
        product = b.grad.index_select(2, rows).mul_(input.index_select(2, columns))
        total.add_(product.sum(1).square_().sum(0))

    return adding(b, add)


def norms_by_gram(b: Batch) -> Contender:
    """|dY^T X|^2 = <dY dY^T, X X^T>: no gradient is made, S x S numbers of each sample are."""
    assert b.input is not None
    grad, input = b.grad, b.input

    def add(norms: Tensor) -> None:
        of_grad, of_input = torch.bmm(grad, grad.transpose(1, 2)), torch.bmm(input, input.transpose(1, 2))
        norms.add_(of_grad.mul_(of_input).sum((1, 2)))

    return adding(b, add)


def norms_by_bmm(b: Batch) -> Contender:
    assert b.input is not None
    grad, input = b.grad, b.input
    return adding(b, lambda norms: norms.add_(torch.bmm(grad.transpose(1, 2), input).square_().sum((1, 2))))


def embedding_op(b: Batch, backend: Any = None) -> Contender:
    return adding(b, lambda total: ops.fisher_embedding_(b.grad, b.input, total, backend=backend))  # type: ignore[arg-type]


def embedding_table(b: Batch) -> Contender:
    assert b.input is not None
    table = torch.zeros(b.expected[0].shape, device=DEVICE)
    ids = b.input

    def add(total: Tensor) -> None:
        for i in range(len(ids)):
            table.zero_().index_add_(0, ids[i], b.grad[i])
            total.addcmul_(table, table)

    return adding(b, add)


def embedding_pairs(b: Batch) -> Contender:
    """The best that was found in plain PyTorch."""
    assert b.input is not None
    (rows, width), ids = b.expected[0].shape, b.input
    samples = rows * torch.arange(len(ids), device=DEVICE)[:, None]

    def add(total: Tensor) -> None:
        pairs, slot = (ids + samples).flatten().unique(return_inverse=True)
        g = torch.zeros(len(pairs), width, device=DEVICE).index_add_(0, slot, b.grad.flatten(0, 1))
        total.index_add_(0, pairs % rows, g.square_())

    return adding(b, add)


def vector_op(b: Batch, backend: Any = None) -> Contender:
    return adding(b, lambda total: ops.fisher_vector_(b.grad, b.input, total, backend=backend))


def vector_sums(b: Batch) -> Contender:
    def add(total: Tensor) -> None:
        product = b.grad if b.input is None else b.grad * b.input
        total.add_(product.sum(1).square_().sum(0))

    return adding(b, add)


def vector_einsum(b: Batch) -> Contender:
    """The sum over tokens without the product in memory."""
    assert b.input is not None
    input = b.input
    return adding(b, lambda total: total.add_(torch.einsum("bsm,bsm->bm", b.grad, input).square_().sum(0)))


def squares(p: Gradients, add: Callable[[list[Tensor], list[Tensor]], Any]) -> Contender:
    totals = [torch.zeros_like(grad) for grad in p.grads]
    return Contender(lambda: add(totals, p.grads), lambda: totals)


def squares_op(p: Gradients, backend: Any) -> Contender:
    return squares(p, partial(ops.fisher_squares_, backend=backend))


def fish(totals: list[Tensor], grads: list[Tensor]) -> None:
    for total, grad in zip(totals, grads, strict=True):
        total += torch.square(grad)


LINEAR = {
    **called("fisher_linear_", linear_op),
    LOOP: linear_loop,
    SQUARING_LOOP: partial(linear_loop, addcmul=False),
    BMM: linear_at_once,
    EINSUM: partial(linear_at_once, einsum=True),
}
NORMS = {**called("fisher_linear_", linear_op, norms=True), GRAM: norms_by_gram, BMM: norms_by_bmm}
EMBEDDING = {**called("fisher_embedding_", embedding_op), TABLE: embedding_table, PAIRS: embedding_pairs}
VECTOR = {**called("fisher_vector_", vector_op), SUMS: vector_sums}
SQUARES = {
    **called("fisher_squares_", squares_op),
    FOREACH: partial(squares, add=lambda totals, grads: torch._foreach_addcmul_(totals, grads, grads)),
    FISH: partial(squares, add=fish),
}


def products_alone(b: Batch) -> Contender:
    """The gradients, which nobody squares."""
    assert b.input is not None
    grad, input = b.grad, b.input
    last = grad[-1].double().T @ input[-1].double()

    def compute() -> Tensor:
        for dy, x in zip(grad, input, strict=True):
            product = dy.T @ x
        return product

    return computing(compute, expected=[last], tolerance=2**-8)


def cases(small: bool, gpu: bool) -> list[Case]:
    def case(op: str, name: str, make: Any, contenders: Any, versus: Any, states: Any = WARM, **more: Any) -> Case:
        return Case(f"{op}, {name}", make, contenders, op, versus, states, **{"tolerance": 1e-5, **more})

    if gpu:
        return gpu_cases(small, case)
    size, shapes = ((3, 8), [(48, 32)]) if small else ((16, 64), [(384, 384), (1536, 384)])
    table = (300, 32) if small else (32_000, 384)
    layer = [(48, 32), (32,)] if small else [*[(384, 384)] * 4, (1536, 384), (384, 1536), *[(384,)] * 9, (1536,)]
    tokens, width = f"{size[0]} x {size[1]} tokens", shapes[0][1]

    def linear(name: str, shape: tuple[int, int], select: Any, more: Any) -> Case:
        problem, versus = partial(make_linear, size, shape, select), dict.fromkeys((LOOP, BMM, *more))
        name = f"{name}, {tokens}, {shape[0]} x {shape[1]}"
        return case("fisher_linear_", name, problem, {**LINEAR, **more}, versus)

    def vector(name: str, norm: bool) -> Case:
        problem, versus = partial(make_vector, size, width, norm), {EINSUM if norm else SUMS: None}
        contenders = {**VECTOR, **({EINSUM: vector_einsum} if norm else {})}
        return case("fisher_vector_", f"{name}, {tokens}, {width}", problem, contenders, versus)

    of_linear = []
    for shape in shapes:
        of_linear += [
            linear("whole", shape, None, {}),
            linear("1 %", shape, partial(random_elements, density=0.01), {GATHERED: linear_gathered}),
            linear("50 %", shape, partial(random_elements, density=0.5), {}),
            linear("5 % of the rows", shape, partial(random_rows, count=max(shape[0] // 20, 1)), {}),
        ]
    norms = partial(make_linear, size, shapes[0], None, norms=True)
    looked_up = partial(make_embedding, size, table)
    layers, grads = ("1 layer", layer) if small else ("6 layers", layer * 6)
    return [
        *of_linear,
        case("fisher_linear_", f"norms alone, {tokens}, {shapes[0][0]} x {width}", norms, NORMS, {GRAM: None}),
        case(
            "fisher_embedding_",
            f"{tokens} of {table[0]} x {table[1]}",
            looked_up,
            EMBEDDING,
            {PAIRS: None, TABLE: None},
            BOTH,
        ),
        vector("bias", False),
        vector("weight of a norm", True),
        case("fisher_squares_", layers, partial(make_squares, grads), SQUARES, {FOREACH: None, FISH: None}, BOTH),
    ]


def gpu_cases(small: bool, case: Callable[..., Case]) -> list[Case]:
    size, width = ((2, 16), 64) if small else ((8, 2048), 14_336)
    table = (300, 64) if small else (128_256, 4096)
    grads = [(40, 50)] * 5 if small else [(4000, 5000)] * 50
    numel, both = sum(a * b for a, b in grads), size[0] * size[1]
    # Of ids that are V u^3 for even u, those in a stretch of ids are met in proportion to the cube roots of its ends.
    edges = [(i / table[0]) ** (1 / 3) for i in range(table[0] + 1)]
    met = sum(1 - (1 - (high - low)) ** both for low, high in itertools.pairwise(edges))
    batch, (m, n) = ((2, 16), (48, 64)) if small else ((8, 512), (4096, 14_336))
    tokens, of_linear = batch[0] * batch[1], m * n
    return [
        case(
            "fisher_squares_",
            f"{numel:.0e} in {len(grads)} tensors, fp32",
            partial(make_squares, grads),
            SQUARES,
            {FOREACH: None},
            floor=Floor(12.0 * numel, "gradients + totals twice"),
        ),
        case(
            "fisher_vector_",
            f"weight of a norm, {size[0]} x {size[1]} tokens, {width}, fp32",
            partial(make_vector, size, width, True),
            {**VECTOR, EINSUM: vector_einsum},
            {EINSUM: None},
            floor=Floor(8.0 * both * width + 8 * width, "activations + the total twice"),
        ),
        case(
            "fisher_embedding_",
            f"{size[0]} x {size[1]} tokens of {table[0]} x {table[1]}, fp32",
            partial(make_embedding, size, table),
            EMBEDDING,
            {PAIRS: None},
            floor=Floor(
                4.0 * both * table[1] + 8 * both + 8 * met * table[1],
                "gradient + ids + looked-up rows of the total twice",
            ),
        ),
        case(
            "fisher_linear_",
            f"{batch[0]} x {batch[1]} tokens, {m} x {n}, bf16",
            partial(make_linear, batch, (m, n), None, dtype=BF16),
            {**called("fisher_linear_", linear_op), LOOP: linear_loop, PRODUCTS: products_alone},
            {LOOP: 4, PRODUCTS: 0.6},
            tolerance=CUT_OFF,
            floor=Floor(
                2.0 * tokens * (m + n) + 8.0 * of_linear,
                "activations + the sums twice",
                operations=2.0 * tokens * of_linear,
                most_extra=0.1 * 2 * batch[0] * of_linear,  # the gradients of all samples are ten times as much
            ),
        ),
    ]
