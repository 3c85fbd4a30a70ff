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
from typing import Any

import torch
from torch import Tensor

from ..ops import adamw_rows_
from .plan import state_dtype

OPTIONS: dict[str, tuple[str, ...]] = {
    "sparse_state": ("seen", "all"),
    "sparse_decay": ("touched", "catch_up"),
    "sparse_bias_correction": ("global", "row"),
}
PER_ROW = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "row_step", "row_decay")


def check_options(group: dict[str, Any]) -> None:
    for name, allowed in OPTIONS.items():
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {group[name]!r}")


def check_gradient(grad: Tensor, p: Tensor, name: str, group: dict[str, Any]) -> None:
    """Refuse what a step cannot use, before anything changes."""
    if group["sparse_decay"] == "catch_up" and float(group["lr"]) * group["weight_decay"] >= 1:
        raise ValueError("sparse_decay='catch_up' needs lr * weight_decay < 1: what is left of a row would be nothing")
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        raise ValueError(f"{name}: a sparse gradient must be COO with one sparse dimension, got {grad.layout}")
    if not p.is_contiguous() or not p.is_floating_point():
        raise ValueError(f"{name}: must be floating point and contiguous to be stepped with a sparse gradient")


class SeenRows:
    """Which line of the state belongs to which row of the table: `slots` [V] int32, -1 where none does yet."""

    def __init__(self, rows: Tensor, length: int) -> None:
        self.rows = rows
        self.slots = torch.full((length,), -1, dtype=torch.int32, device=rows.device)
        self.slots[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)

    def add(self, ids: Tensor, state: dict[str, Tensor]) -> None:
        """Give every row in the sorted `ids` a line; new lines are zero. Amortised: storage grows by doubling."""
        fresh = torch.unique_consecutive(ids[self.slots[ids] < 0])
        if not len(fresh):
            return
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
    p: Tensor, grad: Tensor, state: dict[str, Tensor], seen: SeenRows | None, group: dict[str, Any]
) -> SeenRows | None:
    """One step of one Parameter. Returns what `seen` is to be at the next one."""
    ids, values = grad._indices()[0].contiguous(), grad._values().contiguous()
    if grad.is_coalesced():
        order = torch.arange(len(ids), device=ids.device)
    else:
        ids, order = ids.sort(stable=True)
    if not state:
        state.update(_fresh(p, group))
    if "rows" not in state:
        seen = None
    else:
        if seen is None or seen.rows is not state["rows"]:
            seen = SeenRows(state["rows"], len(p))
        seen.add(ids, state)
    slots = seen.slots if seen is not None else None
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32) + 1  # SparseAdam's is a number
    scales = _scales(ids, slots, state, group)
    if values.numel():
        beta1, beta2 = map(float, group["betas"])
        moments = (state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"))
        options = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "maximize": group["maximize"]}
        adamw_rows_(p.detach(), values, ids, order, slots, *moments, scales, **options)
        torch.autograd.graph.increment_version(p)
    return seen


def _scales(ids: Tensor, slots: Tensor | None, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """(decay, step size) for all rows, or for each entry of ids; counts the ages and decays of rows on the way."""
    beta1, beta2 = map(float, group["betas"])
    lr, dtype = float(group["lr"]), state["exp_avg"].dtype
    decay: float | Tensor = lr * group["weight_decay"]
    step: float | Tensor = float(state["step"])
    lines = ids if slots is None else slots[ids].long()
    if "row_step" in state:
        step = state["row_step"][lines] + 1
        state["row_step"][lines] = step
        step = step.double()
    if "decay_sum" in state:
        total = state["decay_sum"].add_(math.log1p(-float(decay)))
        decay = -torch.expm1(total - state["row_decay"][lines])
        state["row_decay"][lines] = total
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    if isinstance(decay, float) and isinstance(step_size, float):
        return torch.tensor([[decay, step_size]], dtype=dtype).to(ids.device, non_blocking=True)
    columns = [torch.as_tensor(x, dtype=dtype, device=ids.device).expand(len(ids)) for x in (decay, step_size)]
    return torch.stack(columns, dim=1)


def _fresh(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    lines = len(p) if group["sparse_state"] == "all" else 0
    shape = (lines, *p.shape[1:])

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=p.device)

    state = {"step": torch.zeros((), dtype=torch.float32)}
    if group["sparse_state"] == "seen":
        state["rows"] = zeros(0, dtype=torch.int64)
    for name in PER_ROW[: 3 if group["amsgrad"] else 2]:
        state[name] = zeros(*shape, dtype=state_dtype(p))
    if group["sparse_bias_correction"] == "row":
        state["row_step"] = zeros(lines, dtype=torch.float32)
    if group["sparse_decay"] == "catch_up":
        state["row_decay"] = zeros(lines, dtype=torch.float64)
        state["decay_sum"] = zeros(dtype=torch.float64)
    return state
