"""From one Index of a tensor to another: what carries over to the positions that both have."""

from __future__ import annotations

import torch
from torch import Tensor

from ..index import Index

IndexedValues = tuple[Index, Tensor]  # positions of a tensor, and one compact value for each


class Remap:
    """Matches rows if both are rows, else elements: entry `source` of old is entry `target` of new."""

    def __init__(self, old: Index, new: Index) -> None:
        self.old, self.new = old, new
        self.by_row = old.rows and new.rows
        self._old, self._new = (old, new) if self.by_row else (old.to_elements(), new.to_elements())
        have, want = self._old.positions, self._new.positions.to(self._old.positions.dtype)
        if len(have):
            place = torch.searchsorted(have, want).clamp_(max=len(have) - 1)
            self.target = (have[place] == want).nonzero().reshape(-1)
            self.source = place[self.target]
        else:
            self.target = self.source = torch.empty(0, dtype=torch.int64, device=have.device)

    def __len__(self) -> int:
        """Number of positions that are kept."""
        return len(self.target)

    def onto(self, fresh: Tensor, old: Tensor) -> Tensor:
        """Copy the kept positions' values from `old` into `fresh`, a compact tensor of new; changed in place."""
        units = fresh if self.by_row else fresh.view(-1)
        units[self.target] = (old if self.by_row else old.reshape(-1))[self.source].to(fresh.dtype)
        return fresh

    def dropped(self, old: Tensor) -> IndexedValues:
        """The positions that new lacks, and their values in `old`."""
        gone = torch.ones(len(self._old), dtype=torch.bool, device=self.source.device)
        gone[self.source] = False
        index = Index.unchecked(self._old.positions[gone], self.old.shape, self.by_row)
        return index, (old if self.by_row else old.reshape(-1))[gone]

    def step_counts(self, step: Tensor, name: str) -> Tensor:
        """The step count of each position of new: that of old if kept, else 0.

        Raises:
            ValueError: a row of new has several step counts.
        """
        old = step.to(self.source.device, torch.float32).expand(len(self.old))
        if self.old.rows and not self.by_row:
            old = old.repeat_interleave(self.old.elements_per_position)
        step_counts = torch.zeros(len(self._new), device=self.source.device)
        step_counts[self.target] = old[self.source]
        if self.by_row or not self.new.rows:
            return step_counts
        table = step_counts.view(len(self.new), self.new.elements_per_position)
        mixed = (table != table[:, :1]).any(1)
        if bool(mixed.any()):
            row = int(self.new.positions[mixed][0])
            raise ValueError(
                f"row {row} of {name!r} is new in part, but a row has one step count; pass index.to_elements()"
            )
        return table[:, 0].clone()


def joined(a: IndexedValues, b: IndexedValues) -> IndexedValues:
    """Both parts of one tensor in one; they share no position."""
    if not len(a[0]) or not len(b[0]):
        return a if len(a[0]) else b
    rows = a[0].rows and b[0].rows
    indices = [part[0] if rows else part[0].to_elements() for part in (a, b)]
    tensors = [part[1] if rows else part[1].reshape(-1) for part in (a, b)]
    positions, order = torch.cat([index.positions for index in indices]).sort()
    return Index.unchecked(positions, a[0].shape, rows), torch.cat(tensors)[order]
