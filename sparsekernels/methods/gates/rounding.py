"""Sizes that products like: what is left of each dimension of a layer is to be a multiple of a few."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...structures import Attention, Mlp
from .parts import Vector

MULTIPLE = 8  # 16 bytes of bf16, which GPUs want rows to be aligned to; products on CPUs like it, too


@dataclass(frozen=True, eq=False)
class Dimension:
    """Rows or columns of layers that stand or fall together, or alone: units, of which a number is left.

    Attributes:
        gates ([gates of a unit, units]): a unit is there if all of its gates are open.
        spread: or if the first is, and any of the others.
        heads ([units]): which head a unit is of, where heads without units go as a whole.
        within: (another dimension, groups of its units, groups of these): a unit is there only if the other one has any
            of its group.
    """

    gates: Tensor
    spread: bool = False
    heads: Tensor | None = None
    within: tuple[Dimension, Tensor, Tensor] | None = None

    def alive(self, is_open: Tensor) -> Tensor:
        """[units], of a mask [gates] of those that are open."""
        found = is_open[self.gates]
        alive = found[0] & found[1:].any(0) if self.spread else found.all(0)
        return alive & self._possible(is_open)

    def _possible(self, is_open: Tensor) -> Tensor:
        if self.within is None:
            return is_open.new_ones(self.gates.shape[1])
        other, theirs, own = self.within
        return _met(theirs[other.alive(is_open)], own)

    def round(self, is_open: Tensor, order: Tensor) -> None:
        """Open gates, in place, until a multiple of units, or all, are there; the last in order first."""
        alive = self.alive(is_open)
        missing = -int(alive.sum()) % _multiple(len(alive))
        if missing == 0:
            return
        # Of a unit the gate counts that comes first in order.
        rank = order[self.gates].amin(0).argsort().argsort().double()
        if self.heads is not None:  # a head that is gone stays so as long as others lack something
            rank += len(rank) * _met(self.heads[alive], self.heads)
        rank[alive | ~self._possible(is_open)] = -1
        chosen = rank.topk(min(missing, len(rank))).indices
        is_open[self.gates[:, chosen[rank[chosen] >= 0]]] = True


class Dimensions:
    """All dimensions of the layers that have gates on single rows or columns; whole heads are of good sizes."""

    def __init__(self, vectors: Iterable[Vector], attentions: Iterable[Attention], mlps: Iterable[Mlp]) -> None:
        self.all: list[Dimension] = []
        of = {(v.layer, v.side): torch.arange(v.start, v.start + v.count) for v in vectors if v.group == 1}
        single = {key: torch.ones(len(gates), dtype=torch.bool) for key, gates in of.items()}

        def take(layer: str, side: str, places: slice | Tensor = slice(None)) -> Tensor:
            single[layer, side][places] = False
            return of[layer, side][places]

        for mlp in mlps:
            rows = [take(part.module, "rows", part.places) for part in mlp.inputs if (part.module, "rows") in of]
            columns = [take(mlp.output, "columns")] if (mlp.output, "columns") in of else []
            if rows or columns:
                self.all.append(Dimension(torch.stack(rows + columns)))
        for a in attentions:
            if (a.value.module, "rows") in of:
                query, key, value = (take(part.module, "rows", part.places) for part in (a.query, a.key, a.value))
                self._attention(a, query, key, value, take(a.output, "columns"))
        self.all += [Dimension(gates[single[key]][None]) for key, gates in of.items() if single[key].any()]

    def _attention(self, a: Attention, query: Tensor, key: Tensor, value: Tensor, columns: Tensor) -> None:
        head = torch.arange(a.groups).repeat_interleave(a.kv_rows)
        by_query = columns.view(a.groups, -1, a.kv_rows)
        values = Dimension(torch.stack([value, *by_query.transpose(0, 1).flatten(1)]), spread=True, heads=head)
        self.all.append(values)
        if by_query.shape[1] > 1:
            row = torch.arange(len(value)).view(a.groups, 1, -1).expand_as(by_query).flatten()
            pairs = torch.stack([columns, value[row]])
            self.all.append(Dimension(pairs, within=(values, torch.arange(len(value)), row)))
        elif not a.rotary:
            self.all.append(Dimension(torch.stack([query, key]), within=(values, head, head)))
            return
        of_queries = torch.arange(a.groups).repeat_interleave(a.query_rows)
        self.all.append(Dimension(query[None], within=(values, head, of_queries)))
        self.all.append(Dimension(key[None], within=(values, head, head)))

    def rounded(self, is_open: Tensor, order: Tensor) -> Tensor:
        """The mask [gates] with so many more open that each dimension has a multiple, or all, of its units."""
        stays = is_open.clone()
        for dimension in self.all:
            dimension.round(stays, order)
        return stays


def _met(groups: Tensor, own: Tensor) -> Tensor:
    """Which of `own` are among the groups; numbers of a few."""
    found = torch.zeros(int(own.max()) + 1, dtype=torch.bool)
    found[groups] = True
    return found[own]


def _multiple(width: int) -> int:
    """A power of two; smaller where it were more than a sixteenth of all."""
    return min(MULTIPLE, 1 << max(0, (width // 16).bit_length() - 1))
