"""One step with the sparse gradient of an embedding table: adamw_rows_, beside torch.optim.SparseAdam and dense AdamW.

The gradient is what `nn.Embedding(sparse=True)` makes: one entry a token, duplicates apart. Tokens are drawn evenly, or
with frequencies 1 / rank, as words of a text have them. No weight decay, for SparseAdam has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import ops

from ..timing import DEVICE
from .bench_adamw import BETA1, BETA2, CALLS, EPS, LR, oracle
from .case import Case, Contender, Floor, Problem, each_backend

SPARSE = "torch.optim.SparseAdam"
FUSED = "torch.optim.AdamW(fused=True), dense gradient"


@dataclass
class Step(Problem):
    table: Tensor
    grad: Tensor  # COO, uncoalesced
    rows: Tensor  # that occur, ascending


@functools.lru_cache(maxsize=1)
def make(shape: tuple[int, int], tokens: int, even: bool) -> Step:
    torch.manual_seed(0)
    rows, width = shape
    table = torch.randn(shape, device=DEVICE).mul_(0.02)
    weights = torch.ones(rows) if even else 1 / torch.arange(1, rows + 1)
    ids = torch.multinomial(weights, tokens, replacement=True).to(DEVICE)
    values = torch.rand(tokens, width, device=DEVICE).add_(0.1)  # sums stay away from zero, where eps matters
    grad = torch.sparse_coo_tensor(ids[None], values, shape, check_invariants=True)
    summed = grad.coalesce()
    touched = summed.indices()[0]
    expected = oracle([table[touched]], [summed.values()], 0.0)
    moved = 4 * width * (tokens + 6 * len(touched))
    formula = "gradient 4 T D + table and moments 24 R D"
    share = len(touched) / rows
    return Step(f"{tokens} tokens of {list(shape)}", share, "float32", moved, formula, expected, table, grad, touched)


def solved(step: Step, table: Tensor, call: Callable[[], Any]) -> Contender:
    untouched = [(table, step.table, sk.Index(step.rows, step.table.shape, granularity="row"))]
    return Contender(call, lambda: [table.detach()[step.rows]], untouched)


def optimizer(step: Step, make: Callable[..., torch.optim.Optimizer], dense: bool = False, **options: Any) -> Contender:
    p = nn.Parameter(step.table.clone())
    p.grad = step.grad.to_dense() if dense else step.grad
    return solved(step, p, make([p], LR, (BETA1, BETA2), EPS, **options).step)


def rows_op(step: Step, backend: Any) -> Contender:
    """The op alone, with state for all rows."""
    table = step.table.clone()
    moments = torch.zeros_like(table), torch.zeros_like(table)
    ids = step.grad._indices()[0].contiguous()
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        step_size = LR * (1 - BETA2**count) ** 0.5 / (1 - BETA1**count)
        scales = torch.tensor([[0.0, step_size]], device=DEVICE)
        options = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "backend": backend}
        ops.adamw_rows_(table, step.grad._values(), ids, None, *moments, None, scales, **options)

    return solved(step, table, call)


CONTENDERS = {
    "SparseAdamW": partial(optimizer, make=sk.SparseAdamW, weight_decay=0.0),
    "SparseAdamW(sparse_state='all')": partial(optimizer, make=sk.SparseAdamW, weight_decay=0.0, sparse_state="all"),
    **each_backend("adamw_rows_", rows_op),
    SPARSE: partial(optimizer, make=torch.optim.SparseAdam),
    FUSED: partial(optimizer, make=torch.optim.AdamW, dense=True, weight_decay=0.0, fused=True),
}


def distinct(draws: int, kinds: int) -> float:
    """How many of `kinds` are met in so many even draws."""
    return kinds * (1 - (1 - 1 / kinds) ** draws)


def cases(small: bool, gpu: bool) -> list[Case]:
    shape, tokens = ((1000, 64), 128) if small else ((32_000, 1024), 2048)
    if gpu:
        shape, tokens = ((500, 64), 64) if small else ((128_256, 4096), 8192)
    rows, width = shape

    def case(name: str, even: bool, bar: float | None, floor: Floor | None = None) -> Case:
        problem, versus = partial(make, shape, tokens, even), {SPARSE: bar, FUSED: None}
        return Case(name, problem, CONTENDERS, "SparseAdamW", versus, calls=CALLS, tolerance=1e-5, floor=floor)

    if gpu:
        moved = 4 * width * (tokens + 6 * distinct(tokens, rows)) + 8 * tokens
        name = f"adamw_rows_, {tokens} tokens with duplicates of {rows} x {width}, fp32"
        return [case(name, True, 10, Floor(moved, "gradient + ids + table and moments twice"))]
    size = f"{tokens} tokens of {rows} x {width}"
    return [case(f"sparse gradient, {size}", True, 8), case(f"sparse gradient as in a text, {size}", False, None)]
