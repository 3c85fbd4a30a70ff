"""Change the selection of a model under train_only. Everything is computed and checked before anything changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..index import Index
from ..ops import scatter_
from ..selection import Selection
from .attach import Installation, holders_of
from .compact import CompactParameter, compact_copy
from .left import Left
from .regroup import Exchange, Regroup
from .remap import IndexedValues, Remap, joined
from .slot import Holders, Slot


@dataclass(eq=False)
class _Turn:
    """One tensor: what it has, what it will have, and what it loses."""

    name: str
    slot: Slot | None  # before
    index: Index | None  # afterwards, with values and originals; None if it is no longer trained
    values: nn.Parameter | None
    originals: Tensor | None
    dropped: IndexedValues | None  # positions that leave, and their originals
    left: IndexedValues | None  # positions left by earlier calls

    @property
    def changed(self) -> bool:
        return self.slot is None or self.index is None or self.values is not self.slot.values


@torch.no_grad()
def reselect(
    found: Installation,
    slots: dict[str, Slot],
    left: dict[str, Left],
    selection: Selection,
    optimizer: torch.optim.Optimizer | None,
    restore: bool,
) -> tuple[dict[str, Slot], dict[str, Left]]:
    """See `SparseModel.reselect`. Returns the new slots and the new entries of `left`."""
    if torch.is_inference_mode_enabled():
        raise ValueError("reselect makes Parameters to train; call it outside torch.inference_mode()")
    weights = selection.check(found.model)
    holders = holders_of(found.model, weights, slots.values())
    before = {slot.weight: slot for slot in slots.values()}
    behind = {entry.weight: (name, entry) for name, entry in left.items()}
    turns = [
        _turn(name, weight, before.get(weight), selection[name].to(weight.device), behind.get(weight))
        for name, weight in weights.items()
    ]
    chosen = set(weights.values())
    turns += [
        _turn(name, slot.weight, slot, None, behind.get(slot.weight))
        for name, slot in slots.items()
        if slot.weight not in chosen
    ]
    regroup = None
    if optimizer is not None:
        regroup = Regroup(
            optimizer,
            [
                Exchange(
                    turn.name,
                    turn.slot.values if turn.slot else None,
                    turn.values,
                    turn.slot.index if turn.slot else None,
                    turn.index,
                )
                for turn in turns
            ],
            indexed=False,
        )
    # From here on nothing raises.
    for slot in slots.values():
        slot.refresh_()
    if regroup is not None:
        regroup.commit()
    kept = {name: entry for weight, (name, entry) in behind.items() if weight not in chosen and weight not in before}
    after: dict[str, Slot] = {}
    for turn in turns:
        _commit(found, turn, holders, restore, after, kept)
    found.watch()
    found.replicas.compared = False  # in every process, also where nothing changed
    return after, kept


def _turn(
    name: str, weight: nn.Parameter, slot: Slot | None, index: Index | None, left: tuple[str, Left] | None
) -> _Turn:
    behind = left[1].part if left else None
    if index is None:
        assert slot is not None
        return _Turn(name, slot, None, None, None, (slot.index, slot.originals), behind)
    if slot is not None and slot.index == index:
        return _Turn(name, slot, index, slot.values, slot.originals, None, behind)
    values, originals = compact_copy(weight, index)
    dropped = None
    if behind is not None:
        remap = Remap(behind[0], index)
        remap.onto(originals, behind[1])
        behind = remap.dropped(behind[1])
    if slot is not None:
        remap = Remap(slot.index, index)
        remap.onto(originals, slot.originals)
        remap.onto(values.data, slot.values.detach())
        values.requires_grad_(slot.values.requires_grad)
        dropped = remap.dropped(slot.originals)
    return _Turn(name, slot, index, values, originals, dropped, behind)


def _commit(
    found: Installation,
    turn: _Turn,
    holders: dict[str, Holders],
    restore: bool,
    after: dict[str, Slot],
    kept: dict[str, Left],
) -> None:
    slot, left = turn.slot, turn.left
    if turn.dropped is not None and slot is not None:
        index, originals = turn.dropped
        if restore:
            scatter_(slot.weight.detach(), index, originals)
        else:
            left = joined(left, turn.dropped) if left is not None else turn.dropped
    if turn.index is None:
        assert slot is not None
        found.take(slot)
    else:
        if slot is None:
            slot = Slot(turn.name, holders[turn.name], found.replicas)
            assert isinstance(turn.values, CompactParameter)
            assert turn.originals is not None
            found.give(slot, turn.index, turn.values, turn.originals)
        elif turn.changed:
            assert isinstance(turn.values, CompactParameter)
            assert turn.originals is not None
            slot.register(turn.index, turn.values, turn.originals)
        slot.label = turn.name
        after[turn.name] = slot
    if left is not None and len(left[0]):
        kept[turn.name] = Left(slot.owner, slot.name, *left)
