"""Positions that are no longer trained but keep their values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..index import Index
from ..ops import scatter_
from .remap import IndexedValues


@dataclass(frozen=True, eq=False)
class Left:
    """Positions of a weight that are no longer trained but keep their values; with the original weights."""

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
    def part(self) -> IndexedValues:
        """Positions and originals, on the device of the weight."""
        return self.index.to(self.weight.device), self.originals.to(self.weight.device)

    def restore_(self) -> None:
        index, originals = self.part
        scatter_(self.weight.detach(), index, originals)
