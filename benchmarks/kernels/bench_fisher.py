"""Squares of per-sample gradients: the four fisher ops, beside what plain PyTorch has for the same sums.

fisher_linear_ stands beside a loop over samples and beside all the gradients of a batch at once (bmm, einsum), which
take B x M x N of memory; where few elements are selected, also beside a dot product for each, by gathered columns;
where only norms are wanted, beside the Gram matrices of both activations, from which they follow. Where rows are
selected, the alternatives are given those alone. fisher_embedding_ stands beside a loop of index_add_ into a whole
table, and beside one index_add_ into as many rows as there are pairs of a sample and an id. fisher_squares_ stands
beside torch._foreach_addcmul_, and beside the line that the authors of FISH have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compare import DEVICE, Case, Contender, Problem, backends, positions, random_elements, random_rows, take
from torch import Tensor

import sparsekernels as sk
from sparsekernels import ops

LOOP, SQUARING_LOOP = "loop over samples, addcmul_", "loop over samples, square_ and add_"
BMM, EINSUM = "bmm, square_, sum", "einsum, square, sum"
GATHERED = "gathered columns, product, sum"
GRAM = "Gram matrices"
TABLE, PAIRS = "loop over samples, index_add_ into a table", "unique pairs, index_add_"
SUMS = "sum, square, sum"
FOREACH, FISH = "torch._foreach_addcmul_", "total += torch.square(grad)"


@dataclass
class Batch(Problem):
    """`grad` is [B, S, M]; `input` [B, S, N], for an Embedding the ids [B, S], for a bias None."""

    grad: Tensor
    input: Tensor | None
    index: sk.Index | None


def make_linear(
    size: tuple[int, int], shape: tuple[int, int], select: Any, norms: bool = False, dtype: torch.dtype = torch.float32
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
    short = str(dtype).removeprefix("torch.")
    return Batch(f"{b} x {s} tokens, {m} x {n}", density, short, moved, formula, [expected], grad, input, index)


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
    return (b.grad.index_select(2, chosen), b.input, None) if b.index.rows else (b.grad, b.input, chosen)


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
    if b.grad.dtype == torch.bfloat16:
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


def fish(totals: list[Tensor], grads: list[Tensor]) -> None:
    for total, grad in zip(totals, grads, strict=True):
        total += torch.square(grad)


def on_each_backend(op: str, contender: Callable[..., Contender], **options: Any) -> dict[str, Any]:
    each = {f"{op} {b}": partial(contender, backend=b, **options) for b in backends(op)}
    return {op: partial(contender, **options), **each}


LINEAR = {
    **on_each_backend("fisher_linear_", linear_op),
    LOOP: linear_loop,
    SQUARING_LOOP: partial(linear_loop, addcmul=False),
    BMM: linear_at_once,
    EINSUM: partial(linear_at_once, einsum=True),
}
NORMS = {**on_each_backend("fisher_linear_", linear_op, norms=True), GRAM: norms_by_gram, BMM: norms_by_bmm}
EMBEDDING = {**on_each_backend("fisher_embedding_", embedding_op), TABLE: embedding_table, PAIRS: embedding_pairs}
VECTOR = {**on_each_backend("fisher_vector_", vector_op), SUMS: vector_sums}
SQUARES = {
    "fisher_squares_": partial(squares, add=ops.fisher_squares_),
    **{f"fisher_squares_ {b}": partial(squares, add=partial(ops.fisher_squares_, backend=b))
       for b in backends("fisher_squares_")},
    FOREACH: partial(squares, add=lambda totals, grads: torch._foreach_addcmul_(totals, grads, grads)),
    FISH: partial(squares, add=fish),
}  # fmt: skip


def cases(small: bool) -> list[Case]:
    size, shapes = ((3, 8), [(48, 32)]) if small else ((16, 64), [(384, 384), (1536, 384)])
    table = (300, 32) if small else (32_000, 384)
    layer = [(48, 32), (32,)] if small else [*[(384, 384)] * 4, (1536, 384), (384, 1536), *[(384,)] * 9, (1536,)]
    tokens = f"{size[0]} x {size[1]} tokens"

    def linear(name: str, shape: tuple[int, int], select: Any, more: Any) -> Case:
        problem = partial(make_linear, size, shape, select)
        name = f"fisher_linear_, {name}, {tokens}, {shape[0]} x {shape[1]}"
        versus = dict.fromkeys((LOOP, BMM, *more))
        return Case(name, problem, {**LINEAR, **more}, "fisher_linear_", versus, ("warm",), tolerance=1e-5)

    def vector(name: str, norm: bool) -> Case:
        problem = partial(make_vector, size, shapes[0][1], norm)
        contenders = {**VECTOR, **({EINSUM: vector_einsum} if norm else {})}
        versus = {EINSUM if norm else SUMS: None}
        name = f"fisher_vector_, {name}, {tokens}, {shapes[0][1]}"
        return Case(name, problem, contenders, "fisher_vector_", versus, ("warm",), tolerance=1e-5)

    of_linear = []
    for shape in shapes:
        of_linear += [
            linear("whole", shape, None, {}),
            linear("1 %", shape, partial(random_elements, density=0.01), {GATHERED: linear_gathered}),
            linear("50 %", shape, partial(random_elements, density=0.5), {}),
            linear("5 % of the rows", shape, partial(random_rows, count=max(shape[0] // 20, 1)), {}),
        ]
    of_norms = Case(
        f"fisher_linear_, norms alone, {tokens}, {shapes[0][0]} x {shapes[0][1]}",
        partial(make_linear, size, shapes[0], None, norms=True),
        NORMS,
        "fisher_linear_",
        {GRAM: None},
        ("warm",),
        tolerance=1e-5,
    )
    of_embedding = Case(
        f"fisher_embedding_, {tokens} of {table[0]} x {table[1]}",
        partial(make_embedding, size, table),
        EMBEDDING,
        "fisher_embedding_",
        {PAIRS: None, TABLE: None},
        tolerance=1e-5,
    )
    of_squares = Case(
        f"fisher_squares_, {'1 layer' if small else '6 layers'}",
        partial(make_squares, layer * (1 if small else 6)),
        SQUARES,
        "fisher_squares_",
        {FOREACH: None, FISH: None},
        tolerance=1e-5,
    )
    return [*of_linear, of_norms, of_embedding, vector("bias", False), vector("weight of a norm", True), of_squares]


def test_fisher(compete: Callable[..., None], case: Case, name: str, state: str) -> None:
    compete(case, name, state)
