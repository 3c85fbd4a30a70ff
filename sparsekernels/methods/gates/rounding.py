"""Sizes that products like: what is left of each dimension of a layer is to be a multiple of a few."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...structures import Attention, Mlp, Part
from .parts import Vector

MULTIPLE = 8  # 16 bytes of bf16, a line of vectors of fp32: a product of odd sizes takes up to a third longer


class Dimensions:
    """Which gates stand for the same row or column of what will be left, and how many of these there will be.

    A unit is a neuron, a dimension of a value, or a row or column by itself; it stays if all of its gates are open. Of
    heads, which are of a good size, there is no dimension; where several heads of queries share one of keys and values,
    rows and columns count as if each were by itself.

    Attributes:
        units: for each dimension [gates of a unit, units], which gates.
    """

    def __init__(self, vectors: Iterable[Vector], attentions: Iterable[Attention], mlps: Iterable[Mlp]) -> None:
        self.units: list[Tensor] = []
        of = {(v.layer, v.side): torch.arange(v.start, v.start + v.count) for v in vectors if v.group == 1}
        single = {key: torch.ones(len(gates), dtype=torch.bool) for key, gates in of.items()}

        def pair(*parts: Part, columns: str | None = None) -> None:
            keys = [(part.module, "rows", part.places) for part in parts]
            keys += [] if columns is None else [(columns, "columns", slice(None))]
            found = [(layer, side, places) for layer, side, places in keys if (layer, side) in of]
            if found:
                self.units.append(torch.stack([of[layer, side][places] for layer, side, places in found]))
            for layer, side, places in found:
                single[layer, side][places] = False

        for mlp in mlps:
            pair(*mlp.inputs, columns=mlp.output)
        for a in attentions:
            if a.query_rows == a.kv_rows:
                pair(a.value, columns=a.output)
                if not a.rotary:
                    pair(a.query, a.key)
        self.units += [gates[single[key]][None] for key, gates in of.items() if single[key].any()]

    def rounded(self, is_open: Tensor, order: Tensor) -> Tensor:
        """The mask [gates] with so many more open that each dimension has a multiple, or all, of its units.

        Of those that are closed the last in `order` [gates] open; of a unit the gate counts that comes first.
        """
        stays = is_open.clone()
        for gates in self.units:
            alive = stays[gates].all(0)
            count = int(alive.sum())
            missing = min(-count % _multiple(len(alive)), len(alive) - count)
            if missing:
                rank = order[gates].amin(0).double().masked_fill(alive, -torch.inf)
                stays[gates[:, rank.topk(missing).indices]] = True
        return stays


def _multiple(width: int) -> int:
    """A power of two; smaller where it were more than a sixteenth of all."""
    return min(MULTIPLE, 1 << max(0, (width // 16).bit_length() - 1))
