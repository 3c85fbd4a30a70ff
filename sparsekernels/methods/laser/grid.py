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
    """The best gain of each matrix by layer and kind. Of matrices that share both (experts), the best one counts.

    Attributes:
        layers: numbers of the layers, ascending.
        kinds: kinds of matrices, as in `Matrix.kind`.
        values ([layers, kinds], fp32): gains, NaN where there is none.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> gains = [sk.methods.laser.Reduction("0.weight", rho=0.5, predicted=0.25)]
        >>> sk.methods.laser.grid(gains, sk.matrices(model))
        Grid(layers=[0], kinds=['weight'], values=tensor([[0.2500]]))
    """

    layers: list[int]
    kinds: list[str]
    values: Tensor


def grid(reductions: Iterable[Reduction], matrices: Mapping[str, Matrix], *, measured: bool = False) -> Grid:
    """Arrange the best gain of each matrix by layer and kind.

    Args:
        reductions: of `rank`, or the "candidates" of `search`. Those of matrices outside numbered layers are skipped.
        matrices: label -> Matrix, as `Ranking.matrices` or `sk.matrices(model)`.
        measured: use measured instead of predicted gains.

    Returns:
        Grid, a table of gains.

    Raises:
        ValueError: a reduction without such a gain, or of a matrix that is not in `matrices`; none in a numbered layer.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> gains = [sk.methods.laser.Reduction(f"{i}.weight", rho=0.5, measured=float(i)) for i in range(2)]
        >>> sk.methods.laser.grid(gains, sk.matrices(model), measured=True).values
        tensor([[0.],
                [1.]])
    """
    found: dict[tuple[int, str], float] = {}
    for reduction in reductions:
        value = reduction.measured if measured else reduction.predicted
        if value is None:
            raise ValueError(f"reductions: {reduction} has no {'measured' if measured else 'predicted'} gain")
        if reduction.matrix not in matrices:
            raise ValueError(f"matrices has no {reduction.matrix!r}")
        matrix = matrices[reduction.matrix]
        if matrix.layer is not None:
            place = matrix.layer, matrix.kind
            found[place] = max(value, found.get(place, value))
    if not found:
        raise ValueError("reductions: no matrix is in a numbered layer")
    layers = sorted({layer for layer, _ in found})
    kinds = [kind for kind in dict.fromkeys(m.kind for m in matrices.values()) if any(k == kind for _, k in found)]
    values = torch.tensor([[found.get((layer, kind), float("nan")) for kind in kinds] for layer in layers])
    return Grid(layers, kinds, values)
