"""A cache of decompositions of a model's weights."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops.backend import in_full_precision
from ...structure.matrices import Matrix
from ...structure.svd import Factors, cluster_rows, factorize, split_rows


class Split(NamedTuple):
    """How the rows of a matrix are grouped; clusters are made for one rho."""

    blocks: int
    clustered: bool
    rho: float | None = None


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a matrix as up [M', r] @ down [r, N], in fp32 (fp64 for fp64); rows None: all of them."""

    up: Tensor
    down: Tensor
    rows: Tensor | None


def product(matrix: Matrix, mine: Sequence[Piece]) -> Tensor:
    """The approximation, dense, [M, N]."""
    with in_full_precision(mine[0].up):
        if mine[0].rows is None:
            return mine[0].up @ mine[0].down
        out = mine[0].up.new_empty(matrix.shape)
        for piece in mine:
            assert piece.rows is not None
            out[piece.rows.to(out.device)] = piece.up @ piece.down
        return out


@dataclass
class _Held:
    weight: weakref.ref[Tensor]
    version: int
    parts: list[Factors]


class Decompositions:
    """A cache of singular triplets of matrices, whole or by groups of rows, each computed once.

    Those of a weight that was changed in place, moved or replaced are recomputed; changes through `.data` are not
    noticed. In fp32 (fp64 for fp64); all triplets of a square weight take 8 B per element.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> cache = sk.methods.laser.Decompositions()
        >>> plan = [sk.methods.laser.Reduction("0.weight", rho=0.5)]
        >>> model = sk.methods.laser.reduce(model, plan, decompositions=cache).revert()
        >>> reduced = sk.methods.laser.reduce(model, plan, decompositions=cache)  # nothing is decomposed again
        >>> cache.clear()
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, Split], _Held] = {}

    def clear(self) -> None:
        """Remove all entries."""
        self._held.clear()

    def of(
        self, model: nn.Module, wanted: Iterable[tuple[Matrix, Split]], rho: float
    ) -> dict[tuple[Matrix, Split], list[Factors]]:
        """The parts of each matrix under each split, with triplets for ranks up to `rho` at least.

        Raises ValueError for a matrix with NaN or infinity.
        """
        wanted = list(wanted)
        new: dict[tuple[str, Split], _Held] = {}
        missing: dict[tuple[int, int, int], list[tuple[_Held, Tensor, Tensor | None]]] = defaultdict(list)
        for matrix, split in wanted:
            parameter = model.get_parameter(matrix.parameter)
            if self._serves(self._held.get((matrix.label, split)), parameter, rho):
                continue
            weight = matrix.read(parameter)
            if not bool(weight.isfinite().all()):
                raise ValueError(f"{matrix.label!r} has NaN or infinity, so it has no singular values")
            held = new[matrix.label, split] = _Held(weakref.ref(parameter), parameter._version, [])
            for rows in _groups(weight, split):
                part = weight if rows is None else weight[rows.to(weight.device)]
                missing[len(part), part.shape[1], _rank(rho, *part.shape)].append((held, part, rows))
        for (*_, rank), alike in missing.items():
            for (held, _, rows), found in zip(alike, factorize([part for _, part, _ in alike], rank), strict=True):
                held.parts.append(Factors(found.u, found.s, found.v, rows))
        self._held |= new
        return {(matrix, split): self._held[matrix.label, split].parts for matrix, split in wanted}

    def pieces(self, model: nn.Module, matrix: Matrix, split: Split, rho: float) -> list[Piece]:
        """The best approximation of a matrix, or of each group of its rows, by a share rho of its triplets.

        Raises ValueError for more groups than rows, and as `of`.
        """
        if split.blocks > matrix.shape[0]:
            raise ValueError(f"blocks: {matrix.label!r} has {matrix.shape[0]} rows, got {split.blocks}")
        parts = self.of(model, [(matrix, split)], rho)[matrix, split]
        return [Piece(*part.truncated(rank_for(rho, part)), part.rows) for part in parts]

    @staticmethod
    def _serves(held: _Held | None, parameter: Tensor, rho: float) -> bool:
        if held is None or held.weight() is not parameter or held.version != parameter._version:
            return False
        compute_dtype = torch.promote_types(parameter.dtype, torch.float32)
        return all(
            (part.u.dtype, part.u.device) == (compute_dtype, parameter.device)
            and (part.complete or len(part.s) >= rank_for(rho, part))
            for part in held.parts
        )


def rank_for(rho: float, part: Factors) -> int:
    """LASER's rank for some rows of a weight."""
    return _rank(rho, len(part.u), len(part.v))


def _rank(rho: float, m: int, n: int) -> int:
    return math.floor(rho * min(m, n) + 1e-9)  # 0.29 * 100 is below 29


def _groups(weight: Tensor, split: Split) -> list[Tensor | None]:
    if split.blocks == 1:
        return [None]
    if split.clustered:
        assert split.rho is not None
        m, n = weight.shape
        return list(cluster_rows(weight, split.blocks, _rank(split.rho, m // split.blocks, n)))
    return list(split_rows(len(weight), split.blocks))
