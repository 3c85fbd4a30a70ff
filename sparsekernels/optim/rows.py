"""Steps with sparse (COO) gradients, as nn.Embedding(sparse=True) makes them: only the rows they list are touched.

A row is what one entry of the gradient's indices names: p[i] with one sparse dimension, p[i, j] with two, and so on;
rows are counted flat, in the order of memory. Besides "step" and the moments, its state has

    rows        [N] int64   the rows seen so far, in the order of the lines of the moments; absent with
                            sparse_state="all", where line and row are the same and moments have the Parameter's shape
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
from .group import misfit
from .state import MOMENTS, SeenRows, compute_dtype, state_dtype


def problem_of_rows(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> str | None:
    """The reason why `p` cannot be stepped with a sparse gradient; None if it can."""
    if not p.is_contiguous() or not p.is_floating_point():
        return "must be floating point and contiguous to be stepped with a sparse gradient"
    if grad.shape != p.shape or grad.dtype != p.dtype or grad.device != p.device:
        return misfit(p, grad)
    if group["differentiable"]:
        return "differentiable=True is not possible with a sparse gradient"
    if p.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a step with a sparse gradient reads on the host and cannot be captured in a CUDA graph"
    if group["sparse_decay"] == "catch_up" and float(group["lr"]) * group["weight_decay"] >= 1:
        return "sparse_decay='catch_up' needs lr * weight_decay < 1; else a step would erase the row"
    if not state:
        return None
    missing = [name for name in _names(group) if name not in state]
    if missing:
        lacks = f"its state was made with other options, and lacks {', '.join(missing)}"
        return f"{lacks}; these options cannot change during a run"
    moments, dtype = state["exp_avg"], state_dtype(p, group)
    if moments.dtype != dtype or moments.device != p.device:
        found = f"{moments.dtype} on {moments.device}, expected {dtype} on {p.device}"
        return f"its state is {found}; save the state_dict, make a new optimizer and load it there"
    return _problem_of_shapes(p, grad.sparse_dim(), state)


def _problem_of_shapes(p: Tensor, sparse_dim: int, state: dict[str, Tensor]) -> str | None:
    moments, lines, before = state["exp_avg"], math.prod(p.shape[:sparse_dim]), sparse_dim
    whole = p.shape
    if "rows" in state:
        lines, before = len(state["rows"]), max(0, p.dim() + 1 - moments.dim())
        whole = torch.Size((lines, *p.shape[before:]))
    if moments.shape != whole:
        return f"its state is of shape {list(moments.shape)}; the table has changed its shape"
    by_row = [len(state[name]) for name in ("row_step", "row_decay") if name in state]
    divided_anew = before != sparse_dim and (by_row or not _in_order(p, before, state))
    if divided_anew or any(count != lines for count in by_row):
        return (
            f"its gradient has {sparse_dim} sparse dimensions, and had another number before; that can only change "
            "with sparse_state='all', sparse_decay='touched' and sparse_bias_correction='global'"
        )
    return None


def _in_order(p: Tensor, sparse_dim: int, state: dict[str, Tensor]) -> bool:
    """Whether the state has an entry for every row, in order, as a state of SparseAdam has."""
    rows = state["rows"]
    return len(rows) == math.prod(p.shape[:sparse_dim]) and torch.equal(rows, torch.arange(len(rows)).to(rows))


def step_rows(
    p: Tensor, grad: Tensor, state: dict[str, Tensor], seen: SeenRows | None, group: dict[str, Any], stream: int
) -> SeenRows | None:
    """One step of one Parameter that has no `problem_of_rows`. Returns `seen` for the next step."""
    ids, values = _flat(grad), grad._values().contiguous()
    sparse_dim = grad.sparse_dim()
    table = p.detach()
    if sparse_dim != 1:
        table = table.view(math.prod(p.shape[:sparse_dim]), *p.shape[sparse_dim:])
    if not state:
        state.update(_fresh(p, table.shape, group))
    if "rows" not in state:
        seen = None
    else:
        if state["exp_avg"].shape[1:] != table.shape[1:]:  # row-major like the table, so they can be reshaped
            state.update({name: state[name].reshape(table.shape) for name in MOMENTS if name in state})
            state["rows"] = torch.arange(len(table), device=p.device)
        if seen is None or seen.rows is not state["rows"] or len(seen.slots) != len(table):
            seen = SeenRows(state["rows"], len(table))
        seen.add(ids, state)
    slots = seen.slots if seen is not None else None
    by_row = "row_step" in state or "row_decay" in state
    lines = slots[ids].long() if slots is not None and by_row else ids
    step = float(state["step"]) + 1
    scales = _scales(p, lines, step, state, group)
    if values.numel():
        beta1, beta2 = map(float, group["betas"])
        m, v, maximum = state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"] if group["amsgrad"] else None
        if seen is None and sparse_dim != 1:
            m, v, maximum = (
                m.view(table.shape),
                v.view(table.shape),
                None if maximum is None else maximum.view_as(table),
            )
        options = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "maximize": group["maximize"]}
        rounding = (group["seed"], int(step), stream) if group["stochastic_rounding"] else ()
        adamw_rows_(table, values, ids, slots, m, v, maximum, scales, **options, rounding=rounding)
        torch.autograd.graph.increment_version(p)
    state["step"] = torch.tensor(step, dtype=torch.float32)  # in SparseAdam it is a Python number
    if "row_step" in state:
        state["row_step"][lines] = state["row_step"][lines] + 1
    if "row_decay" in state:
        state["decay_sum"] += math.log1p(-float(group["lr"]) * group["weight_decay"])
        state["row_decay"][lines] = state["decay_sum"]
    return seen


def _flat(grad: Tensor) -> Tensor:
    """The flat numbers of the rows that a sparse gradient lists."""
    indices = grad._indices()
    if grad.sparse_dim() == 0:
        return indices.new_zeros(indices.shape[1])
    ids = indices[0]
    for i in range(1, grad.sparse_dim()):
        ids = ids * grad.shape[i] + indices[i]
    return ids.contiguous()


def _scales(p: Tensor, lines: Tensor, step: float, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """(decay, step size) for all rows, or for each entry of `lines`."""
    beta1, beta2 = map(float, group["betas"])
    lr, dtype = float(group["lr"]), compute_dtype(p)
    decay: float | Tensor = lr * group["weight_decay"]
    step_count: float | Tensor = step
    if "row_step" in state:
        step_count = state["row_step"][lines].double() + 1
    if "row_decay" in state:
        total = state["decay_sum"] + math.log1p(-lr * group["weight_decay"])
        decay = -torch.expm1(total - state["row_decay"][lines])
    step_size = lr * (1 - beta2**step_count) ** 0.5 / (1 - beta1**step_count)
    if isinstance(decay, float) and isinstance(step_size, float):
        return torch.tensor([[decay, step_size]], dtype=dtype).to(lines.device, non_blocking=True)
    columns = [torch.as_tensor(x, dtype=dtype, device=lines.device).expand(len(lines)) for x in (decay, step_size)]
    return torch.stack(columns, dim=1)


def _names(group: dict[str, Any]) -> list[str]:
    names = ["step", *MOMENTS[: 3 if group["amsgrad"] else 2]]
    if group["sparse_bias_correction"] == "row":
        names.append("row_step")
    if group["sparse_decay"] == "catch_up":
        names += ["row_decay", "decay_sum"]
    return names


def _fresh(p: Tensor, table: torch.Size, group: dict[str, Any]) -> dict[str, Tensor]:
    names, seen = _names(group), group["sparse_state"] == "seen"
    lines = 0 if seen else table[0]
    moments = torch.Size((0, *table[1:])) if seen else p.shape
    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {
        **dict.fromkeys(MOMENTS, (moments, state_dtype(p, group))),
        "row_step": (torch.Size((lines,)), torch.float32),
        "row_decay": (torch.Size((lines,)), torch.float64),
        "decay_sum": (torch.Size(()), torch.float64),
    }
    state = {"step": torch.zeros((), dtype=torch.float32)}
    if seen:
        state["rows"] = torch.zeros(0, dtype=torch.int64, device=p.device)
    for name in names[1:]:
        shape, dtype = shapes[name]
        state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
    return state
