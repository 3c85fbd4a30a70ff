"""Gains by layer and kind of matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...structure.matrices import Matrix
from .ranking import Reduction


@dataclass(frozen=True, eq=False)
class Grid:
    """The best gain of each matrix: `values` [layers, kinds], fp32, NaN where there is none.

    Of matrices that share a layer and a kind (experts) the best one counts.
    """

    layers: list[int]
    kinds: list[str]
    values: Tensor


def grid(reductions: Iterable[Reduction], matrices: Mapping[str, Matrix], *, measured: bool = False) -> Grid:
    """Arrange the best reduction of each matrix by layer and kind.

    Args:
        reductions: of `rank`, or the "candidates" of `search`. Those of matrices outside of layers are left out.
        matrices: label -> Matrix, as `Ranking.matrices` or `sk.matrices(model)`.
        measured: take what was measured instead of what was predicted.

    Raises:
        ValueError: a reduction without such a number, or of a matrix that is not among `matrices`; none in a layer.
    """
    found: dict[tuple[int, str], float] = {}
    for reduction in reductions:
        value = reduction.measured if measured else reduction.predicted
        if value is None:
            raise ValueError(f"reductions: {reduction} has no {'measured' if measured else 'predicted'} gain")
        if reduction.matrix not in matrices:
            raise ValueError(f"matrices holds no {reduction.matrix!r}")
        matrix = matrices[reduction.matrix]
        if matrix.layer is not None:
            place = matrix.layer, matrix.kind
            found[place] = max(value, found.get(place, value))
    if not found:
        raise ValueError("reductions holds no matrix that lies in a numbered layer")
    layers = sorted({layer for layer, _ in found})
    kinds = [kind for kind in dict.fromkeys(m.kind for m in matrices.values()) if any(k == kind for _, k in found)]
    values = torch.tensor([[found.get((layer, kind), float("nan")) for kind in kinds] for layer in layers])
    return Grid(layers, kinds, values)
