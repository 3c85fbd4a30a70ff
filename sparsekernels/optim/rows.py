"""Steps with sparse (COO) gradients, as nn.Embedding(sparse=True) makes them: only the rows they list are touched.

The state of such a Parameter holds, beside "step" and the moments,

    rows        [N] int64   the rows seen so far, in the order of the lines of the moments; absent with
                            sparse_state="all", where line and row are the same
    row_step    [N or V]    sparse_bias_correction="row": how often each row was stepped
    row_decay   [N or V]    sparse_decay="catch_up": the sum of log(1 - lr * weight_decay) up to the row's last step,
    decay_sum   0-d         and up to the Parameter's; both fp64
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import adamw_rows_
from .plan import Plan, name_of, state_dtype, wide

PER_ROW = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "row_step", "row_decay")


def check_rows(group: dict[str, Any], plan: Plan, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raise for gradients and state that do not go together, before anything changes."""
    for p in (*plan.compact, *plan.gathered):
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(f"{name_of(group, p)}: its gradient is sparse, but it is stepped at positions of its own")
    for p in plan.dense:
        if p.grad is None:
            continue
        state = states.get(p, {})
        problem = _problem(p, p.grad, state, group) if p.grad.is_sparse else _problem_of_dense(p, state)
        if problem is not None:
            raise ValueError(f"{name_of(group, p)}: {problem}")


