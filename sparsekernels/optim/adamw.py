"""AdamW that touches only what is selected; a drop-in for torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..sparsify import SLOT, STEP_HOOKS
from .plan import MOMENTS, Plan, checked_indices, fresh_state, state_dtype


class SparseAdamW(torch.optim.AdamW):
    r"""AdamW over compact Parameters, over index sets of dense parameters, and over dense parameters.

    Three kinds of parameter, told apart by what they are:

    1. compact Parameters from `sparsify`: moments, decay and the write into the dense weight in one pass over the
       selected positions of all tensors;
    2. dense Parameters of a group that has `indices` (one `Index` for each parameter; `Selection.param_groups(model)`
       makes such groups): `.grad` is dense, but state exists for the selected positions only and nothing else is read
       or written; unselected weights keep their bits, weight decay included;
    3. any other Parameter: exactly `torch.optim.AdamW`.

    The rule, defaults, arguments, errors, hooks and `state_dict` are those of `torch.optim.AdamW`.

    Args:
        params: parameters or groups; a group may hold `indices`.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in `torch.optim.AdamW`; a tensor lr or beta is read on the
            host for kinds 1 and 2.
        foreach, fused: choose the implementation for kind 3 only; kinds 1 and 2 are always fused.
        capturable: state["step"] lives on the device of the parameter.
        differentiable: kind 3 only.

    State of kinds 1 and 2: `step` as in AdamW, `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`) of the size of the
    selection, fp32 (fp64 for fp64 weights) whatever the dtype of the weight. A half-precision weight of kind 2 is
    rounded once a step and loses updates below its resolution; kind 1 keeps an fp32 master and does not.

    Raises:
        ValueError: as `torch.optim.AdamW`; indices that do not fit their parameters; differentiable with kinds 1 or 2;
            a state_dict made for a selection of another size, or for other indices. TypeError: indices that are no
            `Index`.
    """

    writes_weights = True  # steps write the dense weights, too: nothing is left to do after them

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._plans: dict[int, Plan] = {}
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        # GradScaler then unscales the gradients itself, before step, for all kinds alike.
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the group may hold `indices`."""
        if param_group.get("indices") is not None:
            param_group = {**param_group, **checked_indices(param_group)}
            if param_group.get("differentiable", self.defaults["differentiable"]):
                raise ValueError("differentiable=True is not possible for parameters with indices")
        super().add_param_group(param_group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; nothing changes if the state belongs to another selection."""
        own = [(group, p, i) for group in self.param_groups for i, p in enumerate(group["params"])]
        saved = [(group, key, i) for group in state_dict["param_groups"] for i, key in enumerate(group["params"])]
        moments: dict[Tensor, dict[str, Tensor]] = {}
        for (group, p, i), (old, key, j) in zip(own, saved, strict=False):
            if not group.get("indices"):
                shape, dtype = p.shape, p.dtype
            else:
                index = group["indices"][i]
                shape, dtype = index.compact_shape, state_dtype(p)
                if old.get("indices") and old["indices"][j] != index:
                    raise ValueError(f"state_dict was made for other indices of parameter {key}")
            found = {name: value for name, value in state_dict["state"].get(key, {}).items() if name in MOMENTS}
            for name, value in found.items():
                if value.shape != shape:
                    raise ValueError(
                        f"state_dict was made for another selection: {name} of parameter {key} has shape "
                        f"{list(value.shape)}, this optimizer needs {list(shape)}"
                    )
            if group.get("indices"):
                moments[p] = {name: value.to(p.device, dtype, copy=True) for name, value in found.items()}
        indices = [group.get("indices") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, indices, strict=True):
            group.pop("indices", None)
            if kept is not None:
                group["indices"] = kept
        for p, state in moments.items():
            if state:
                self.state[p].update(state)  # torch casts state to the dtype of the parameter; this is wider
        for group, p, _ in own:
            if (group.get("indices") or SLOT in p.__dict__) and "step" in self.state.get(p, {}):
                self.state[p]["step"] = self.state[p]["step"].float()  # fp64 under an fp64 default dtype
        self._plans = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform a single optimization step.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned.
        """
        if torch.compiler.is_compiling():
            return self._uncompiled_step(closure)
        # torch wraps step() in a profiler scope and hook calls, which cost more than stepping a few rows does.
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or len(_global_optimizer_post_hooks) > len(STEP_HOOKS)
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        ):
            return self._hooked_step(closure)
        return self._plain_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # tells torch that step() calls hooks by itself

    def _plain_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            plan = self._plans.get(number)
            if plan is None or not plan.holds(group):
                plan = self._plans[number] = Plan(group)
            if plan.compact or plan.gathered:
                with torch.no_grad():
                    if plan.compact:
                        self._step_sparse("compact", group, plan, plan.compact)
                    if plan.gathered:
                        self._step_sparse("gathered", group, plan, plan.gathered)
            if plan.dense:
                self._step_dense(group, plan.dense)
        return loss

    _uncompiled_step = torch.compiler.disable(_plain_step)
    _hooked_step = torch.optim.Optimizer.profile_hook_step(_plain_step)

    def _step_sparse(self, kind: str, group: dict[str, Any], plan: Plan, params: list[Tensor]) -> None:
        grads = [p.grad for p in params]
        complete = all(grad is not None for grad in grads)
        if not complete:
            params = [p for p in params if p.grad is not None]
            grads = [p.grad for p in params]
        if not params:
            return
        lists = plan.lists.get(kind) if complete else None
        if lists is None or not self._current(plan, params, lists):
            lists = self._lists(kind, group, plan, params)
            if complete:
                plan.lists[kind] = lists
        values, *state, steps, dense, positions, mutated = lists
        beta1, beta2 = group["betas"]
        options = (
            float(group["lr"]),
            float(beta1),
            float(beta2),
            float(group["weight_decay"]),
            float(group["eps"]),
            group["maximize"],
        )
        torch._foreach_add_(steps, 1)
        try:
            if kind == "compact":
                torch.ops.sparsekernels.adamw_compact_.default(values, grads, *state, steps, dense, positions, *options)
            else:
                grads = [grad.contiguous() for grad in grads if grad is not None]
                torch.ops.sparsekernels.adamw_gathered_.default(values, grads, *state, steps, positions, *options)
        except BaseException:
            torch._foreach_sub_(steps, 1)
            raise
        # Ops do not bump versions by themselves; a backward over weights that changed since its forward must fail.
        torch.autograd.graph.increment_version(mutated)
        if kind == "compact":
            for p in params:
                plan.slots[p].written = p._version

    def _current(self, plan: Plan, params: list[Tensor], lists: list[list[Tensor]]) -> bool:
        """Whether nobody cleared or replaced the state, or exchanged weights by load_state_dict(assign=True)."""
        for p, exp_avg in zip(params, lists[1]):  # noqa: B905 - strict costs time here
            if self.state[p].get("exp_avg") is not exp_avg:
                return False
        for p, weight in zip(params, lists[5]):  # noqa: B905, SIM110 - lists[5] is empty for the gathered kind
            if plan.slots[p].weight is not weight:
                return False
        return True

    def _lists(self, kind: str, group: dict[str, Any], plan: Plan, params: list[Tensor]) -> list[list[Tensor]]:
        """values, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, dense weights, positions, and all that is mutated."""
        if group["differentiable"]:
            raise ValueError("differentiable=True is not possible for compact Parameters or parameters with indices")
        for p in params:
            if not self.state[p]:
                shape = p.shape if kind == "compact" else plan.index[p].compact_shape
                self.state[p].update(fresh_state(p, shape, group["amsgrad"], group["capturable"]))
        states = [self.state[p] for p in params]
        dense: list[Tensor] = []
        if kind == "compact":
            slots = [plan.slots[p] for p in params]
            dense = [slot.weight for slot in slots]
            positions = [slot.index.positions for slot in slots]
        else:
            positions = [plan.index[p].positions for p in params]
        return [
            list(params),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            dense,
            positions,
            [*params, *dense],
        ]

    def _step_dense(self, group: dict[str, Any], params: list[Tensor]) -> None:
        live: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        beta1, beta2 = group["betas"]
        with torch.set_grad_enabled(group["differentiable"]):
            has_complex = self._init_group(
                {**group, "params": params}, live, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
            )
            adam(
                live,
                grads,
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs,
                steps,
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
                decoupled_weight_decay=True,
            )
