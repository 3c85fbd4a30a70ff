"""Samples of the AdamW step over the rows of a sparse gradient; the oracle is a plain loop over rows, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sparsekernels import ops

from .case import BF16, FP16, FP32, FP64, Case, Maker, Sample, short, slices


@dataclass(frozen=True)
class Rows:
    """A table of V rows, and T entries of a gradient that name some of them."""

    table: int = 13
    row: tuple[int, ...] = (7,)
    tokens: int = 20
    dtype: torch.dtype = FP32
    same: bool = False  # every entry names one row
    ascending: bool = False  # as of a coalesced gradient
    slots: int | None = None  # lines of the state, where they are not the rows
    each: bool = False  # an own decay and step size for each entry
    amsgrad: bool = False
    maximize: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    special: tuple[float, ...] = ()
    state: torch.dtype | None = None  # where it is not as wide as the arithmetic
    rounding: tuple[int, ...] = ()


def adamw_rows(plan: Rows) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        wide_dtype = torch.promote_types(plan.dtype, FP32)
        state_dtype = plan.state or wide_dtype
        param = maker.randn(plan.table, *plan.row, dtype=plan.dtype)
        grads = maker.randn(plan.tokens, *plan.row, dtype=plan.dtype)
        if plan.special:
            grads.view(-1)[: len(plan.special)] = torch.tensor(plan.special, dtype=plan.dtype, device=grads.device)
        tokens = maker.integers(plan.table, plan.tokens)
        if plan.same:
            tokens = torch.full_like(tokens, plan.table - 1)
        ids = tokens.sort().values if plan.ascending else tokens
        if plan.slots is not None:  # only rows that occur have a slot
            slots = torch.full((plan.table,), -1)
            slots[ids.unique()] = torch.randperm(plan.slots, generator=maker.generator)[: len(ids.unique())]
        lines = plan.table if plan.slots is None else plan.slots
        m = maker.randn(lines, *plan.row, dtype=state_dtype, scale=0.1)
        v = maker.put(maker.randn(lines, *plan.row, dtype=state_dtype).square().cpu())
        largest = maker.put(maker.randn(lines, *plan.row, dtype=state_dtype).square().cpu()) if plan.amsgrad else None
        factors = torch.rand(plan.tokens if plan.each else 1, 2, generator=maker.generator, dtype=FP64) * 0.1
        scales = maker.put(factors.to(wide_dtype))

        wide = wide_dtype if plan.special else FP64
        expected = [x.to("cpu", wide, copy=True) for x in (param, m, v)]
        if largest is not None:
            expected.append(largest.to("cpu", wide, copy=True))
        for row in ids.unique().tolist():
            entries = (ids == row).nonzero().flatten().tolist()
            g = sum(grads[i].to("cpu", wide) for i in entries) * (-1 if plan.maximize else 1)
            line = row if plan.slots is None else int(slots[row])
            decay, step_size = scales.to("cpu", wide)[entries[0] if plan.each else 0]
            x, m1, v1 = (t[i] for t, i in zip(expected, (row, line, line), strict=False))
            m1.mul_(plan.beta1).add_((1 - plan.beta1) * g)
            v1.mul_(plan.beta2).add_((1 - plan.beta2) * g * g)
            if largest is not None:
                v1 = expected[3][line].copy_(torch.maximum(expected[3][line], v1))
            x.mul_(1 - decay).sub_(step_size * m1 / (v1.sqrt() + plan.eps))
        mutated = [param, m, v] if largest is None else [param, m, v, largest]
        touched = ids.unique()
        lines_touched = touched if plan.slots is None else slots[touched].sort().values
        inside = [(param, slices(touched, param.shape))]
        inside += [(x, slices(lines_touched, x.shape)) for x in mutated[1:]]
        tables = None if plan.slots is None else maker.put(slots.to(torch.int32))
        args = (param, grads, maker.put(ids), tables, m, v, largest, scales)
        numbers = {"beta1": plan.beta1, "beta2": plan.beta2, "eps": plan.eps, "maximize": plan.maximize}
        numbers["rounding"] = list(plan.rounding)
        return Case(
            ops.adamw_rows_,
            args,
            (*args, *numbers.values()),
            expected,
            kwargs=numbers,
            mutated=mutated,
            stochastic=len(plan.rounding) > 0,
            inside=[(x, index.to(x.device)) for x, index in inside],
        )

    return make


PLANS = {
    "duplicates": Rows(),
    "ascending": Rows(ascending=True, each=True),
    "one": Rows(table=1, row=(1,), tokens=1),
    "one-row-only": Rows(same=True),
    "nothing": Rows(tokens=0),
    "no-columns": Rows(row=(0,)),
    "vector": Rows(row=()),
    "3d": Rows(row=(3, 5)),
    "wide": Rows(table=50, row=(1300,), tokens=70),
    "many": Rows(table=2000, row=(33,), tokens=3000),
    "many-same": Rows(table=5, row=(65,), tokens=1500),
    "slots": Rows(slots=15),
    "slots-many": Rows(table=2000, row=(33,), tokens=900, slots=1000),
    "each": Rows(each=True),
    "each-slots-amsgrad": Rows(each=True, slots=15, amsgrad=True),
    "amsgrad": Rows(amsgrad=True),
    "maximize": Rows(maximize=True),
    "betas-0": Rows(beta1=0.0, beta2=0.0),
    "eps-large": Rows(eps=0.5),
    "special": Rows(special=(float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, 1e19), amsgrad=True),
    "bf16-state": Rows(state=BF16, amsgrad=True),
    "bf16-state-of-bf16": Rows(state=BF16, dtype=BF16, slots=14),
    "bf16-state-stochastic": Rows(state=BF16, dtype=FP16, amsgrad=True, rounding=(5, 7, 1)),
    "bf16-stochastic": Rows(dtype=BF16, row=(130,), rounding=(2**40 + 3, 1, 0)),
    **{f"{short(d)}{'-all' * a}": Rows(dtype=d, each=a, slots=14 if a else None, amsgrad=a)
       for d in (BF16, FP16, FP64) for a in (False, True)},
}  # fmt: skip


def adamw_rows_samples() -> Iterator[Sample]:
    for name, plan in PLANS.items():
        yield Sample("adamw_rows_", name, adamw_rows(plan), heavy=plan.tokens > 500)
