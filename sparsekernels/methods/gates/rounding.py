"""Round what remains of each dimension of a layer to a multiple of 8, for efficient matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...structure.architectures import Attention, Mlp, OutputSlice
from .parts import Vector

MULTIPLE = 8  # 16 bytes of bf16, the alignment of rows that fast GEMMs need; helps on CPUs, too

Array = npt.NDArray[Any]  # not torch: a search rounds a dozen times, with a dozen calls per dimension


@dataclass(frozen=True, eq=False)
class Dimension:
    """Rows or columns of layers that are removed together, or alone: units, some of which remain.

    Attributes:
        gates ([gates of a unit, units]): a unit is alive if all of its gates are open.
        spread: instead, a unit is alive if its first gate is open, and any of the others.
        heads ([units]): the head of each unit, if heads without units are removed as a whole.
        within: (another dimension, groups of its units, groups of these): a unit is alive only if the other dimension
            has an alive unit of the same group.
    """

    gates: Array
    spread: bool = False
    heads: Array | None = None
    within: tuple[Dimension, Array, Array] | None = None

    def alive(self, is_open: Array) -> Array:
        """[units], for a mask [gates] of open gates."""
        found = is_open[self.gates]
        alive: Array = found[0] & found[1:].any(0) if self.spread else np.logical_and.reduce(found)
        return alive if self.within is None else np.logical_and(alive, self._possible(is_open))

    def _possible(self, is_open: Array) -> Array:
        if self.within is None:
            return np.ones(self.gates.shape[1], np.bool_)
        other, theirs, own = self.within
        return _met(theirs[other.alive(is_open)], own)

    def round(self, is_open: Array, rank: Array) -> None:
        """Open gates, in place, until a multiple of units, or all, are alive; those of largest rank [units] first."""
        alive = self.alive(is_open)
        missing = -int(np.count_nonzero(alive)) % _multiple(len(alive))
        if missing == 0:
            return
        candidates = ~alive & self._possible(is_open)
        turns = [candidates]
        if self.heads is not None:  # removed heads return only after the units of the others
            living = _met(self.heads[alive], self.heads)
            turns = [candidates & living, candidates & ~living]
        for some in turns:
            places = np.flatnonzero(some)
            chosen = places[np.argsort(-rank[places], kind="stable")[:missing]]
            is_open[self.gates[:, chosen]] = True
            missing -= len(chosen)


class Dimensions:
    """All dimensions of the layers with gates on single rows or columns; whole heads have suitable sizes already."""

    def __init__(self, vectors: Iterable[Vector], attentions: Iterable[Attention], mlps: Iterable[Mlp]) -> None:
        self.all: list[Dimension] = []
        of = {(v.layer, v.side): np.arange(v.start, v.start + v.count) for v in vectors if v.group == 1}
        single = {key: np.ones(len(gates), np.bool_) for key, gates in of.items()}

        def take(layer: str, side: str, part: OutputSlice | None = None) -> Array:
            places = slice(None) if part is None else part.places
            single[layer, side][places] = False
            return of[layer, side][places]

        for mlp in mlps:
            rows = [take(part.module, "rows", part) for part in mlp.inputs if (part.module, "rows") in of]
            columns = [take(mlp.output, "columns")] if (mlp.output, "columns") in of else []
            if rows or columns:
                self.all.append(Dimension(np.stack(rows + columns)))
        for a in attentions:
            if (a.value.module, "rows") in of:
                query, key, value = (take(part.module, "rows", part) for part in (a.query, a.key, a.value))
                self._attention(a, query, key, value, take(a.output, "columns"))
        self.all += [Dimension(gates[single[key]][None]) for key, gates in of.items() if single[key].any()]

    def _attention(self, a: Attention, query: Array, key: Array, value: Array, columns: Array) -> None:
        head = np.arange(a.groups).repeat(a.kv_rows)
        by_query = columns.reshape(a.groups, -1, a.kv_rows)
        values = Dimension(np.stack([value, *by_query.swapaxes(0, 1).reshape(-1, len(value))]), spread=True, heads=head)
        self.all.append(values)
        if by_query.shape[1] > 1:
            row = np.broadcast_to(np.arange(len(value)).reshape(a.groups, 1, -1), by_query.shape).flatten()
            pairs = np.stack([columns, value[row]])
            self.all.append(Dimension(pairs, within=(values, np.arange(len(value)), row)))
        elif not a.rotary:
            self.all.append(Dimension(np.stack([query, key]), within=(values, head, head)))
            return
        of_queries = np.arange(a.groups).repeat(a.query_rows)
        self.all.append(Dimension(query[None], within=(values, head, of_queries)))
        self.all.append(Dimension(key[None], within=(values, head, head)))

    def rounding(self, order: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that opens gates of a mask [gates] until each dimension keeps a multiple, or all, of its units.

        Gates that are last in `order` [gates] are opened; of a unit, the gate that is first in it counts.
        """
        ranks = [order.numpy()[dimension.gates].min(0) for dimension in self.all]

        def rounded(is_open: Tensor) -> Tensor:
            stays = is_open.numpy().copy()
            for dimension, rank in zip(self.all, ranks, strict=True):
                dimension.round(stays, rank)
            return torch.from_numpy(stays)

        return rounded


def _met(groups: Array, own: Array) -> Array:
    """Which of `own` are among the groups, which are small integers."""
    found = np.zeros(int(own.max()) + 1, np.bool_)
    found[groups] = True
    return found[own]


def _multiple(width: int) -> int:
    """A power of two up to 8; smaller if it were more than a sixteenth of the width."""
    return min(MULTIPLE, 1 << max(0, (width // 16).bit_length() - 1))
