"""The compact values of one selected tensor, and where they belong."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .ops import gather, scatter_
from .selection import Index

VALUES, POSITIONS, ORIGINALS = "_values", "_positions", "_originals"
SLOT = "_sparse_slot"

Holders = list[tuple[nn.Module, str]]


class CompactParameter(nn.Parameter):
    """The values of a Slot. Saved as a plain Parameter; the copy of its slot finds it again, and calls it this."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())


def compact_copy(weight: Tensor, index: Index) -> tuple[CompactParameter, Tensor]:
    """Values to train, fp32 (fp64 for fp64), and the originals in the dtype of the weight."""
    originals = gather(weight.detach(), index)
    wide = torch.promote_types(originals.dtype, torch.float32)
    return CompactParameter(originals.to(wide, copy=True)), originals


class Slot:
    """One selected tensor: finds its weight, values, positions and originals on the module that owns them.

    Tied weights share one slot: `holders` are all modules that hold the weight, the first of them owns the values.
    `label` is the name that it was selected by. `written` is the version of the values that the weight holds.
    """

    def __init__(self, label: str, holders: Holders, index: Index) -> None:
        self.label, self.holders = label, holders
        self.owner, self.name = holders[0]
        self.shape, self.rows = index.shape, index.rows
        self.written = -1

    @property
    def weight(self) -> nn.Parameter:
        weight = self.owner._parameters[self.name]
        assert weight is not None
        return weight

    @property
    def values(self) -> nn.Parameter:
        values = self.owner._parameters[self.name + VALUES]
        assert values is not None
        return values

    @property
    def index(self) -> Index:
        positions = self.owner._buffers[self.name + POSITIONS]
        assert positions is not None
        return Index.trusted(positions, self.shape, self.rows)

    @property
    def originals(self) -> Tensor:
        originals = self.owner._buffers[self.name + ORIGINALS]
        assert originals is not None
        return originals

    def register(self, index: Index, values: CompactParameter, originals: Tensor) -> None:
        """Put values, positions and originals on the owner, in place of those that are there."""
        before = self.owner._parameters.get(self.name + VALUES)
        if before is not None:
            before.__dict__.pop(SLOT, None)  # whoever still steps it writes no weight any more
        self.rows = index.rows
        self.owner.register_parameter(self.name + VALUES, values)
        self.owner.register_buffer(self.name + POSITIONS, index.positions, persistent=False)
        self.owner.register_buffer(self.name + ORIGINALS, originals, persistent=False)
        self.link(values)
        self.written = values._version

    def link(self, values: nn.Parameter) -> None:
        """How SparseAdamW finds the weight. A plain Parameter would take the slot, and the model, along into files."""
        if type(values) is nn.Parameter:
            values.__class__ = CompactParameter
        values.__dict__[SLOT] = self

    def unregister(self) -> None:
        """Take them off again. An optimizer that outlives this finds nothing to write any more."""
        values = self.owner._parameters.pop(self.name + VALUES, None)
        if values is not None:
            values.__dict__.pop(SLOT, None)
        for suffix in (POSITIONS, ORIGINALS):
            self.owner._buffers.pop(self.name + suffix, None)
            self.owner._non_persistent_buffers_set.discard(self.name + suffix)

    def sync_(self) -> None:
        """Write the values into the weight, if they changed since the last time."""
        if torch.compiler.is_compiling():
            return  # SparseAdamW writes through by itself; a version number is no part of a graph
        values = self.values
        if SLOT not in values.__dict__:
            self.link(values)
        if values._version != self.written:
            self.write_(values)
            self.written = values._version

    def write_(self, values: Tensor) -> None:
        scatter_(self.weight.detach(), self.index, values.detach())

    def loaded(self, weight: Tensor) -> Tensor:
        """The values that go with a weight which is about to be loaded.

        A value that rounds to the loaded weight stays: it says more than the weight does, and may have come from the
        state of an optimizer a moment ago.
        """
        values = self.values.detach()
        found = gather(weight.detach().contiguous(), self.index.to(weight.device)).to(values)
        if self.weight.dtype == values.dtype:
            return found
        rounded = values.to(self.weight.dtype).to(values.dtype)
        same = (rounded == found) & (rounded.signbit() == found.signbit())
        return torch.where(same, values, found)

    def __reduce__(self) -> Any:
        # The values go first, so that the copy of a model knows its slots before anything is run. Their versions count
        # from their own beginning.
        return _linked, (self.owner._parameters.get(self.name + VALUES),), {**self.__dict__, "written": -1}


def _linked(values: nn.Parameter | None) -> Slot:
    slot = object.__new__(Slot)
    if values is not None:
        slot.link(values)
    return slot
