"""Weight gradients at selected positions: masked_grad_linear and masked_grad_embedding, beside the dense gradient.

The kernels stand beside the dense product and a gather of it. Whole layers, forward and backward, stand beside PEFT's:
SHiRA trains elements of a Linear, TrainableTokens rows of an Embedding; both compose the weight anew in each forward.
Every layer is given the same input, which needs a gradient too, as in the middle of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    addressed,
    called,
    computing,
    positions,
    random_elements,
    random_rows,
    random_units,
    short,
    take,
)

DENSE = "dense gradient + index_select"
LOOKUP = "mask of tokens + index_add_"
BUFFER = 2**27  # bytes of the dense product that may exist at a time
PRODUCT = "grad_output.T @ input"
SHIRA, TOKENS = "peft SHiRA", "peft TrainableTokens"


@dataclass
class Backward(Problem):
    """`input` is [T, N], or the ids [T] of an Embedding."""

    grad: Tensor
    input: Tensor
    index: sk.Index


def make_linear(tokens: int, shape: tuple[int, int], select: Callable[[], sk.Index], dtype: torch.dtype) -> Backward:
    torch.manual_seed(0)
    m, n = shape
    grad, input = (torch.randn(tokens, width, device=DEVICE).to(dtype) for width in shape)
    index = select()
    moved = tokens * features_read(index) * dtype.itemsize + 4 * (index.numel + len(index))
    return Backward(
        f"{tokens} tokens, {m} x {n}",
        index.numel / (m * n),
        short(dtype),
        moved,
        "grad_output + input + positions + result",
        [take(grad.double().T @ input.double(), index)],
        grad,
        input,
        index,
    )


def features_read(index: sk.Index) -> int:
    """How many numbers of a token the gradient depends on, in both activations together."""
    m, n = index.shape
    return m + len(index) if index.granularity == "column" else len(index) + n if index.granularity == "row" else m + n


def make_embedding(tokens: int, shape: tuple[int, int], select: Callable[[Tensor], sk.Index]) -> Backward:
    torch.manual_seed(0)
    v, d = shape
    ids = (v * torch.rand(tokens, device=DEVICE) ** 3).long()  # some rows are looked up far more often than others
    grad = torch.randn(tokens, d, device=DEVICE)
    index = select(ids)
    dense = torch.zeros(v, d, dtype=torch.float64, device=DEVICE).index_add_(0, ids, grad.double())
    hits = torch.isin(ids, positions(index) if index.granularity == "row" else positions(index) // d)
    return Backward(
        f"{tokens} tokens, {v} x {d}",
        index.numel / (v * d),
        "float32",
        8 * tokens + int(hits.sum()) * d * 4 + 4 * (index.numel + len(index)),
        "ids + grad_output of tokens that hit + positions + result",
        [take(dense, index)],
        grad,
        ids,
        index,
    )


def linear_op(b: Backward, backend: Any = None) -> Contender:
    return computing(lambda: ops.masked_grad_linear(b.grad, b.input, b.index, backend=backend))


def embedding_op(b: Backward, backend: Any = None) -> Contender:
    return computing(lambda: ops.masked_grad_embedding(b.grad, b.input, b.index, backend=backend))


def linear_dense(b: Backward) -> Contender:
    contender = computing(lambda: take(b.grad.T @ b.input, b.index))
    if b.input.dtype == BF16:
        contender.tolerance = 2**-8  # the product as a whole is rounded to bf16
    return contender


def embedding_dense(b: Backward) -> Contender:
    """What the backward of nn.Embedding computes, and a gather."""
    chosen = positions(b.index)
    backward = torch.ops.aten.embedding_dense_backward
    return computing(
        lambda: addressed(backward(b.grad, b.input, b.index.shape[0], -1, False), b.index).index_select(0, chosen)
    )


def embedding_lookup(b: Backward) -> Contender:
    """The best that was found in plain PyTorch for rows: a table from id to compact row, made once."""
    slots = torch.full((b.index.shape[0],), -1, device=DEVICE)
    slots[positions(b.index)] = torch.arange(len(b.index), device=DEVICE)

    def compute() -> Tensor:
        slot = slots[b.input]
        hit = (slot >= 0).nonzero().view(-1)
        result = torch.zeros(b.index.compact_shape, device=DEVICE)
        return result.index_add_(0, slot.index_select(0, hit), b.grad.index_select(0, hit))

    return computing(compute)


@dataclass
class Layer(Backward):
    """A backward with the weight that the forward needs; results are output, gradient of the input, of the values."""

    weight: Tensor


def make_linear_layer(tokens: int, shape: tuple[int, int], rank: int) -> Layer:
    """SHiRA trains rank * (M + N) elements; so do we."""
    torch.manual_seed(0)
    k = rank * sum(shape)
    chosen = torch.randperm(shape[0] * shape[1], device=DEVICE)[:k].sort().values
    b = make_linear(tokens, shape, lambda: sk.Index(chosen, shape), FP32)
    weight = torch.randn(shape, device=DEVICE).mul_(shape[1] ** -0.5)
    output, grad_input = b.input.double() @ weight.double().T, b.grad.double() @ weight.double()
    b.expected = [output, grad_input, *b.expected]
    b.bytes_moved += 8 * (tokens * sum(shape) + weight.numel())
    b.formula = "x, dx, y, dy, and W twice"
    return Layer(**vars(b), weight=weight)


def make_embedding_layer(tokens: int, shape: tuple[int, int], count: int) -> Layer:
    b = make_embedding(tokens, shape, lambda ids: rows_in_use(ids, shape, count))
    weight = torch.randn(shape, device=DEVICE)
    b.expected = [weight[b.input].double(), *b.expected]
    b.bytes_moved += 8 * b.grad.numel()
    b.formula += ", and the looked-up rows"
    return Layer(**vars(b), weight=weight)


def rows_in_use(ids: Tensor, shape: tuple[int, int], count: int) -> sk.Index:
    used = ids.unique()
    return sk.Index(used[random_rows((used.numel(),), count).positions.long()], shape, granularity="row")


def module(layer: Layer) -> nn.Module:
    """A model of this one layer, with name "0"."""
    rows, columns = layer.weight.shape
    made: nn.Module = nn.Embedding(rows, columns, device="meta")
    if layer.input.is_floating_point():
        made = nn.Linear(columns, rows, bias=False, device="meta")
    made.weight = nn.Parameter(layer.weight.clone())
    return nn.Sequential(made)


def trained(layer: Layer, model: nn.Module, parameter: nn.Parameter) -> Contender:
    """Forward, and backward to the input (where it is no id) and the parameter."""
    input = layer.input.clone()
    inputs = [input.requires_grad_()] if input.is_floating_point() else []
    found: list[Tensor] = []

    def call() -> None:
        output = model(input)
        found[:] = [output, *torch.autograd.grad(output, [*inputs, parameter], layer.grad)]

    def result() -> list[Tensor]:
        *others, grad = found
        return [*others, take(grad, layer.index) if grad.shape == layer.index.shape else grad]

    return Contender(call, result)


def train_only(layer: Layer) -> Contender:
    model = module(layer)
    tuned = sk.train_only(model, sk.Selection({"0.weight": layer.index}))
    return trained(layer, model, next(tuned.parameters()))


def dense(layer: Layer) -> Contender:
    model = module(layer)
    return trained(layer, model, model[0].weight)  # type: ignore[index]


def shira(layer: Layer) -> Contender:
    from peft import ShiraConfig, inject_adapter_in_model

    mask = torch.zeros(layer.weight.numel(), device=DEVICE)
    mask[positions(layer.index)] = 1
    config = ShiraConfig(r=layer.index.numel // sum(layer.weight.shape), target_modules=["0"])
    config.mask_fn = lambda base_layer, r, **_: mask.view(layer.weight.shape)
    model = inject_adapter_in_model(config, module(layer))
    return trained(layer, model, model[0].shira_weight["default"])


def trainable_tokens(layer: Layer) -> Contender:
    from peft import TrainableTokensConfig, inject_adapter_in_model

    config = TrainableTokensConfig(token_indices=layer.index.positions.tolist(), target_modules=["0"])
    model = inject_adapter_in_model(config, module(layer))
    return trained(layer, model, model[0].trainable_tokens_delta["default"])


LINEAR = {**called("masked_grad_linear", linear_op), DENSE: linear_dense}
EMBEDDING = {**called("masked_grad_embedding", embedding_op), DENSE: embedding_dense}


def cases(small: bool, gpu: bool) -> list[Case]:
    if gpu:
        return gpu_cases(small)
    tokens, shape = (32, (96, 64)) if small else (512, (2048, 2048))
    looked_up, table = (64, (3200, 64)) if small else (2048, (32_000, 1024))
    block = (16, 16) if small else (64, 64)
    size, rank = f"{tokens} tokens, {shape[0]} x {shape[1]}", 1 if small else 10
    lookups = f"{looked_up} tokens, {table[0]} x {table[1]}"

    def linear(
        name: str,
        select: Callable[[], sk.Index],
        dtype: torch.dtype = FP32,
        bar: float | None = None,
        tolerance: float = 1e-5,
    ) -> Case:
        problem = partial(make_linear, tokens, shape, select, dtype)
        name = f"masked_grad_linear, {name}, {size}"
        return Case(name, problem, LINEAR, "masked_grad_linear", {DENSE: bar}, WARM, tolerance=tolerance)

    def embedding(name: str, select: Callable[[Tensor], sk.Index], contenders: Any, versus: Any) -> Case:
        problem = partial(make_embedding, looked_up, table, select)
        name = f"masked_grad_embedding, {name}, {lookups}"
        return Case(name, problem, contenders, "masked_grad_embedding", versus, tolerance=1e-5)

    def layer(name: str, problem: Any, alternative: str, contender: Any, warm: tuple[str, ...]) -> Case:
        contenders = {"train_only": train_only, alternative: contender, "dense layer": dense}
        versus = {alternative: None, "dense layer": None}
        return Case(name, problem, contenders, "train_only", versus, warm, tolerance=1e-5)

    some = partial(random_elements, shape)
    few = partial(rows_in_use, shape=table, count=18)
    return [
        linear("1 %", partial(some, 0.01), bar=10),
        linear("0.1 %", partial(some, 0.001)),
        linear("5 %", partial(some, 0.05)),
        linear("20 %", partial(some, 0.2)),
        linear("50 %", partial(some, 0.5)),
        linear("1 % bf16", partial(some, 0.01), BF16),
        linear("10 % of the rows", lambda: random_rows(shape, shape[0] // 10)),
        # The bars: at most 1.5 times, or twice, their share of the dense product's time.
        linear("5 % of the rows", partial(random_units, shape, 0.05, "row"), bar=1 / 0.075),
        linear("5 % of the columns", partial(random_units, shape, 0.05, "column"), bar=1 / 0.075),
        linear("5 % of the columns, bf16", partial(random_units, shape, 0.05, "column"), BF16, tolerance=2**-8),
        linear(f"5 % in blocks of {block[0]} x {block[1]}", partial(random_units, shape, 0.05, "block", block), bar=10),
        embedding("18 rows", few, {**EMBEDDING, LOOKUP: embedding_lookup}, {DENSE: None, LOOKUP: None}),
        embedding("1 %", lambda ids: random_elements(table, 0.01), EMBEDDING, {DENSE: None}),
        layer(
            f"Linear forward and backward, rank {rank}, {size}",
            partial(make_linear_layer, tokens, shape, rank),
            SHIRA,
            shira,
            WARM,
        ),
        layer(
            f"Embedding forward and backward, 18 rows, {lookups}",
            partial(make_embedding_layer, looked_up, table, 18),
            TOKENS,
            trainable_tokens,
            BOTH,
        ),
    ]


def whole_product(b: Backward) -> Contender:
    """The dense gradient; the rows of it are taken for the comparison alone."""
    found: list[Tensor] = []

    def call() -> None:
        found[:] = [b.grad.T @ b.input]

    return Contender(call, lambda: [found[0].index_select(0, positions(b.index))], tolerance=2**-8)


def gpu_cases(small: bool) -> list[Case]:
    tokens, shape = (32, (48, 64)) if small else (4096, (4096, 14_336))
    size = f"{shape[0]} x {shape[1]}, {tokens} tokens, bf16"
    looked_up, table = (32, (300, 64)) if small else (16_384, (128_256, 4096))
    count, wanted = shape[0] // 20, table[0] // 4

    def elements(density: float, bar: float) -> Case:
        k = density * shape[0] * shape[1]
        moved = 2.0 * tokens * sum(shape) + 8 * k
        return Case(
            f"masked_grad_linear, {density:.1%} of {size}",
            partial(make_linear, tokens, shape, partial(random_elements, shape, density), BF16),
            LINEAR,
            "masked_grad_linear",
            {DENSE: bar},
            tolerance=CUT_OFF,
            # A transposed copy of both activations, or a block of the product.
            floor=Floor(
                moved,
                "activations + positions + result",
                operations=2 * tokens * k,
                most_extra=1.1 * max(moved, BUFFER),
            ),
        )

    def units(name: str, contenders: Any, *which: Any) -> Case:
        """5 % in columns or blocks."""
        index = random_units(shape, 0.05, *which)
        moved = 2.0 * tokens * features_read(index) + 4 * (index.numel + len(index))
        return Case(
            f"masked_grad_linear, 5% in {name} of {size}",
            partial(make_linear, tokens, shape, lambda: index, BF16),
            contenders,
            "masked_grad_linear",
            {DENSE: 10},
            tolerance=2**-8,
            floor=Floor(moved, "activations + positions + result", operations=2.0 * tokens * index.numel),
        )

    product = {"masked_grad_linear": linear_op, DENSE: linear_dense}
    block = (16, 16) if small else (128, 128)
    return [
        elements(0.001, 3),
        elements(0.01, 1),
        elements(0.05, 1),
        units("columns", product, "column"),
        units(f"blocks of {block[0]} x {block[1]}", LINEAR, "block", block),
        Case(
            f"masked_grad_linear, {count} rows of {size}",
            partial(make_linear, tokens, shape, partial(random_rows, shape, count), BF16),
            {"masked_grad_linear": linear_op, PRODUCT: whole_product},
            "masked_grad_linear",
            {PRODUCT: 10},
            tolerance=2**-8,
            floor=Floor(
                2.0 * tokens * (count + shape[1]) + 4.0 * count * shape[1],
                "selected columns + input + result",
                operations=2.0 * tokens * count * shape[1],
            ),
        ),
        Case(
            f"masked_grad_embedding, {wanted} rows, {looked_up} tokens of {table[0]} x {table[1]}, fp32",
            partial(make_embedding, looked_up, table, lambda _: random_rows(table, wanted)),
            EMBEDDING,
            "masked_grad_embedding",
            {DENSE: None},
            tolerance=1e-5,
            floor=Floor(
                8.0 * looked_up + 4 * wanted + 4 * table[1] * (looked_up * wanted / table[0] + wanted),
                "ids + positions + grad_output of tokens that hit + result",
            ),
        ),
    ]
