"""Steps at positions, of compact Parameters and of dense ones with indices: one native call for each kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.backend import has_native
from ..training.compact import warn_untrained
from .amp import Scaling, numbers
from .group import GroupPlan, check_unchanged, misfit, name_of
from .state import fresh_state, step_device

_CALL = partial.__call__
_RECORDING = partial(torch._C._set_grad_enabled, True)
_NOT_RECORDING = partial(torch._C._set_grad_enabled, False)


class Batch:
    """Parameters of one kind that have gradients, and the tensor lists that their op needs."""

    def __init__(
        self,
        kind: str,
        group: dict[str, Any],
        plan: GroupPlan,
        params: list[Tensor],
        states: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        check_unchanged(group, plan, params, states)
        self.kind, self.params = kind, list(params)
        self.slots = [plan.slots[p] for p in params] if kind == "compact" else []
        indices = [slot.index for slot in self.slots] or [plan.index[p] for p in params]
        self.fresh: list[tuple[Tensor, dict[str, Tensor]]] = []  # state that the first step installs
        found = []
        for p, index in zip(params, indices, strict=True):
            state = states.get(p)
            if not state:
                state = fresh_state(p, index.compact_shape, group, step_device(p, group))
                self.fresh.append((p, state))
            found.append(state)
        self.exp_avgs = [state["exp_avg"] for state in found]
        self.exp_avg_sqs = [state["exp_avg_sq"] for state in found]
        self.maxima = [state["max_exp_avg_sq"] for state in found] if group["amsgrad"] else []
        self.steps = [state["step"] for state in found]
        self.dense: list[Tensor] = [slot.weight for slot in self.slots]
        positions = [index.positions for index in indices]
        tiles = [size for index in indices for size in index.tile]
        self.lists = self.exp_avgs, self.exp_avg_sqs, self.maxima, self.steps, positions, self.dense, tiles
        self.mutated = [*params, *self.dense]
        self.op: Any = torch.ops.sparsekernels.adamw_.default._op
        self.infinite: Tensor | None = None  # found_inf=1, for the dry run
        self.native = has_native("adamw_", params[0].device.type)
        # _foreach_add_ takes twice as long for one.
        self.count = partial(self.steps[0].add_, 1) if len(found) == 1 else partial(torch._foreach_add_, self.steps, 1)
        # Ops do not bump versions by themselves; a backward over weights that changed since its forward must fail.
        self.new_version = partial(torch._C._increment_version, self.mutated)

    def gradients(self, states: Mapping[Tensor, dict[str, Any]]) -> list[Tensor] | None:
        """The gradients of all parameters, as the op needs them.

        None if everything must be checked again: a gradient is missing or does not fit, the state was cleared or
        replaced, or load_state_dict(assign=True) replaced a weight.
        """
        grads = []
        for p, m, v, step in zip(self.params, self.exp_avgs, self.exp_avg_sqs, self.steps):  # noqa: B905 - it costs time
            state, grad = states[p], p.grad
            if state.get("exp_avg") is not m or state.get("exp_avg_sq") is not v or state.get("step") is not step:
                return None
            if grad is None or grad.is_sparse or not grad.is_same_size(p):
                return None
            grads.append(grad.contiguous())
        for p, maximum in zip(self.params, self.maxima):  # noqa: B905 - empty without amsgrad
            if states[p].get("max_exp_avg_sq") is not maximum:
                return None
        for slot, weight in zip(self.slots, self.dense):  # noqa: B905
            if slot.weight is not weight:
                return None
        return grads

    def check(self, ready: Ready, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Raise ValueError for what the op would refuse, by a dry run: with found_inf=1 it only checks."""
        if not self.native:
            self._name_what_does_not_fit(ready, states)
            return
        if self.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # nothing runs while capturing, so nothing is half done
        _, grads, options, _, _ = ready
        if self.infinite is None:
            self.infinite = torch.ones((), device=self.params[0].device)
        recording = torch.is_grad_enabled()
        dry_run = partial(self.op, self.params, grads, *self.lists, *options[:-2], self.infinite, options[-1])
        try:
            deque(map(_CALL, (_NOT_RECORDING, dry_run, _RECORDING if recording else _NOT_RECORDING)), 0)
        except RuntimeError:
            self._name_what_does_not_fit(ready, states)  # the op does not know names
            raise
        finally:
            torch._C._set_grad_enabled(recording)

    def _name_what_does_not_fit(self, ready: Ready, states: Mapping[Tensor, dict[str, Any]]) -> None:
        _, grads, _, group, plan = ready
        check_unchanged(group, plan, self.params, states)
        for p, grad in zip(self.params, grads, strict=True):
            if grad.dtype != p.dtype or grad.device != p.device:
                raise ValueError(f"{name_of(group, p)}: {misfit(p, grad)}")

    def options(self, group: dict[str, Any], plan: GroupPlan, scale: Scaling) -> tuple[Any, ...]:
        """The op's arguments after the lists."""
        lr, *on_device = numbers(group, self.params[0], scale)
        beta1, beta2 = group["betas"]
        return (
            lr,
            float(beta1),
            float(beta2),
            float(group["weight_decay"]),
            float(group["eps"]),
            group["maximize"],
            *on_device,
            plan.rounding(self.kind, group),
        )

    def step(self, ready: Ready, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Make the step. A list of calls with no Python in between (except torch's modes): nothing interrupts it."""
        _, grads, options, _, _ = ready
        fresh, self.fresh = self.fresh, []
        for p, state in fresh:
            states[p].update(state)
        recording = torch.is_grad_enabled()
        calls = [
            _NOT_RECORDING,
            self.count,
            partial(self.op, self.params, grads, *self.lists, *options),
            self.new_version,
            _RECORDING if recording else _NOT_RECORDING,
        ]
        found_inf = options[-2]
        if found_inf is not None:
            calls.insert(3, partial(torch._foreach_sub_, self.steps, [found_inf] * len(self.steps)))
        try:
            deque(map(_CALL, calls), 0)
        except Exception:
            torch._C._set_grad_enabled(recording)
            torch._foreach_sub_(self.steps, 1)
            for p, _ in fresh:
                states[p].clear()
            self._name_what_does_not_fit(ready, states)
            raise
        for p, slot in zip(self.params, self.slots):  # noqa: B905 - empty for the indexed kind
            slot.written, slot.pending = p._version, False


Ready = tuple[Batch, list[Tensor], tuple[Any, ...], dict[str, Any], GroupPlan]  # with gradients, options, group


def prepared(
    kind: str, group: dict[str, Any], plan: GroupPlan, scale: Scaling, states: Mapping[Tensor, dict[str, Any]]
) -> Ready | None:
    """The parameters of a kind that have gradients, with all that their step needs; None if none has one."""
    batch = plan.batches.get(kind)
    grads = None if batch is None else batch.gradients(states)
    if batch is None or grads is None:
        params = plan.compact if kind == "compact" else plan.indexed
        live = [p for p in params if p.grad is not None]
        warn_untrained(states, params)
        if not live:
            return None
        batch = Batch(kind, group, plan, live, states)
        grads = [_fitting(p, group) for p in live]
        if len(live) == len(params):
            plan.batches[kind] = batch
    if group["differentiable"]:
        raise ValueError("differentiable=True is not possible for compact Parameters or parameters with indices")
    return batch, grads, batch.options(group, plan, scale), group, plan


def _fitting(p: Tensor, group: dict[str, Any]) -> Tensor:
    grad = p.grad
    assert grad is not None
    if grad.is_sparse:
        raise ValueError(f"{name_of(group, p)}: its gradient is sparse, but it is stepped at positions of its own")
    if grad.shape != p.shape:
        raise ValueError(f"{name_of(group, p)}: {misfit(p, grad)}")
    return grad.contiguous()
