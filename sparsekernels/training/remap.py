"""From one Index of a tensor to another: what carries over to the positions that both have."""

from __future__ import annotations

import torch
from torch import Tensor

from ..index import Index

IndexedValues = tuple[Index, Tensor]  # positions of a tensor, and one compact value for each


class Remap:
    """Matches units if both have the same, else elements: entry `source` of old is entry `target` of new."""

    def __init__(self, old: Index, new: Index) -> None:
        self.old, self.new = old, new
        self.by_unit = old.same_units(new)
        self._old, self._new = _Entries(old, self.by_unit), _Entries(new, self.by_unit)
        have, want = self._old.positions, self._new.positions.to(self._old.positions.dtype)
        if len(have):
            place = torch.searchsorted(have, want).clamp_(max=len(have) - 1)
            self.target = (have[place] == want).nonzero().reshape(-1)
            self.source = place[self.target]
        else:
            self.target = self.source = torch.empty(0, dtype=torch.int64, device=have.device)

    def __len__(self) -> int:
        """Number of units or elements that are kept."""
        return len(self.target)

    def onto(self, fresh: Tensor, old: Tensor) -> Tensor:
        """Copy the kept positions' values from `old` into `fresh`, a compact tensor of new; changed in place."""
        self._new.write_(fresh, self.target, self._old.read(old)[self.source].to(fresh.dtype))
        return fresh

    def dropped(self, old: Tensor) -> IndexedValues:
        """The positions that new lacks, and their values in `old`."""
        gone = torch.ones(len(self._old.positions), dtype=torch.bool, device=self.source.device)
        gone[self.source] = False
        index = self._old.index.with_positions(self._old.positions[gone])
        return index, index.by_unit(self._old.read(old)[gone]).contiguous()

    def step_counts(self, step: Tensor, name: str) -> Tensor:
        """The step count of each position of new: that of old if kept, else 0.

        Raises:
            ValueError: a row, column or block of new has several step counts.
        """
        per_old = step.to(self.source.device, torch.float32).expand(len(self.old))
        old = per_old if self.by_unit else self._old.read(_spread(per_old, self.old))
        step_counts = torch.zeros(len(self._new.positions), device=self.source.device)
        step_counts[self.target] = old[self.source]
        if self.by_unit or self.new.granularity == "element":
            return step_counts
        table = torch.full(self.new.compact_shape, -1.0, device=step_counts.device)  # -1 where a block is cut off
        self._new.write_(table, torch.arange(len(step_counts), device=table.device), step_counts)
        table = self.new.by_unit(table).reshape(len(self.new), self.new.elements_per_position)
        mixed = ((table != table[:, :1]) & (table >= 0)).any(1)
        if bool(mixed.any()):
            at = int(self.new.positions[mixed][0])
            raise ValueError(
                f"{self.new.granularity} {at} of {name!r} is new in part, but it has one step count; pass "
                "index.to_elements()"
            )
        return table[:, 0].clone()


class _Entries:
    """The positions of an Index, and the entry of a compact tensor for each: units, or elements."""

    def __init__(self, index: Index, by_unit: bool) -> None:
        self.of, self.by_unit = index, by_unit
        self.index: Index = index
        self.places: Tensor | None = None
        if not by_unit:
            self.index, self.places = index.entries()
        self.positions = self.index.positions

    def read(self, compact: Tensor) -> Tensor:
        """One entry for each position, along the first dimension."""
        return self.of.by_unit(compact) if self.places is None else compact.reshape(-1)[self.places]

    def write_(self, compact: Tensor, at: Tensor, entries: Tensor) -> None:
        """Write the entries of some positions."""
        if self.places is None:
            self.of.by_unit(compact)[at] = entries
        else:
            compact.view(-1)[self.places[at]] = entries


def _spread(per_position: Tensor, index: Index) -> Tensor:
    """A number for each position as a compact tensor."""
    shape = index.by_unit(torch.empty(index.compact_shape, device="meta")).shape
    return index.by_unit(per_position.view(-1, *(1,) * (len(shape) - 1)).expand(shape))


def joined(a: IndexedValues, b: IndexedValues) -> IndexedValues:
    """Both parts of one tensor in one; they share no position."""
    if not len(a[0]) or not len(b[0]):
        return a if len(a[0]) else b
    by_unit = a[0].same_units(b[0])
    entries = [_Entries(index, by_unit) for index, _ in (a, b)]
    positions, order = torch.cat([each.positions for each in entries]).sort()
    index = entries[0].index.with_positions(positions)
    values = torch.cat([each.read(part[1]) for each, part in zip(entries, (a, b), strict=True)])[order]
    return index, index.by_unit(values).contiguous()
