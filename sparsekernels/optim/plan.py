"""What the parameters of a group are, and the state they start with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..selection import Index
from ..sparsify import SLOT, Slot

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Plan:
    """The parameters of one group by kind, and the tensor lists of a step, kept while the group stays as it is."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.params = params = list(group["params"])
        self.ids = list(map(id, params))
        self.indices = group.get("indices")
        self.amsgrad = group["amsgrad"]
        self.index: dict[Tensor, Index] = dict(zip(params, group.get("indices") or (), strict=False))
        self.slots: dict[Tensor, Slot] = {p: p.__dict__[SLOT] for p in params if SLOT in p.__dict__}
        self.compact = list(self.slots)
        self.gathered = list(self.index)
        self.dense = [p for p in params if p not in self.slots and p not in self.index]
        self.lists: dict[str, list[list[Tensor]]] = {}

    def holds(self, group: dict[str, Any]) -> bool:
        """Whether it still describes the group: its parameters, their indices, and models that were not given back."""
        if self.indices is not group.get("indices") or self.amsgrad != group["amsgrad"]:
            return False
        if self.ids != list(map(id, group["params"])):
            return False
        for p in self.compact:  # noqa: SIM110 - a generator costs more than it looks for
            if SLOT not in p.__dict__:
                return False
        return True


def state_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def fresh_state(param: Tensor, shape: torch.Size, amsgrad: bool, capturable: bool) -> dict[str, Tensor]:
    names = MOMENTS if amsgrad else MOMENTS[:2]
    state = {name: torch.zeros(shape, dtype=state_dtype(param), device=param.device) for name in names}
    return {"step": torch.zeros((), device=param.device if capturable else "cpu", dtype=torch.float32), **state}


def checked_indices(group: dict[str, Any]) -> dict[str, Any]:
    """The group's params and indices as lists that fit each other."""
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    indices = [group["indices"]] if isinstance(group["indices"], Index) else list(group["indices"])
    if len(params) != len(indices):
        raise ValueError(f"indices must have one Index for each parameter, got {len(indices)} for {len(params)}")
    for i, (entry, index) in enumerate(zip(params, indices, strict=True)):
        if not isinstance(index, Index):
            raise TypeError(f"indices[{i}] must be an Index, got {type(index).__name__}")
        p = entry[1] if isinstance(entry, tuple) else entry
        if SLOT in p.__dict__:
            raise ValueError(
                f"params[{i}] is a compact Parameter of sparsify, which knows its positions; leave out indices"
            )
        if index.shape != p.shape:
            raise ValueError(f"indices[{i}] was made for shape {list(index.shape)}, its parameter has {list(p.shape)}")
        if not p.is_floating_point() or not p.is_contiguous():
            raise ValueError(f"params[{i}] must be floating point and contiguous to be stepped at indices")
        indices[i] = index.to(p.device)
    return {"params": params, "indices": indices}
