"""The optimizer's parameter groups and state after a re-selection: computed first, then installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..index import Index
from ..selection import Selection
from .layers import trains_selection
from .remap import Remap


@dataclass(frozen=True, eq=False)
class Exchange:
    """One tensor: its Parameter in the optimizer and its Index, before and after; None where it is not in it."""

    name: str
    old: Tensor | None
    new: Tensor | None
    old_index: Index | None
    new_index: Index | None


class Regroup:
    """Parameter groups and state in which each Exchange's old Parameter is replaced by its new one.

    Args:
        exchanges: in the order of the new selection, followed by those that leave.
        indexed: whether they belong to groups with indices or to groups without.

    Raises:
        ValueError, and nothing has changed: see `SparseModel.reselect`.
    """

    def __init__(self, optimizer: Any, exchanges: list[Exchange], *, indexed: bool) -> None:
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.indexed = indexed
        self.exchanges = exchanges
        groups = optimizer.param_groups
        old = {x.old: x for x in exchanges if x.old is not None}
        seats = {p: number for number, group in enumerate(groups) for p in group["params"] if p in old}
        for p, x in old.items():
            if p not in seats:
                raise ValueError(
                    f"{x.name!r} is not among the parameters of the optimizer; pass the one that steps it, or none"
                )
        fitting = [n for n, group in enumerate(groups) if (group.get("indices") is not None) == indexed]
        home = min(seats.values(), default=fitting[0] if fitting else None)
        if home is None:
            raise ValueError(f"the optimizer has no parameter group {'with' if indexed else 'without'} indices to join")
        self.members = [
            _members(group, old, [x for x in exchanges if x.new is not None and _seat(x, seats, home) == number])
            for number, group in enumerate(groups)
        ]
        self.states: dict[Tensor, dict[str, Any]] = {}
        for x in exchanges:
            if x.old is not None and x.new is not None and (x.old is not x.new or x.old_index != x.new_index):
                self.states[x.new] = self._state(x, groups[seats[x.old]])

    def _state(self, x: Exchange, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the new Parameter; empty, so that the next step creates it, if no position is kept."""
        assert x.old is not None
        assert x.old_index is not None
        assert x.new_index is not None
        remap = Remap(x.old_index, x.new_index)
        state: dict[str, Any] = {}
        for key, value in self.optimizer.state.get(x.old, {}).items() if len(remap) else ():
            if key == "step" and hasattr(self.optimizer, "remapped_step"):
                state[key] = self.optimizer.remapped_step(remap.step_counts(value, x.name), x.old, group)
            elif not isinstance(value, Tensor) or not value.dim():
                state[key] = value
            elif value.shape == x.old_index.compact_shape:
                state[key] = remap.onto(value.new_zeros(x.new_index.compact_shape), value)
            else:
                raise ValueError(
                    f"{x.name!r}: {key!r} has shape {list(value.shape)} and cannot be divided by positions; make a new "
                    f"{type(self.optimizer).__name__} instead of passing this one"
                )
        return state

    def commit(self) -> None:
        state = self.optimizer.state
        for x in self.exchanges:
            if x.old is not None and (x.new is None or x.new in self.states):
                state.pop(x.old, None)
        for p, entries in self.states.items():
            if entries:
                state[p] = entries
        for group, members in zip(self.optimizer.param_groups, self.members, strict=True):
            group["params"][:] = [p for p, _, _ in members]
            if self.indexed and group.get("indices") is not None:
                group["indices"] = [index for _, index, _ in members]
            if "param_names" in group:
                group["param_names"] = [name for _, _, name in members]


Member = tuple[Tensor, Any, Any]


def _seat(x: Exchange, seats: Mapping[Tensor, int], home: int) -> int:
    return home if x.old is None else seats[x.old]


def _members(group: Mapping[str, Any], old: Mapping[Tensor, Exchange], ours: list[Exchange]) -> list[Member]:
    """Parameter, index and name of each: ours go where ours were, and those left over go to the end."""
    count = len(group["params"])
    indices, names = group.get("indices") or [None] * count, group.get("param_names") or [None] * count
    known = {p: name for p, name in zip(group["params"], names, strict=True) if p in old}
    queue = [(x.new, x.new_index, known.get(x.old, x.name)) for x in ours if x.new is not None]
    members: list[Member] = []
    for member in zip(group["params"], indices, names, strict=True):
        if member[0] not in old:
            members.append(member)
        elif queue:
            members.append(queue.pop(0))
    return members + queue


def reselect_indices(optimizer: torch.optim.Optimizer, selection: Selection, model: nn.Module) -> None:
    """See `SparseAdamW.reselect`."""
    if any(trains_selection(module) for module in model.modules()):
        raise ValueError(
            "the model trains a selection; call reselect of its SparseModel, and pass this optimizer there"
        )
    weights = selection.check(model)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    indexed: dict[Tensor, Index] = {}
    dense: set[Tensor] = set()
    for group in optimizer.param_groups:
        if group.get("indices") is None:
            dense.update(group["params"])
        else:
            indexed.update((p, i) for p, i in zip(group["params"], group["indices"], strict=True) if p in names)
    exchanges: dict[Tensor, Exchange] = {}
    for name, p in weights.items():
        if p in exchanges:
            raise ValueError(f"{name!r} and {exchanges[p].name!r} are one tied weight; select it under one name")
        if p in dense:
            raise ValueError(f"{name!r} is in a group without indices, where all of it is stepped; leave it out")
        if not p.is_floating_point() or not p.is_contiguous():
            raise ValueError(f"{name!r} must be floating point and contiguous to be stepped at indices")
        index = indexed.get(p)
        new = selection[name].to(p.device)
        exchanges[p] = Exchange(name, None if index is None else p, p, index, index if index == new else new)
    for gone, index in indexed.items():
        if gone not in exchanges:
            exchanges[gone] = Exchange(names[gone], gone, None, index, None)
    with torch.no_grad():
        Regroup(optimizer, list(exchanges.values()), indexed=True).commit()
