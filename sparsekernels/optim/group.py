"""The kinds of parameters in a group, and the checks they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.supported import is_dtensor, refuse_unsupported
from ..index import Index, dtype_for
from ..training.compact import SLOT
from ..training.slot import Slot
from .state import MOMENTS, SeenRows, compute_dtype, state_dtype


class GroupPlan:
    """The parameters of one group by kind, and the batches of their steps; valid while the group does not change."""

    def __init__(self, group: dict[str, Any], first: int) -> None:
        self.first = first  # number of parameters in the groups before: the random stream of our first one
        self.params = params = list(group["params"])
        self.ids = list(map(id, params))
        self.indices = group.get("indices")
        self.amsgrad = group["amsgrad"]
        self.index: dict[Tensor, Index] = dict(zip(params, group.get("indices") or (), strict=False))
        self.slots: dict[Tensor, Slot] = {p: p.__dict__[SLOT] for p in params if SLOT in p.__dict__}
        self.compact = [p for p in self.slots if not is_dtensor(p)]
        self.sharded = [p for p in self.slots if is_dtensor(p)]
        self.indexed = list(self.index)
        self.dense = [p for p in params if p not in self.slots and p not in self.index]
        self.kinds = [kind for kind in ("compact", "indexed") if getattr(self, kind)]
        self.batches: dict[str, Any] = {}  # kind -> Batch, kept by it between steps
        self._every: dict[Any, Tensor] = {}
        self.seen: dict[Tensor, SeenRows] = {}  # of parameters with sparse gradients

    def holds(self, group: dict[str, Any], first: int) -> bool:
        """Whether it still describes the group: same parameters and indices, and no model was given back."""
        if self.indices is not group.get("indices") or self.amsgrad != group["amsgrad"] or self.first != first:
            return False
        if self.ids != list(map(id, group["params"])):
            return False
        for p in self.slots:  # noqa: SIM110 - a generator is slower
            if SLOT not in p.__dict__:
                return False
        return True

    def rounding(self, kind: str, group: dict[str, Any]) -> tuple[int, ...]:
        """Seed and first random stream for parameters of a kind; empty if they round to nearest."""
        if not group["stochastic_rounding"]:
            return ()
        before = {"compact": 0, "indexed": len(self.compact), "sharded": len(self.params) - len(self.sharded)}
        return group["seed"], self.first + before[kind]

    def every(self, p: Tensor) -> Tensor:
        """All positions of a flat tensor, made once."""
        key = len(p), p.device
        if key not in self._every:
            self._every[key] = torch.arange(len(p), dtype=dtype_for(len(p)), device=p.device)
        return self._every[key]


def name_of(group: dict[str, Any], param: Tensor) -> str:
    """The name of a parameter in an error message: its own if the group was made of named parameters."""
    i = next(i for i, p in enumerate(group["params"]) if p is param)
    names = group.get("param_names")
    if not names and SLOT in param.__dict__:
        return repr(param.__dict__[SLOT].label)
    return repr(names[i]) if names else f"params[{i}] of shape {list(param.shape)}"


def check_unchanged(group: dict[str, Any], plan: GroupPlan, params: list[Tensor], state: Mapping[Tensor, Any]) -> None:
    """Raise ValueError for a parameter that changed since the optimizer got it, for example by `p.data = ...`."""
    for p in params:
        problem = _change(p, group, plan.slots.get(p), plan.index.get(p), state.get(p) or {})
        if problem is not None:
            raise ValueError(f"{name_of(group, p)} {problem}")


def _change(
    p: Tensor, group: dict[str, Any], slot: Slot | None, index: Index | None, state: Mapping[str, Tensor]
) -> str | None:
    if slot is not None:
        weight, index = slot.weight, slot.index
        if p.dtype != compute_dtype(weight):
            return f"became {p.dtype}, but must be in the compute dtype; change the model's dtype before train_only"
        if weight.shape != index.shape or not weight.is_contiguous() or weight.device != p.device:
            found = f"shape {list(weight.shape)} and strides {list(weight.stride())} on {weight.device}"
            return f"now has a weight of {found}; its values, on {p.device}, need {list(index.shape)}, contiguous"
    assert index is not None
    shape = index.shape if slot is None else index.compact_shape
    if p.shape != shape or not p.is_contiguous():
        found = f"shape {list(p.shape)} and strides {list(p.stride())}"
        return f"became a tensor of {found}; its indices were made for a contiguous one of shape {list(shape)}"
    if index.positions.device != p.device:
        return f"moved to {p.device}, its positions are on {index.positions.device}; make the optimizer after the move"
    for name in MOMENTS:
        moments = state.get(name)
        if moments is None:
            continue
        if moments.dtype != state_dtype(p, group) or moments.device != p.device:
            found = f"{p.dtype} on {p.device} after steps with state of {moments.dtype} on {moments.device}"
            return f"became {found}; save the state_dict before such a change, then make a new optimizer and load it"
        if moments.shape != index.compact_shape:
            return f"has {name} of shape {list(moments.shape)}; its positions need {list(index.compact_shape)}"
    return None


def misfit(p: Tensor, grad: Tensor) -> str:
    """The error message for a gradient that does not fit its parameter."""
    return (
        f"its gradient is {grad.dtype} of shape {list(grad.shape)} on {grad.device}, and it is {p.dtype} of shape "
        f"{list(p.shape)} on {p.device}; clear the gradient after such a change"
    )


def checked_indices(group: dict[str, Any]) -> dict[str, Any]:
    """The group's params and indices as lists that fit each other; torch refuses entries that are not Tensors."""
    if isinstance(group["params"], set):
        return {}
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    indices = [group["indices"]] if isinstance(group["indices"], Index) else list(group["indices"])
    if len(params) != len(indices):
        raise ValueError(f"indices must have one Index for each parameter, got {len(indices)} for {len(params)}")
    for i, (entry, index) in enumerate(zip(params, indices, strict=True)):
        if not isinstance(index, Index):
            raise TypeError(f"indices[{i}] must be an Index, got {type(index).__name__}")
        name, p = entry if isinstance(entry, tuple) else (None, entry)
        if not isinstance(p, Tensor):
            continue
        what = f"params[{i}]" if name is None else f"params[{i}] ({name!r})"
        if SLOT in p.__dict__:
            raise ValueError(
                f"{what} is a compact Parameter of train_only, which knows its positions; leave out indices"
            )
        refuse_unsupported(what, p)
        if index.shape != p.shape:
            raise ValueError(f"indices[{i}] was made for shape {list(index.shape)}, {what} has {list(p.shape)}")
        if not p.is_floating_point() or not p.is_contiguous():
            got = p.dtype if not p.is_floating_point() else f"strides {list(p.stride())}"
            raise ValueError(f"{what} must be floating point and contiguous to be stepped at indices, got {got}")
        indices[i] = index.to(p.device)
    return {"params": params, "indices": indices}
