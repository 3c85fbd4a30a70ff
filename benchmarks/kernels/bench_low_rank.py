"""A linear layer in low-rank factors, beside the nn.Linear with the same weight: what LASER is worth in time.

At a rank of 60 % the factors are more than the weight, and lose: that is what LowRankLinear.is_smaller is for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.nn.low_rank import Block

from ..timing import DEVICE
from .case import BF16, FP32, WARM, Case, Contender, Problem, computing, short

DENSE = "nn.Linear"


@dataclass
class Layer(Problem):
    """Asked for are the output and, where there is a gradient, those of input and parameters: each expects its own."""

    low: sk.LowRankLinear
    input: Tensor
    grad: Tensor | None


def make(
    tokens: int, shape: tuple[int, int], share: float, blocks: int, permuted: bool, backward: bool, dtype: torch.dtype
) -> Layer:
    """Equal blocks of rows, each of rank `share` of its shorter side."""
    torch.manual_seed(0)
    rows, columns = shape
    count = rows // blocks
    rank = int(share * min(count, columns))
    factors = [
        Block(torch.randn(rank, columns) / columns**0.5, torch.randn(count, rank) / rank**0.5) for _ in range(blocks)
    ]
    low = sk.LowRankLinear(factors, torch.randn(rows), torch.randperm(rows) if permuted else None).to(DEVICE, dtype)
    x = torch.randn(tokens, columns).to(DEVICE, dtype)
    grad = torch.randn(tokens, rows).to(DEVICE, dtype) if backward else None
    stored = sum(p.numel() for p in low.parameters())
    return Layer(
        f"{tokens} tokens, {rows} x {columns}",
        share,
        short(dtype),
        (1 + backward) * (tokens * (rows + columns) + stored) * dtype.itemsize,
        "x, y and the factors" + (", and their gradients" if backward else ""),
        [],
        low,
        x,
        grad,
    )


def answers(layer: nn.Module, x: Tensor, grad: Tensor | None, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    if grad is None:
        with torch.no_grad():
            return [call(x)]
    output = call(x)
    return [output, *torch.autograd.grad(output, [x, *layer.parameters()], grad)]


def contender(module: Callable[[sk.LowRankLinear], nn.Module], layer: Layer) -> Contender:
    """The module that stands for the layer; it must agree with the product in fp64 of the weight that it stores."""
    made = module(layer.low)
    backward = layer.grad is not None
    x = layer.input.clone().requires_grad_(backward)
    wide = copy.deepcopy(made).double()
    expected = answers(
        wide,
        layer.input.double().requires_grad_(backward),
        None if layer.grad is None else layer.grad.double(),
        lambda x: F.linear(x, wide.weight, wide.bias),  # type: ignore[arg-type]
    )
    return computing(lambda: answers(made, x, layer.grad, made), expected=[e.detach() for e in expected])


CONTENDERS = {
    "LowRankLinear": partial(contender, copy.deepcopy),
    DENSE: partial(contender, sk.LowRankLinear.to_linear),
}


def cases(small: bool, gpu: bool) -> list[Case]:
    if gpu:  # two products of torch's
        return []
    tokens, shape = (32, (96, 64)) if small else (512, (2048, 2048))

    def case(
        name: str,
        share: float,
        *,
        blocks: int = 1,
        permuted: bool = False,
        backward: bool = False,
        dtype: torch.dtype = FP32,
        bar: float | None = None,
    ) -> Case:
        problem = partial(make, tokens, shape, share, blocks, permuted, backward, dtype)
        name = f"LowRankLinear, {name}, {tokens} tokens, {shape[0]} x {shape[1]}"
        tolerance = 2e-2 if dtype == BF16 else 1e-5
        return Case(name, problem, CONTENDERS, "LowRankLinear", {DENSE: bar}, WARM, tolerance)

    return [
        case("rank 10 %", 0.1, bar=3),
        case("rank 10 %, and backward", 0.1, backward=True),
        case("rank 10 %, bf16", 0.1, dtype=BF16),
        case("rank 5 %", 0.05),
        case("8 blocks of 10 %", 0.1, blocks=8),
        case("8 blocks of 10 %, permuted", 0.1, blocks=8, permuted=True),
        case("8 blocks of 10 %, permuted, bf16", 0.1, blocks=8, permuted=True, dtype=BF16),
        case("rank 60 %", 0.6),
    ]
