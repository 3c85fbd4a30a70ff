"""One AdamW step at selected positions, compact and not: adamw_, beside what torch offers for it.

`SparseAdamW` and `torch.optim.AdamW(fused=True)` are timed through their ready-made `step()`. Gradients are given: how
they come about is the matter of bench_masked_grad.py. The versions of the indexed form that a user writes by hand keep
compact moments, as ours does; they differ in how they read and write the selected weights:

    advanced indexing           x = p[idx]; g = grad[idx]; ...; p[idx] = x
    index_select, index_copy_   x = p.index_select(0, idx); ...; p.index_copy_(0, idx, x)
    ... around AdamW(fused)     the same, with torch's fused step on the compact part in between
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
from .case import (
    BF16,
    FP32,
    Case,
    Contender,
    Floor,
    Problem,
    addressed,
    each_backend,
    positions,
    random_elements,
    random_rows,
    random_units,
    sector_bytes,
    short,
    take,
    touched,
    write,
)

LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2
OPTIONS = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "weight_decay": DECAY, "eps": EPS}
CALLS = 2  # a step counter that stands still shows in the second step
FUSED = "torch.optim.AdamW(fused=True)"
COPY = "compact AdamW(fused=True) + index_copy_"
SPARSE = "torch.optim.SparseAdam"
ADVANCED = "advanced indexing"
SELECT = "index_select, index_copy_"
AROUND = "index_select, AdamW(fused=True), index_copy_"
IN_A_GRAPH = "SparseAdamW(capturable=True)"
Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Step(Problem):
    weights: list[Tensor]
    grads: list[Tensor]
    indices: list[sk.Index]

    @property
    def compact(self) -> list[Tensor]:
        """In fp32, as the values are."""
        return [take(grad, index).float() for grad, index in zip(self.grads, self.indices, strict=True)]


@functools.lru_cache(maxsize=1)
def tensors(shapes: Shapes, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients; no gradient is near zero, where eps would tell one placement of it from another."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, device=DEVICE).mul_(0.02).to(dtype) for shape in shapes]
    grads = [torch.rand(shape, device=DEVICE).sub_(0.5) for shape in shapes]
    return weights, [grad.add_(grad.sign(), alpha=0.1).to(dtype) for grad in grads]


def oracle(values: list[Tensor], grads: list[Tensor], weight_decay: float) -> list[Tensor]:
    """What CALLS steps of torch.optim.AdamW make of the values in fp64."""
    params = [nn.Parameter(v.double()) for v in values]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.double()
    optimizer = torch.optim.AdamW(params, LR, (BETA1, BETA2), EPS, weight_decay, foreach=False)
    for _ in range(CALLS):
        optimizer.step()
    return [p.detach() for p in params]


def make(
    shapes: Shapes,
    select: Callable[[tuple[int, ...]], sk.Index],
    indexed: bool = False,
    dtype: torch.dtype = FP32,
) -> Step:
    weights, grads = tensors(shapes, dtype)
    torch.manual_seed(1)
    indices = [select(shape) for shape in shapes]
    numel, k = sum(w.numel() for w in weights), sum(index.numel for index in indices)
    lines = sum(touched(index, dtype.itemsize) for index in indices)
    index_bytes = sum(index.positions.numel() * index.positions.element_size() for index in indices)
    if indexed:
        moved, formula = 16 * k + index_bytes + 3 * lines, "moments 16 K + positions + lines of p (2x) and grad"
    elif indices[0].granularity == "row":
        moved, formula = 28 * k + index_bytes + lines, "values, grad, moments 28 K + positions + rows written"
    else:
        moved, formula = 28 * k + index_bytes + 2 * lines, "values, grad, moments 28 K + positions + lines of p (2x)"
    values = [take(w, index) for w, index in zip(weights, indices, strict=True)]
    compact = [take(grad, index) for grad, index in zip(grads, indices, strict=True)]
    shape = f"{len(shapes)} x {list(shapes[0])}"
    name = short(dtype)
    return Step(shape, k / numel, name, moved, formula, oracle(values, compact, DECAY), weights, grads, indices)


def all_rows(shape: tuple[int, ...]) -> sk.Index:
    return sk.Index.full(shape).to(DEVICE)


def solved(step: Step, weights: list[Any], call: Callable[[], Any], **more: Any) -> Contender:
    """A contender whose result lies in dense weights, of which only the selected part may change."""
    pairs = list(zip(weights, step.indices, strict=True))
    untouched = [(w, original, index) for (w, index), original in zip(pairs, step.weights, strict=True)]
    return Contender(call, lambda: [take(w, index) for w, index in pairs], untouched, **more)


def sparse_adamw(step: Step, **options: Any) -> Contender:
    model = nn.ParameterList(weight.clone() for weight in step.weights)
    weights = list(model.parameters())
    tuned = sk.train_only(model, sk.Selection({str(i): index for i, index in enumerate(step.indices)}))
    for values, grad in zip(tuned.parameters(), step.compact, strict=True):
        values.grad = grad
    optimizer = sk.SparseAdamW(tuned.parameters(), LR, (BETA1, BETA2), EPS, DECAY, **options)
    return solved(step, weights, optimizer.step)


def sparse_adamw_indexed(step: Step) -> Contender:
    params = _params(step.weights, step.grads)
    groups = [{"params": params, "indices": step.indices}]
    optimizer = sk.SparseAdamW(groups, LR, (BETA1, BETA2), EPS, DECAY)
    return solved(step, params, optimizer.step)


def compact_op(step: Step, backend: Any) -> Contender:
    weights = [weight.clone() for weight in step.weights]
    values = [take(weight, index).float() for weight, index in zip(weights, step.indices, strict=True)]
    state, steps, chosen = _op_state(step)
    grads, tiles = step.compact, [index.tile for index in step.indices]

    def call() -> None:
        for count in steps:
            count.add_(1)
        ops.adamw_(values, grads, *state, [], steps, chosen, weights, tiles=tiles, **OPTIONS, backend=backend)

    return solved(step, weights, call)


def indexed_op(step: Step, backend: Any) -> Contender:
    params = [weight.clone() for weight in step.weights]
    state, steps, chosen = _op_state(step)
    tiles = [index.tile for index in step.indices]

    def call() -> None:
        for count in steps:
            count.add_(1)
        ops.adamw_(params, step.grads, *state, [], steps, chosen, tiles=tiles, **OPTIONS, backend=backend)

    return solved(step, params, call)


def dense_fused(step: Step) -> Contender:
    """Steps every weight: more than was asked for, and what there is without a sparse optimizer."""
    params = _params(step.weights, step.grads)
    optimizer = torch.optim.AdamW(params, LR, (BETA1, BETA2), EPS, DECAY, fused=True)
    selected = list(zip(params, step.indices, strict=True))
    return Contender(optimizer.step, lambda: [take(p, index) for p, index in selected])


def compact_fused(step: Step) -> Contender:
    weights = [weight.clone() for weight in step.weights]
    values = _params([take(w, index).float() for w, index in zip(weights, step.indices, strict=True)], step.compact)
    optimizer = torch.optim.AdamW(values, LR, (BETA1, BETA2), EPS, DECAY, fused=True)

    @torch.no_grad()
    def call() -> None:
        optimizer.step()
        for weight, index, value in zip(weights, step.indices, values, strict=True):
            write(weight, index, value.to(weight.dtype))

    return solved(step, weights, call)


def sparse_adam(step: Step) -> Contender:
    """Has no weight decay, so it is held to the result without; its gradient is coalesced already, which favours it."""
    params = _params(step.weights, [None] * len(step.weights))
    for p, grad, index in zip(params, step.compact, step.indices, strict=True):
        rows = positions(index)[None]
        p.grad = torch.sparse_coo_tensor(rows, grad, p.shape, check_invariants=True, is_coalesced=True)
    optimizer = torch.optim.SparseAdam(params, LR, (BETA1, BETA2), EPS)
    values = [take(w, index) for w, index in zip(step.weights, step.indices, strict=True)]
    return solved(step, params, optimizer.step, expected=oracle(values, step.compact, 0.0))


def by_hand(step: Step, read: Callable[..., Tensor], write: Callable[..., Any]) -> Contender:
    params = [weight.clone() for weight in step.weights]
    places = []
    for p, grad, index in zip(params, step.grads, step.indices, strict=True):
        moments = [torch.zeros(index.compact_shape, device=DEVICE) for _ in range(2)]
        places.append((addressed(p, index), addressed(grad, index), positions(index), *moments))
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        for p, grad, chosen, exp_avg, exp_avg_sq in places:
            g = read(grad, chosen)
            exp_avg.lerp_(g, 1 - BETA1)
            exp_avg_sq.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            denominator = exp_avg_sq.sqrt().div_((1 - BETA2**count) ** 0.5).add_(EPS)
            x = read(p, chosen).mul_(1 - LR * DECAY).addcdiv_(exp_avg, denominator, value=-LR / (1 - BETA1**count))
            write(p, chosen, x)

    return solved(step, params, call)


def select_around_fused(step: Step) -> Contender:
    params = [weight.clone() for weight in step.weights]
    values = _params([take(p, index) for p, index in zip(params, step.indices, strict=True)], [None] * len(params))
    optimizer = torch.optim.AdamW(values, LR, (BETA1, BETA2), EPS, DECAY, fused=True)
    parts = zip(params, step.grads, step.indices, strict=True)
    places = [(addressed(p, index), addressed(grad, index), positions(index)) for p, grad, index in parts]

    @torch.no_grad()
    def call() -> None:
        for (_, grad, chosen), value in zip(places, values, strict=True):
            value.grad = grad.index_select(0, chosen)
        optimizer.step()
        for (p, _, chosen), value in zip(places, values, strict=True):
            p.index_copy_(0, chosen, value)

    return solved(step, params, call)


def _params(weights: list[Tensor], grads: list[Any]) -> list[nn.Parameter]:
    params = [nn.Parameter(weight.clone()) for weight in weights]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return params


def _op_state(step: Step) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    moments = [[torch.zeros(i.compact_shape, device=DEVICE) for i in step.indices] for _ in range(2)]
    return moments, [torch.zeros(()) for _ in step.indices], [index.positions for index in step.indices]


COMPACT = {
    "SparseAdamW": sparse_adamw,
    **each_backend("adamw_", compact_op),
    FUSED: dense_fused,
    COPY: compact_fused,
}
INDEXED = {
    "SparseAdamW": sparse_adamw_indexed,
    **each_backend("adamw_", indexed_op),
    ADVANCED: partial(by_hand, read=lambda t, i: t[i], write=lambda t, i, x: t.__setitem__(i, x)),
    SELECT: partial(by_hand, read=lambda t, i: t.index_select(0, i), write=lambda t, i, x: t.index_copy_(0, i, x)),
    AROUND: select_around_fused,
    FUSED: dense_fused,
}


def cases(small: bool, gpu: bool) -> list[Case]:
    if gpu:
        return gpu_cases(small)
    flat: Shapes = ((100, 5000),) if small else ((10_000, 5000),)
    table: Shapes = ((3200, 64),) if small else ((32_000, 1024),)
    half: Shapes = ((1600, 64),) if small else ((16_000, 1024),)
    layers: Shapes = ((64, 64),) * 6 if small else ((1024, 1024),) * 48
    size = f"of {flat[0][0] * 5000 / 1e6:g}M elements"
    rows, stack = f"of {table[0][0]} x {table[0][1]}", f"{len(layers)} matrices {layers[0][0]} x {layers[0][1]}"

    def case(name: str, problem: Callable[[], Step], contenders: Any, versus: Any) -> Case:
        return Case(name, problem, contenders, "SparseAdamW", versus, calls=CALLS)

    def elements(shapes: Shapes, density: float, indexed: bool = False) -> Callable[[], Step]:
        return partial(make, shapes, lambda shape: random_elements(shape, density), indexed)

    def some_rows(count: int) -> Callable[[], Step]:
        return partial(make, table, lambda shape: random_rows(shape, count))

    wide: Shapes = ((64, 128),) if small else ((8192, 6144),)
    block = (16, 16) if small else (64, 64)

    def units(*which: Any) -> Callable[[], Step]:
        return partial(make, wide, lambda shape: random_units(shape, 0.05, *which))

    with_sparse = {**COMPACT, SPARSE: sparse_adam}
    large = len(range(0, table[0][0], 4))
    # The indexed form's bar stands against advanced indexing, which is how the step is written by hand first.
    return [
        case(f"compact, 1 % {size}", elements(flat, 0.01), COMPACT, {FUSED: 15, COPY: None}),
        case(f"compact, 0.1 % {size}", elements(flat, 0.001), COMPACT, {FUSED: 150, COPY: None}),
        case(
            f"indexed, 1 % {size}",
            elements(flat, 0.01, True),
            INDEXED,
            {ADVANCED: 10, SELECT: None, AROUND: None, FUSED: None},
        ),
        case(f"compact, 18 rows {rows}", some_rows(18), with_sparse, {COPY: 2, SPARSE: None, FUSED: None}),
        case(f"compact, {large} rows {rows}", some_rows(large), COMPACT, {COPY: None, FUSED: None}),
        case(f"compact, all {half[0][0]} x {half[0][1]}", partial(make, half, all_rows), COMPACT, {FUSED: None}),
        *[
            case(f"compact, 5 % {of} of {wide[0][0]} x {wide[0][1]}", units(*which), COMPACT, {COPY: None, FUSED: None})
            for of, which in (
                ("of the columns", ("column",)),
                (f"in blocks of {block[0]} x {block[1]}", ("block", block)),
            )
        ],
        case(f"compact, 1 % of {stack}", elements(layers, 0.01), COMPACT, {FUSED: None, COPY: None}),
    ]


def gpu_cases(small: bool) -> list[Case]:
    height, width = table = (500, 64) if small else (128_256, 4096)
    stack: Shapes = ((40, 50),) * 5 if small else ((4000, 5000),) * 50
    numel, density = len(stack) * stack[0][0] * stack[0][1], 0.01
    k = density * numel
    contenders = {**COMPACT, IN_A_GRAPH: partial(sparse_adamw, capturable=True)}
    written = "values, moments twice + grad + positions + rows written"
    twice = "values, moments twice + grad + positions + sectors of the weight twice"

    def case(name: str, shapes: Shapes, select: Any, floor: Floor, versus: Any, ours: str = "SparseAdamW") -> Case:
        problem = partial(make, shapes, select, dtype=BF16)
        return Case(
            f"adamw_ of compact values, {name}, bf16",
            problem,
            contenders,
            ours,
            versus,
            tolerance=2**-8,
            calls=CALLS,
            floor=floor,
            graph=ours == IN_A_GRAPH,
        )

    def rows(count: int, **asked: float) -> tuple[Any, ...]:
        floor = Floor(count * (4 + 30 * width), written, **asked)
        return f"{count} rows of {height} x {width}", (table,), partial(random_rows, count=count), floor

    return [
        case(*rows(height // 4, share=0.85), {FUSED: None, COPY: None}),
        # At their floors both, the ratio is 15: the dense step moves 14 bytes for each of the elements.
        case(
            f"1 % of {numel:.0e} in {len(stack)} tensors",
            stack,
            partial(random_elements, density=density),
            Floor(28 * k + 4 * k + 2 * sector_bytes(numel, density, 2), twice, share=0.6),
            {FUSED: 20, COPY: None},
        ),
        case(*rows(18, most=8e-6), {}, IN_A_GRAPH),
    ]
