"""Steps of ordinary Parameters: those of torch.optim.AdamW for dense gradients, by rows for sparse ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _get_capturable_supported_devices

from ..common.supported import is_dtensor
from .amp import Scaling
from .group import GroupPlan, misfit, name_of
from .rows import problem_of_rows, step_rows

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def check_dense(group: dict[str, Any], plan: GroupPlan, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raise ValueError if a gradient and its state do not fit each other, before anything changes."""
    if group["foreach"] or group["fused"]:
        _refuse_mixed(group, [p for p in plan.dense if p.grad is not None])
    for p in plan.dense:
        if p.grad is None:
            continue
        state = states.get(p, {})
        problem = (problem_of_rows if p.grad.is_sparse else _problem)(p, p.grad, state, group)
        if problem is not None:
            raise ValueError(f"{name_of(group, p)}: {problem}")


def _refuse_mixed(group: dict[str, Any], params: list[Tensor]) -> None:
    """torch would fail on these, after compact Parameters were stepped and before their weights were written."""
    kinds = {is_dtensor(p): name_of(group, p) for p in params}
    if len(kinds) == 2:
        option = "foreach" if group["foreach"] else "fused"
        raise ValueError(
            f"{kinds[True]} is sharded and {kinds[False]} is not, and {option}=True cannot step both at once; "
            f"give each a group of its own, or leave out {option}"
        )


def _problem(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> str | None:
    if grad.shape != p.shape or grad.dtype != p.dtype or grad.device != p.device:
        return misfit(p, grad)
    if group["capturable"] and not group["fused"] and p.device.type not in _get_capturable_supported_devices():
        return f"capturable=True is not possible on {p.device.type}"
    if any(name in state for name in ("rows", "row_step", "row_decay")):
        return (
            "its gradient is dense, and was sparse before; this can only change with sparse_state='all', "
            "sparse_decay='touched' and sparse_bias_correction='global'"
        )
    if "exp_avg" in state and state["exp_avg"].dtype != p.dtype:
        return f"its gradient is dense, but its moments are {state['exp_avg'].dtype}: it was sparse before"
    if "exp_avg" in state and state["exp_avg"].shape != p.shape:
        return f"its state is of shape {list(state['exp_avg'].shape)}; its shape became {list(p.shape)}"
    return None


def step_sparse(group: dict[str, Any], plan: GroupPlan, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """One step of the parameters whose gradient is sparse."""
    for i, p in enumerate(plan.dense):
        if p.grad is None or not p.grad.is_sparse:
            continue
        stream = plan.first + len(plan.compact) + len(plan.indexed) + i
        with torch.no_grad():
            seen = step_rows(p, p.grad, states[p], plan.seen.get(p), group, stream)
        if seen is not None:
            plan.seen[p] = seen


def dense_lists(optimizer: torch.optim.AdamW, group: dict[str, Any], plan: GroupPlan) -> tuple[Lists, bool]:
    """Parameters with dense gradients, with gradients and state made by torch; and whether any is complex."""
    lists: Lists = ([], [], [], [], [], [])
    params = [p for p in plan.dense if p.grad is not None and not p.grad.is_sparse]
    if not params:
        return lists, False
    with torch.set_grad_enabled(group["differentiable"]):
        return lists, optimizer._init_group({**group, "params": params}, *lists)


def step_dense(group: dict[str, Any], lists: Lists, has_complex: bool, scale: Scaling) -> None:
    """One step by torch's own function, so that results are identical to torch's."""
    if not lists[0]:
        return
    beta1, beta2 = group["betas"]
    with torch.set_grad_enabled(group["differentiable"]):
        adam(
            *lists,
            amsgrad=group["amsgrad"],
            has_complex=has_complex,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=scale[0],
            found_inf=scale[1],
            decoupled_weight_decay=True,
        )
