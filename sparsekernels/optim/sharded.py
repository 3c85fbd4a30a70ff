"""Steps of compact Parameters that fully_shard cut: each rank steps its own values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.supported import local_of
from ..ops import adamw_
from ..training import sharding
from ..training.compact import warn_untrained
from .amp import NOTHING, numbers
from .group import GroupPlan, misfit, name_of
from .state import MOMENTS, state_dtype, step_device

State = Mapping[Tensor, dict[str, Any]]


def check_sharded(group: dict[str, Any], plan: GroupPlan, states: State) -> None:
    """Raise ValueError if a gradient or state does not fit, or the ranks train other positions; nothing has changed."""
    if group["differentiable"]:
        raise ValueError("differentiable=True is not possible for compact Parameters")
    warn_untrained(states, plan.sharded)
    for p in plan.sharded:
        if p.grad is None:
            continue
        if p.grad.shape != p.shape or p.grad.dtype != p.dtype or p.grad.device != p.device:
            raise ValueError(f"{name_of(group, p)}: {misfit(p, p.grad)}")
        state = states.get(p) or {}
        for name in MOMENTS:
            if name in state and (state[name].shape != p.shape or state[name].dtype != state_dtype(p, group)):
                found = f"{state[name].dtype} of shape {list(state[name].shape)}"
                raise ValueError(f"{name_of(group, p)} has {name} of {found}; it needs {list(p.shape)}")
    sharding.compare(plan.slots[p] for p in plan.sharded)


@torch.no_grad()
def step_sharded(group: dict[str, Any], plan: GroupPlan, states: State) -> None:
    """One step of the values that this rank holds."""
    stepped = [p for p in plan.sharded if p.grad is not None]
    if not stepped:
        return
    names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    for p in stepped:
        if not states[p]:
            states[p]["step"] = torch.zeros((), device=step_device(p, group), dtype=torch.float32)
            states[p].update({name: torch.zeros_like(p, dtype=state_dtype(p, group)) for name in names})
    params, grads = _locals(stepped), _locals(p.grad for p in stepped)
    moments = [_locals(states[p][name] for p in stepped) for name in names]
    steps = [states[p]["step"] for p in stepped]
    lr, lr_tensor, _, _ = numbers(group, params[0], NOTHING)
    beta1, beta2 = group["betas"]
    torch._foreach_add_(steps, 1)
    adamw_(
        params,
        grads,
        moments[0],
        moments[1],
        moments[2] if group["amsgrad"] else [],
        steps,
        [plan.every(p) for p in params],
        lr=lr if lr_tensor is None else lr_tensor,
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
        rounding=plan.rounding("sharded", group),
    )


def _locals(shards: Iterable[Any]) -> list[Tensor]:
    return [local_of(shard).reshape(-1) for shard in shards]
