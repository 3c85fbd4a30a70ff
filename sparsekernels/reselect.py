"""Change what a sparsified model trains. All is worked out, and refused if need be, before anything changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .carry import Carry, Part, joined
from .ops import scatter_
from .optim.regroup import Exchange, Regroup
from .selection import Index, Selection
from .slot import CompactParameter, Holders, Slot, compact_copy
from .sparsify import holders_of

if TYPE_CHECKING:
    from .sparsify import SparseModel


@dataclass(frozen=True, eq=False)
class Left:
    """Positions of a weight that were trained, are not any more, and stay as they are; and what was there before."""

    owner: nn.Module
    name: str
    index: Index
    originals: Tensor

    @property
    def weight(self) -> nn.Parameter:
        weight = self.owner._parameters[self.name]
        assert weight is not None
        return weight

    @property
    def part(self) -> Part:
        """Positions and originals where the weight is now."""
        return self.index.to(self.weight.device), self.originals.to(self.weight.device)

    def restore_(self) -> None:
        index, originals = self.part
        scatter_(self.weight.detach(), index, originals)


@dataclass(eq=False)
class _Turn:
    """One tensor: what it has, what it will have, and what it loses."""

    name: str
    slot: Slot | None  # before
    index: Index | None  # afterwards, with values and originals; None if it is not trained any more
    values: nn.Parameter | None
    originals: Tensor | None
    dropped: Part | None  # positions that leave, and their originals
    left: Part | None  # what stays behind from earlier calls

    @property
    def changed(self) -> bool:
        return self.slot is None or self.index is None or self.values is not self.slot.values


@torch.no_grad()
def reselect(tuned: SparseModel, selection: Selection, optimizer: torch.optim.Optimizer | None, restore: bool) -> None:
    """See `SparseModel.reselect`."""
    if torch.is_inference_mode_enabled():
        raise ValueError("reselect makes Parameters to train; call it outside torch.inference_mode()")
    weights = selection.check(tuned.model)
    holders = holders_of(tuned.model, weights, tuned.slots.values())
    slots = {slot.weight: slot for slot in tuned.slots.values()}
    left = {entry.weight: (name, entry) for name, entry in tuned.left.items()}
    turns = [
        _turn(name, weight, slots.get(weight), selection[name].to(weight.device), left.get(weight))
        for name, weight in weights.items()
    ]
    chosen = set(weights.values())
    turns += [
        _turn(name, slot.weight, slot, None, left.get(slot.weight))
        for name, slot in tuned.slots.items()
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
    # From here on nothing is refused any more.
    tuned.sync_()
    if regroup is not None:
        regroup.commit()
    kept = {name: entry for weight, (name, entry) in left.items() if weight not in chosen and weight not in slots}
    tuned.slots = {}
    for turn in turns:
        _commit(tuned, turn, holders, restore, kept)
    tuned.leave(kept)
    assert tuned._found is not None
    tuned._found.watch()
    tuned._found.replicas.compared = False  # in every process, also where nothing changed


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
        carry = Carry(behind[0], index)
        carry.onto(originals, behind[1])
        behind = carry.dropped(behind[1])
    if slot is not None:
        carry = Carry(slot.index, index)
        carry.onto(originals, slot.originals)
        carry.onto(values.data, slot.values.detach())
        values.requires_grad_(slot.values.requires_grad)
        dropped = carry.dropped(slot.originals)
    return _Turn(name, slot, index, values, originals, dropped, behind)


def _commit(tuned: SparseModel, turn: _Turn, holders: dict[str, Holders], restore: bool, kept: dict[str, Left]) -> None:
    found, slot, left = tuned._found, turn.slot, turn.left
    assert found is not None
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
        tuned.slots[turn.name] = slot
    if left is not None and len(left[0]):
        kept[turn.name] = Left(slot.owner, slot.name, *left)
