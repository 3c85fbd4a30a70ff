"""Samples of adamw_; the oracle is torch.optim.AdamW itself, in fp64, on the compact copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekernels import Index, ops

from .case import BF16, BY_NAME, FP16, FP32, FP64, LAYOUTS, Case, Layout, Maker, Sample, put, short, take


@dataclass(frozen=True)
class Options:
    lr: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.1
    eps: float = 1e-8
    maximize: bool = False

    def keywords(self) -> dict[str, float]:
        return dict(self.__dict__)

    def positional(self) -> tuple[float, ...]:
        return tuple(self.__dict__.values())


@dataclass(frozen=True)
class Plan:
    """One multi-tensor step: what each tensor looks like, and the options they share."""

    layouts: tuple[Layout, ...]
    dtypes: tuple[torch.dtype, ...] = (FP32,)  # of the dense tensors, in turn
    steps: tuple[int, ...] = (3,)
    options: Options = Options()
    amsgrad: bool = False
    fresh: bool = False  # moments are zero, as before the first step
    grads: tuple[float, ...] = ()  # put into the gradients: inf, NaN, 0, denormal, huge
    step_counts: tuple[int, ...] = ()  # of the positions, in turn; a step_count stands for the step
    per_position: int = 1  # every so manieth tensor has step_counts
    lr_tensor: bool = False
    grad_scale: float | None = None
    found_inf: float | None = None
    state: torch.dtype | None = None  # of the moments, where it is not that of the arithmetic
    rounding: tuple[int, ...] = ()

    @property
    def special(self) -> bool:
        return bool(self.grads)


def oracle(
    x: Tensor, grad: Tensor, moments: list[Tensor], step: int, options: Options, dtype: torch.dtype, scale: float = 1.0
) -> list[Tensor]:
    """The new weights and moments (two, or three for amsgrad) that torch.optim.AdamW computes in `dtype`."""
    parameter = torch.nn.Parameter(x.to("cpu", dtype, copy=True))
    parameter.grad = grad.to("cpu", dtype, copy=True) / scale
    o = options
    optimizer = torch.optim.AdamW(
        [parameter],
        o.lr,
        (o.beta1, o.beta2),
        o.eps,
        o.weight_decay,
        amsgrad=len(moments) == 3,
        maximize=o.maximize,
        foreach=False,
    )
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    state = dict(zip(names, (m.to("cpu", dtype, copy=True) for m in moments), strict=False))
    optimizer.state[parameter] = {"step": torch.tensor(float(step - 1)), **state}
    optimizer.step()
    return [parameter.detach(), *(state[name] for name in names[: len(moments)])]


def oracle_of_step_counts(
    index: Index, x: Tensor, grad: Tensor, moments: list[Tensor], step_counts: Tensor, *rest: Any
) -> list[Tensor]:
    """Each step_count by itself: what torch.optim.AdamW makes of all positions, kept at those of that step_count."""
    out = [torch.zeros_like(t.cpu(), dtype=rest[1]) for t in (x, *moments)]
    for step_count in step_counts.unique().tolist():
        for into, found in zip(out, oracle(x, grad, moments, int(step_count), *rest), strict=True):
            if index.granularity == "column":
                into[:, step_counts == step_count] = found[:, step_counts == step_count]
            else:
                into[step_counts == step_count] = found[step_counts == step_count]
    return out


def step_of(plan: Plan, i: int, index: Index) -> Tensor:
    """The step of tensor i, or the step_counts of its positions."""
    if plan.step_counts and i % plan.per_position == 0:
        count = index.positions.numel()
        return torch.tensor(plan.step_counts, dtype=FP32).repeat(count // len(plan.step_counts) + 1)[:count].clone()
    return torch.tensor(float(plan.steps[i % len(plan.steps)]), device="cpu")


def adamw(plan: Plan, compact: bool) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        n, options = len(plan.layouts), plan.options
        dtypes = [plan.dtypes[i % len(plan.dtypes)] for i in range(n)]
        masters = [torch.promote_types(dtype, FP32) for dtype in dtypes]
        indices = [maker.index(layout) for layout in plan.layouts]
        steps = [step_of(plan, i, index) for i, index in enumerate(indices)]
        dense = [maker.randn(*lay.shape, dtype=d) for lay, d in zip(plan.layouts, dtypes, strict=True)]
        values, grads, moments, expected = [], [], [], []
        for index, weight, master in zip(indices, dense, masters, strict=True):
            shape = index.compact_shape
            # What lies in the weight may be older than the master: the step must not read it.
            values.append(maker.randn(*shape, dtype=master))
            grad = maker.randn(*shape, dtype=master) if compact else maker.randn(*weight.shape, dtype=weight.dtype)
            if plan.grads:
                grad.view(-1)[: len(plan.grads)] = torch.tensor(plan.grads, dtype=grad.dtype, device=grad.device)
            grads.append(grad)
            scale, kept = 0 if plan.fresh else 1, plan.state or master
            moments.append([maker.randn(*shape, dtype=kept, scale=scale * 0.1)])
            moments[-1] += [maker.put(maker.randn(*shape, dtype=kept, scale=scale).square().cpu())]
            if plan.amsgrad:
                moments[-1] += [maker.put(maker.randn(*shape, dtype=kept, scale=scale).square().cpu())]
            exists = take(torch.ones(index.shape), index)  # what a block lacks at an edge is zero
            for tensor in (values[-1], *moments[-1], *([grad] if compact else [])):
                tensor.masked_fill_(exists.to(tensor.device) == 0, 0)
        for i in range(n):
            x, grad = (values[i], grads[i]) if compact else (take(dense[i], indices[i]), take(grads[i], indices[i]))
            wide = masters[i] if plan.special else FP64
            rest = (steps[i], options, wide, plan.grad_scale or 1.0)
            if plan.found_inf:
                expected.append([tensor.to("cpu", wide, copy=True) for tensor in (x, *moments[i])])
            elif steps[i].dim() == 0:
                expected.append(oracle(x, grad, moments[i], *rest))
            else:
                expected.append(oracle_of_step_counts(indices[i], x, grad, moments[i], *rest))
        exp_avgs, exp_avg_sqs = [m[0] for m in moments], [m[1] for m in moments]
        maxima = [m[2] for m in moments] if plan.amsgrad else []
        step_tensors = [step if step.dim() == 0 else maker.put(step) for step in steps]
        positions = [index.positions for index in indices]
        given = {"lr_tensor": options.lr if plan.lr_tensor else None, "grad_scale": plan.grad_scale}
        given["found_inf"] = plan.found_inf
        on_device = {name: None if x is None else maker.put(torch.tensor(x)) for name, x in given.items()}
        keywords = {**options.keywords(), **{name: on_device[name] for name in ("grad_scale", "found_inf")}}
        keywords["rounding"] = plan.rounding
        keywords["tiles"] = [index.tile for index in indices]
        tiles = [size for index in indices for size in index.tile]
        if plan.lr_tensor:
            keywords["lr"] = on_device["lr_tensor"]
        params, weights = (values, dense) if compact else (dense, [])
        args = (params, grads, exp_avgs, exp_avg_sqs, maxima, step_tensors, positions, weights)
        mutated = [*params, *exp_avgs, *exp_avg_sqs, *maxima]
        results = [e[0] for e in expected]
        if not compact:
            results = [put(w.to(FP64), i, e) for w, i, e in zip(dense, indices, results, strict=True)]
        columns = [[e[j] for e in expected] for j in range(1, 4 if plan.amsgrad else 3)]
        return Case(
            ops.adamw_,
            args,
            (*args, tiles, *options.positional(), *on_device.values(), list(plan.rounding)),
            [*results, *(tensor for column in columns for tensor in column)],
            kwargs=keywords,
            mutated=mutated,
            stochastic=len(plan.rounding) > 0,
            inside=list(zip(dense, indices, strict=True)),
            written=list(zip(dense, indices, values, strict=True)) if compact and not plan.found_inf else (),
        )

    return make


SMALL = tuple(BY_NAME[name] for name in ("some", "rows-int64", "rows-3d", "columns-3d", "blocks-cut"))
MANY = tuple(BY_NAME[name] for name in ("many", "rows-many", "columns-many", "blocks-many"))
DEFAULT = Options()


def plans() -> Iterator[tuple[str, Plan]]:
    for layout in LAYOUTS:
        yield layout.name, Plan((layout,))
    yield "all-together", Plan(LAYOUTS, steps=(1, 2, 1000))
    yield "first-step", Plan(SMALL, steps=(1,), fresh=True)
    yield "step-1e6", Plan(SMALL, steps=(10**6,))
    yield "amsgrad", Plan(SMALL, amsgrad=True)
    yield "amsgrad-many", Plan(MANY, amsgrad=True)
    yield "maximize", Plan(SMALL, options=replace(DEFAULT, maximize=True))
    yield "maximize-amsgrad", Plan(SMALL, options=replace(DEFAULT, maximize=True), amsgrad=True)
    yield "no-decay", Plan(SMALL, options=replace(DEFAULT, weight_decay=0.0))
    yield "lr-0", Plan(SMALL, options=replace(DEFAULT, lr=0.0))
    yield "betas-0", Plan(SMALL, options=replace(DEFAULT, beta1=0.0, beta2=0.0), fresh=True)
    yield "betas-near-1", Plan(SMALL, options=replace(DEFAULT, beta1=0.99, beta2=0.99999))
    yield "eps-large", Plan(SMALL, options=replace(DEFAULT, eps=0.5))
    yield "no-tensors", Plan(())
    for dtype in (BF16, FP16, FP64):
        yield short(dtype), Plan((*SMALL, BY_NAME["none"], BY_NAME["many"]), dtypes=(dtype,))
        yield f"{short(dtype)}-amsgrad", Plan(SMALL, dtypes=(dtype,), amsgrad=True)
    yield "mixed-dtypes", Plan(SMALL * 2, dtypes=(BF16, FP32, FP16, FP64))
    step_counts = (1, 10**6, 3, 17, 3, 1000, 40, 10**5, 2)
    yield "step-counts", Plan(LAYOUTS, step_counts=step_counts)
    yield "step-counts-many", Plan(MANY, step_counts=tuple(range(1, 600, 2)))
    yield "step-counts-of-some", Plan(SMALL * 3, step_counts=step_counts, per_position=2, steps=(7, 100), amsgrad=True)
    yield "step-counts-fresh", Plan(SMALL, step_counts=(1,), fresh=True)
    yield (
        "step-counts-betas-near-1",
        Plan(SMALL, step_counts=step_counts, options=replace(DEFAULT, beta1=0.99, beta2=0.99999)),
    )
    yield "step-counts-betas-0", Plan(SMALL, step_counts=step_counts, options=replace(DEFAULT, beta1=0.0, beta2=0.0))
    yield "step-counts-mixed-dtypes", Plan(SMALL * 2, dtypes=(BF16, FP32, FP16, FP64), step_counts=step_counts)
    yield "lr-tensor", Plan(SMALL, lr_tensor=True, options=replace(DEFAULT, lr=0.0625))
    yield (
        "lr-tensor-step-counts",
        Plan(SMALL, lr_tensor=True, options=replace(DEFAULT, lr=0.0625), step_counts=step_counts, per_position=2),
    )
    yield "grad-scale", Plan(SMALL, grad_scale=1024.0)
    yield "grad-scale-3", Plan(SMALL, grad_scale=3.0, options=replace(DEFAULT, maximize=True))
    yield "grad-scale-small", Plan((BY_NAME["many"],), dtypes=(FP16,), grad_scale=2.0**-16)
    everything = Plan(
        SMALL * 2,
        dtypes=(BF16, FP32, FP16, FP64),
        step_counts=step_counts,
        per_position=3,
        amsgrad=True,
        lr_tensor=True,
    )
    everything = replace(everything, options=replace(DEFAULT, lr=0.0625, maximize=True), grad_scale=1024.0)
    yield "all-on-device", replace(everything, found_inf=0.0)
    yield "found-inf", Plan(SMALL, grad_scale=1024.0, found_inf=1.0)
    yield "found-inf-everything", replace(everything, found_inf=2.0, grads=(float("inf"), float("nan")))
    yield "bf16-state", Plan(LAYOUTS, state=BF16, amsgrad=True)
    yield "bf16-state-many", Plan(MANY, dtypes=(BF16, FP16), state=BF16)
    yield "stochastic", Plan(SMALL * 2, dtypes=(BF16, FP16, FP32, BF16), rounding=(3, 0))
    yield "stochastic-state", Plan(SMALL, dtypes=(FP32, BF16), state=BF16, amsgrad=True, rounding=(2**40, 9))
    yield (
        "stochastic-step-counts",
        Plan(SMALL, dtypes=(FP16,), state=BF16, step_counts=step_counts, per_position=2, rounding=(1, 5)),
    )
    specials = (float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, 1e30)
    yield "special", Plan((BY_NAME["all"],), grads=specials, fresh=True, steps=(1,))
    yield "special-amsgrad", Plan((BY_NAME["all"],), grads=specials, amsgrad=True)


def adamw_samples() -> Iterator[Sample]:
    for name, plan in plans():
        yield Sample("adamw_", f"compact-{name}", adamw(plan, compact=True))
        yield Sample("adamw_", f"indexed-{name}", adamw(plan, compact=False))
