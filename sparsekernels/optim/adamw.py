"""AdamW that updates selected weights only; a drop-in for torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..selection import Selection
from ..training import sharding
from ..training.regroup import reselect_indices
from ..training.train_only import STEP_HOOKS
from . import checkpoint, options
from .amp import GIVEN, NOTHING, Scaling, check_capture, scaling, takes_scaling
from .batch import Ready, prepared
from .dense import check_dense, dense_lists, step_dense, step_sparse
from .group import GroupPlan, checked_indices
from .interrupts import hold_interrupts, release_interrupts
from .sharded import check_sharded, step_sharded
from .state import placed_step


class SparseAdamW(torch.optim.AdamW):
    """AdamW that updates selected weights only: a drop-in for `torch.optim.AdamW` and `torch.optim.SparseAdam`.

    There are three kinds of parameters, recognised by what is passed:

    - compact: Parameters from `train_only`. Moments, decay and the write into the dense weight happen in one pass over
      the selected positions of all tensors.
    - indexed: dense Parameters of a group that has `indices`, one `Index` for each parameter, as made by
      `Selection.param_groups(model)`. `.grad` is dense, but there is state for the selected positions only, and nothing
      else is read or written: unselected weights keep their bits, under weight decay too.
    - dense: any other Parameter. With a dense gradient, exactly `torch.optim.AdamW`. With a sparse (COO) gradient, as
      from `nn.Embedding(sparse=True)`, the rows it lists are stepped in one pass, duplicates summed in their order:
      exactly `torch.optim.SparseAdam`, plus decay of those rows (weight_decay=0 for none); eps is added to the root of
      v before bias correction, as in SparseAdam. With several sparse dimensions, as from `grad.to_sparse()`, a row is
      what one entry of the gradient's indices addresses, down to a single element.

    The rule, defaults, arguments, errors, hooks and `state_dict` are those of `torch.optim.AdamW`. In step t, with the
    gradient g (negated by `maximize`), for each element that is trained:

        theta -= lr * weight_decay * theta
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        v = max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq) if amsgrad else exp_avg_sq
        theta -= lr * (exp_avg / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    Examples:

        >>> model = torch.nn.Linear(4, 3)
        >>> tuned = sk.train_only(model, sk.Selection.random(model, density=0.5))
        >>> optimizer = sk.SparseAdamW(tuned.parameters(), lr=1e-2)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()  # half of the weights moved, the others kept their bits

    Args:
        params: Parameters, (name, Parameter) pairs or groups of them; a group may have `indices`, one `Index` for each
            Parameter, of its shape. Indexed Parameters are floating point and contiguous, of any shape, including empty
            ones; complex Parameters are dense ones.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in `torch.optim.AdamW`. For compact and indexed parameters a
            tensor lr stays on its device, in fp32, if that is a GPU or with capturable; a tensor beta is read on the
            host.
        foreach, fused: choose the implementation for dense parameters; the others are always fused.
        capturable: state["step"] is on the device of the parameter (with fused=True, too), and step() does not read it
            on the host, so a CUDA graph can capture it.
        differentiable: dense gradients of dense parameters only.
        sparse_state: for sparse gradients, "seen" keeps state for the rows that ever had one (and 4 B for each row of
            the table, not saved), "all" for every row. Gradients may change between sparse and dense during a run, or
            change their number of sparse dimensions, with "all" only.
        sparse_decay: for sparse gradients, "touched" decays a row when it has a gradient; "catch_up" then also applies
            the decay of all steps that the row missed, at the rates of those steps. A row never touched again is not
            caught up.
        sparse_bias_correction: for sparse gradients, "global" counts the steps of the table, as SparseAdam does, "row"
            those of each row.
        state_dtype: dtype of the moments of compact and indexed parameters and of sparse gradients: None or
            torch.float32 (fp64 for fp64 weights), or torch.bfloat16, half the size; arithmetic is in fp32 either way.
            Rounded to nearest, exp_avg_sq in bf16 stops changing near its limit: use stochastic_rounding with it.
        stochastic_rounding: round bf16 and fp16 moments and weights stochastically, so that small updates are not lost.
            Compact Parameters have an fp32 master and need it for bf16 moments only.
        seed: seed of the random bits, which also depend on the step, the position and the index of the parameter: a run
            can be replayed and resumed.

    State of compact and indexed parameters: `step` as in AdamW; `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`) of the
    size of the selection, in `state_dtype` whatever the dtype of the weight. For sparse gradients the same, of the size
    of the rows seen, and `rows` [N], their numbers.

    Numerics: steps of compact and indexed parameters are deterministic: an element's new value depends on its own state
    alone, so the same steps give the same bits on one device, for any number of threads and any other parameters. An
    indexed or dense half-precision weight is rounded once a step and loses updates below its resolution, unless
    stochastic_rounding is on; a compact one has an fp32 master and does not. `.grad` is never written.

    Under `torch.amp.GradScaler`, compact and indexed parameters pass scale and found_inf to their kernel without a
    sync, if their step is counted on their device; `.grad` stays scaled. If any parameter cannot (a dense one with a
    sparse gradient, or without fused=True), GradScaler unscales every `.grad` and reads found_inf on the host, as it
    does for torch's optimizers.

    A step interrupted by Ctrl-C (SIGINT) leaves each parameter group either fully stepped or untouched: the native call
    of a group cannot be interrupted, and everything else finishes before KeyboardInterrupt is raised. Inside
    `torch.compile` a step is one graph break and runs uncompiled, hooks included; `fullgraph=True` fails.

    Raises:
        ValueError: as `torch.optim.AdamW`; a gradient, option or state that does not fit its parameter (the message
            names it), before any parameter is stepped; indices that do not fit their parameters; differentiable with
            compact or indexed parameters; a compact or indexed Parameter whose shape, strides, dtype or device changed
            since it was passed; a state_dict made for a selection of another size, or for other indices.
        TypeError: indices that are not an `Index`.

    Source: Loshchilov and Hutter, arXiv 1711.05101, as torch.optim.AdamW computes it; restricting it to positions is
        ours.
    """

    writes_weights = True  # steps write the dense weights too, so the hook on steps has nothing to do

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
        sparse_state: Literal["seen", "all"] = "seen",
        sparse_decay: Literal["touched", "catch_up"] = "touched",
        sparse_bias_correction: Literal["global", "row"] = "global",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self._plans: dict[int, GroupPlan] = {}
        self._own_defaults = {
            "sparse_state": sparse_state,
            "sparse_decay": sparse_decay,
            "sparse_bias_correction": sparse_bias_correction,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        options.check(self._own_defaults)
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

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return takes_scaling(self)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Nothing: torch sets it for fused=True."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        self._own_defaults = {name: self.defaults.get(name, default) for name, default in options.DEFAULTS.items()}
        for group in self.param_groups:  # a state_dict of torch.optim.AdamW lacks them
            for name, default in self._own_defaults.items():
                group.setdefault(name, default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the group may have `indices`."""
        if param_group.get("indices") is not None:
            param_group = {**param_group, **checked_indices(param_group)}
            if param_group.get("differentiable", self.defaults["differentiable"]):
                raise ValueError("differentiable=True is not possible for parameters with indices")
        self.defaults.update(self._own_defaults)
        options.check(param_group)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; adds the positions, and fp32 masters of half-precision weights."""
        return checkpoint.packed(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; raises, and changes nothing, for another selection's state.

        fp32 masters in the state become the compact values, and are written into the weights.
        """
        checkpoint.load(self, state_dict)

    def reselect(self, selection: Selection, model: nn.Module) -> None:
        """Step `selection` from now on, instead of the indices that parameters of `model` have in this optimizer.

        The counterpart of `SparseModel.reselect` for indexed parameters; for compact ones call that, with this
        optimizer. Positions kept keep their moments and per-position step counts, others start without; no weight
        changes. A new parameter joins the first group with indices of parameters of the model (or else the first with
        indices); the state of one that leaves is dropped. Parameters without indices are not touched.

        Args:
            selection: what to step, by parameter name.
            model: the model whose parameters these are.

        Raises:
            ValueError: names or shapes that do not fit the model, a parameter in a group without indices, a model under
                train_only, no group with indices to join. Nothing has changed then.

        Examples:
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = sk.SparseAdamW(sk.Selection.random(model, density=0.5).param_groups(model))
            >>> optimizer.reselect(sk.Selection.random(model, density=0.5, seed=1), model)
        """
        reselect_indices(self, selection, model)

    def remapped_step(self, step_counts: Tensor, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """state["step"] for a Parameter with these step counts; called by `SparseModel.reselect`.

        Args:
            step_counts ([], or [K] with one entry per position; any dtype): not changed.
            p: a Parameter of `group`.
            group: its parameter group.

        Returns:
            fp32: 0-d, on the device where torch.optim.AdamW has it, if all are the same; else [K], on the device of
                `p`.
        """
        return placed_step(step_counts, p, group)

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
            or not _global_optimizer_post_hooks.keys() <= STEP_HOOKS
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        ):
            return self._hooked_step() if closure is None else self._hooked_step(closure)  # hooks see the arguments
        return self._plain_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # tells torch that step() calls hooks by itself

    def _plain_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if torch.cuda.is_initialized():
            check_capture(self)
        scale = NOTHING if GIVEN.isdisjoint(self.__dict__) else scaling(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready: list[Ready] = []
        others: list[tuple[dict[str, Any], GroupPlan]] = []
        first = 0
        for number, group in enumerate(self.param_groups):
            plan = self._plans.get(number)
            if plan is None or not plan.holds(group, first):
                sharding.link_parameters(self)
                plan = self._plans[number] = GroupPlan(group, first)
            first += len(plan.params)
            for kind in plan.kinds:
                found = prepared(kind, group, plan, scale, self.state)
                if found is not None:
                    ready.append(found)
            if plan.dense or plan.sharded:
                check_dense(group, plan, self.state)
                if plan.sharded:
                    check_sharded(group, plan, self.state)
                others.append((group, plan))
        # torch's modes, such as that of set_default_device, run Python between the calls of a step.
        modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
        if len(ready) == 1 and not others and not modes and ready[0][0].native:
            ready[0][0].step(ready[0], self.state)  # the op checks everything before it changes anything
        else:
            self._step_several(ready, others, scale, modes > 0)
        return loss

    def _step_several(
        self, ready: list[Ready], others: list[tuple[dict[str, Any], GroupPlan]], scale: Scaling, modes: bool
    ) -> None:
        native = all(each[0].native for each in ready)
        held = hold_interrupts() if others or modes or not native else None
        try:
            for each in ready if others or not native else ready[1:]:
                each[0].check(each, self.state)
            lists = [dense_lists(self, group, plan) for group, plan in others]
            for each in ready:
                each[0].step(each, self.state)
            for (group, plan), dense in zip(others, lists, strict=True):
                step_sparse(group, plan, self.state)
                step_dense(group, *dense, scale)
                if plan.sharded:
                    step_sharded(group, plan, self.state)
            sharded = [plan.slots[p] for _, plan in others for p in plan.sharded]
            if sharded:
                sharding.write_(sharded)
        finally:
            release_interrupts(held)

    # A few native calls, and hooks. torch.compiler.disable would import torch._dynamo now, which takes seconds.
    _uncompiled_step = _disable_dynamo(step)
    _hooked_step = torch.optim.Optimizer.profile_hook_step(_plain_step)