def _problem(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> str | None:
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        return f"a sparse gradient must be COO with one sparse dimension, got {grad.layout}"
    if not p.is_contiguous() or not p.is_floating_point():
        return "must be floating point and contiguous to be stepped with a sparse gradient"
    if group["differentiable"]:
        return "differentiable=True is not possible with a sparse gradient"
    if p.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a step with a sparse gradient reads on the host and cannot be captured in a CUDA graph"
    if group["sparse_decay"] == "catch_up" and float(group["lr"]) * group["weight_decay"] >= 1:
        return "sparse_decay='catch_up' needs lr * weight_decay < 1: what is left of a row would be nothing"
    if not state:
        return None
    missing = [name for name in _fresh(p, group, lines=0) if name not in state and name != "rows"]
    if missing:
        return f"its state was made with other options, and lacks {', '.join(missing)}; options of a run cannot change"
    moments, dtype = state["exp_avg"], state_dtype(p, group)
    if moments.dtype != dtype or moments.device != p.device:
        found = f"{moments.dtype} on {moments.device}, and would be {dtype} on {p.device}"
        return f"its state is {found} by now; save the state_dict, make a new optimizer and load it there"
    if moments.shape[1:] != p.shape[1:] or len(moments) != (len(state["rows"]) if "rows" in state else len(p)):
        return f"its state is of shape {list(moments.shape)}; the table changed since"
    return None


def _problem_of_dense(p: Tensor, state: dict[str, Any]) -> str | None:
    kept = [name for name in ("rows", "row_step", "row_decay") if name in state]
    if kept:
        return (
            "its gradient is dense, and was sparse before; both can only take turns with sparse_state='all', "
            "sparse_decay='touched' and sparse_bias_correction='global'"
        )
    if "exp_avg" in state and state["exp_avg"].dtype != p.dtype:
        return f"its gradient is dense, but its moments are {state['exp_avg'].dtype}: it was sparse before"
    return None


class SeenRows:
    """Which line of the state belongs to which row of the table: `slots` [V] int32, -1 where none does yet."""

    def __init__(self, rows: Tensor, length: int) -> None:
        self.rows = rows
        self.slots = torch.full((length,), -1, dtype=torch.int32, device=rows.device)
        self.slots[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)

    def add(self, ids: Tensor, state: dict[str, Tensor]) -> None:
        """Give every row in `ids` a line; new lines are zero. Amortised: storage grows by doubling."""
        fresh = ids[self.slots[ids] < 0]
        if not len(fresh):
            return
        fresh = fresh.unique()
        before = len(state["rows"])
        after = before + len(fresh)
        for name in PER_ROW:
            if name in state:
                _grow(state[name], after, len(self.slots))
        self.rows = state["rows"] = torch.cat([state["rows"], fresh])
        self.slots[fresh] = torch.arange(before, after, dtype=torch.int32, device=fresh.device)


def _grow(lines: Tensor, count: int, limit: int) -> None:
    """Lengthen dimension 0 in place, with zeros; shrinking keeps the storage, so room for more stays behind."""
    before, row = len(lines), lines.shape[1:]
    room = lines.untyped_storage().nbytes() // max(1, lines.itemsize * row.numel())
    if count > room:
        lines.resize_((min(limit, max(count, 2 * room)), *row))
    lines.resize_((count, *row))
    lines[before:].zero_()


def step_rows(
    p: Tensor, grad: Tensor, state: dict[str, Tensor], seen: SeenRows | None, group: dict[str, Any], stream: int
) -> SeenRows | None:
    """One step of one Parameter that `check_rows` passed. Returns what `seen` is to be at the next one."""
    ids, values = grad._indices()[0].contiguous(), grad._values().contiguous()
    if not state:
        state.update(_fresh(p, group, lines=len(p) if group["sparse_state"] == "all" else 0))
    if "rows" not in state:
        seen = None
    else:
        if seen is None or seen.rows is not state["rows"] or len(seen.slots) != len(p):
            seen = SeenRows(state["rows"], len(p))
        seen.add(ids, state)
    slots = seen.slots if seen is not None else None
    by_row = "row_step" in state or "row_decay" in state
    lines = slots[ids].long() if slots is not None and by_row else ids
    step = float(state["step"]) + 1
    scales = _scales(p, lines, step, state, group)
    if values.numel():
        beta1, beta2 = map(float, group["betas"])
        moments = (state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"] if group["amsgrad"] else None)
        options = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "maximize": group["maximize"]}
        rounding = (group["seed"], int(step), stream) if group["stochastic_rounding"] else ()
        adamw_rows_(p.detach(), values, ids, slots, *moments, scales, **options, rounding=rounding)
        torch.autograd.graph.increment_version(p)
    state["step"] = torch.tensor(step, dtype=torch.float32)  # SparseAdam's is a number
    if "row_step" in state:
        state["row_step"][lines] = state["row_step"][lines] + 1
    if "row_decay" in state:
        state["decay_sum"] += math.log1p(-float(group["lr"]) * group["weight_decay"])
        state["row_decay"][lines] = state["decay_sum"]
    return seen


def _scales(p: Tensor, lines: Tensor, step: float, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """(decay, step size) for all rows, or for each entry of `lines`."""
    beta1, beta2 = map(float, group["betas"])
    lr, dtype = float(group["lr"]), wide(p)
    decay: float | Tensor = lr * group["weight_decay"]
    age: float | Tensor = step
    if "row_step" in state:
        age = state["row_step"][lines].double() + 1
    if "row_decay" in state:
        total = state["decay_sum"] + math.log1p(-lr * group["weight_decay"])
        decay = -torch.expm1(total - state["row_decay"][lines])
    step_size = lr * (1 - beta2**age) ** 0.5 / (1 - beta1**age)
    if isinstance(decay, float) and isinstance(step_size, float):
        return torch.tensor([[decay, step_size]], dtype=dtype).to(lines.device, non_blocking=True)
    columns = [torch.as_tensor(x, dtype=dtype, device=lines.device).expand(len(lines)) for x in (decay, step_size)]
    return torch.stack(columns, dim=1)


def _fresh(p: Tensor, group: dict[str, Any], lines: int) -> dict[str, Tensor]:
    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=p.device)

    state = {"step": torch.zeros((), dtype=torch.float32)}
    if group["sparse_state"] == "seen":
        state["rows"] = zeros(0, dtype=torch.int64)
    for name in PER_ROW[: 3 if group["amsgrad"] else 2]:
        state[name] = zeros(lines, *p.shape[1:], dtype=state_dtype(p, group))
    if group["sparse_bias_correction"] == "row":
        state["row_step"] = zeros(lines, dtype=torch.float32)
    if group["sparse_decay"] == "catch_up":
        state["row_decay"] = zeros(lines, dtype=torch.float64)
        state["decay_sum"] = zeros(dtype=torch.float64)
    return state
