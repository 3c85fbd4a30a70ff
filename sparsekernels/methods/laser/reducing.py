"""Replace weights by low-rank approximations, factored where that is smaller, and revert that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...common.files import check_names, described, load_tensors, reading, save_tensors
from ...structure.matrices import Matrix, matrices
from ...training.layers import refuse_train_only
from .changes import Replacement, put
from .decompositions import Decompositions, Piece
from .ranking import Reduction

Prepared = list[tuple[Reduction, Matrix, list[Piece]]]

FACTORS = (torch.float32, torch.float64)
SCORE = (int, float, type(None))
SCHEMA = {"matrix": str, "rho": (int, float), "blocks": int, "clustered": bool, "predicted": SCORE, "measured": SCORE}


class Reduced:
    """A model with reduced weights, and how to undo that. As a context manager it reverts on exit.

    Attributes:
        model: the model.
        plan: the reductions that were made.
        report: of `adapt` and `search`, how they were found; else empty.
        parameters_saved: number of elements of the replaced weights minus that of their factors; 0 after `revert` or
            `merge`.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> reduced = sk.methods.laser.reduce(model, [sk.methods.laser.Reduction("0.weight", rho=0.25)])
        >>> reduced.parameters_saved, type(model[0]).__name__
        (32, 'LowRankLinear')
        >>> model = reduced.revert()  # or merge(), or discard_originals()
    """

    def __init__(self, model: nn.Module, prepared: Prepared, changes: list[Replacement]) -> None:
        self.model = model
        self.plan = [reduction for reduction, _, _ in prepared]
        self.report: dict[str, Any] = {}
        self.parameters_saved = sum(change.parameters_saved for change in changes)
        self._prepared = prepared
        self._changes = changes

    def revert(self) -> nn.Module:
        """Restore the original weights and modules, bit for bit; a second call does nothing. Returns the model.

        A module that was factored returns on the device and in the dtype that its factors have now. Biases, and
        everything else that was not reduced, are left as they are.
        """
        for change in reversed(self._changes):
            change.revert()
        self._leave()
        return self.model

    def merge(self) -> nn.Module:
        """Keep the reduced weights, with factors multiplied out into the original modules. Returns the model.

        Training since then is included. The originals are overwritten, so this cannot be undone.

        Examples:
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
            >>> model = sk.methods.laser.reduce(model, [sk.methods.laser.Reduction("0.weight", rho=0.25)]).merge()
            >>> int(torch.linalg.matrix_rank(model[0].weight))
            2
        """
        for change in self._changes:
            change.merge()
        self._leave()
        return self.model

    def discard_originals(self) -> nn.Module:
        """Keep the model as it is, with factors, and free the originals; this cannot be undone. Returns the model."""
        self._changes = []
        return self.model

    def _leave(self) -> None:
        """After `discard_originals` there is nothing to do."""
        if self._changes:
            self.parameters_saved = 0
        self._changes = []

    def save(self, path: str | Path) -> None:
        """Write the approximations to a safetensors file, atomically, for `load`: as they were made, before training.

        The file contains fp32 factors, whatever the dtype of the model, so that loading gives the same bits.

        Examples:
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
            >>> reduced = sk.methods.laser.reduce(model, [sk.methods.laser.Reduction("0.weight", rho=0.25)])
            >>> reduced.save("reductions.safetensors")
            >>> model = reduced.discard_originals()
        """
        tensors: dict[str, Tensor] = {}
        names = []
        for i, (reduction, _, pieces) in enumerate(self._prepared):
            names.append({**asdict(reduction), "pieces": len(pieces)})
            for k, piece in enumerate(pieces):
                tensors |= {f"{i}.{k}.up": piece.up, f"{i}.{k}.down": piece.down}
                if piece.rows is not None:
                    tensors[f"{i}.{k}.rows"] = piece.rows
        save_tensors(path, tensors, {"sparsekernels": "reductions", "reductions": json.dumps(names)})

    def __enter__(self) -> Reduced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


def reduce(
    model: nn.Module,
    plan: Iterable[Reduction],
    *,
    factored: bool = True,
    decompositions: Decompositions | None = None,
) -> Reduced:
    """Replace matrices of a model by their best approximations of lower rank.

    Args:
        model: any torch model; changed in place, undone by `Reduced.revert()`.
        plan: reductions, from `rank` or made by hand; each matrix at most once.
        factored: replace a Linear or Conv1D by a `LowRankLinear` where that stores less. Parts of a fused projection
            are factored beside dense rows. Everything else is written dense, in place: experts, tables, modules with
            hooks, of a subclass, that share their weight with another kind of module, or whose weight is read by the
            forward of their parent (`wo` of T5). Code elsewhere that reads `.weight` gets the product, computed at each
            access.
        decompositions: of a ranking of this model.

    Returns:
        Reduced, the handle that reverts it.

    Numerics: decomposed and multiplied in fp32 (fp64 for fp64), rounded once to the dtype of the weight. Deterministic.
    Memory: the originals are kept, until `discard_originals()` or `merge()`.

    Raises:
        ValueError: an unknown matrix, one that occurs twice, numbers out of range, a weight that is not finite, a model
            under train_only. The model is unchanged then.

    Source: LASER (Sharma et al., arXiv 2312.13558); groups of rows, Sreeram et al. (arXiv 2510.20800).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> with sk.methods.laser.reduce(model, [sk.methods.laser.Reduction("0.weight", rho=0.25)]):
        ...     print(model[0])
        LowRankLinear(in_features=8, out_features=8, ranks=[2], bias=True, stores 32 for 64 elements)
    """
    plan = list(plan)
    cache = Decompositions() if decompositions is None else decompositions
    prepared: Prepared = []
    for reduction, matrix in zip(plan, _resolved(model, plan), strict=True):
        prepared.append((reduction, matrix, cache.pieces(model, matrix, reduction.split, reduction.rho)))
    return _put(model, prepared, factored)


def load(model: nn.Module, path: str | Path, *, factored: bool = True) -> Reduced:
    """Reduce a model by the approximations in a file of `Reduced.save`; nothing is decomposed.

    Args:
        model: any torch model with these matrices; changed in place, undone by `Reduced.revert()`.
        path: the file.
        factored: as in `reduce`.

    Returns:
        Reduced, as from `reduce`.

    Raises:
        FileNotFoundError: no such file. ValueError: the file is damaged, of another kind, or made for another model.
            The model is unchanged then.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> with sk.methods.laser.reduce(model, [sk.methods.laser.Reduction("0.weight", rho=0.25)]) as reduced:
        ...     reduced.save("reductions.safetensors")
        >>> model = sk.methods.laser.load(model, "reductions.safetensors").discard_originals()
    """
    tensors, metadata = load_tensors(path, "reductions")
    entries = described(path, metadata.get("reductions"), [{**SCHEMA, "pieces": int}])
    counts = [entry.pop("pieces") for entry in entries]
    if min(counts, default=1) < 1 or sum(counts) > len(tensors):
        raise ValueError(f"{path} is damaged: it has {len(tensors)} tensors for {counts[:5]} pieces")
    keys = [[f"{i}.{k}" for k in range(count)] for i, count in enumerate(counts)]
    rows = [f"{key}.rows" for mine in keys for key in mine if f"{key}.rows" in tensors]
    check_names(path, tensors, rows + [f"{key}.{side}" for mine in keys for key in mine for side in ("up", "down")])
    with reading(path):
        plan = [Reduction(**entry) for entry in entries]
    prepared: Prepared = []
    for reduction, matrix, mine in zip(plan, _resolved(model, plan), keys, strict=True):
        loaded = [Piece(tensors[f"{k}.up"], tensors[f"{k}.down"], tensors.get(f"{k}.rows")) for k in mine]
        _check_pieces(path, matrix, loaded)
        device = model.get_parameter(matrix.parameter).device
        prepared.append((reduction, matrix, [Piece(p.up.to(device), p.down.to(device), p.rows) for p in loaded]))
    return _put(model, prepared, factored)


def _resolved(model: nn.Module, plan: Sequence[Reduction]) -> list[Matrix]:
    refuse_train_only(model)
    labels = [reduction.matrix for reduction in plan]
    twice = next((label for label, count in Counter(labels).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"plan reduces {twice!r} twice; list each matrix once")
    found = matrices(model, labels)
    for label in labels:
        if label not in found:
            meant = "; ".join(map(repr, list(matrices(model, [label]))[:3]))
            raise ValueError(f"plan: {label!r} is not the label of a matrix; it matches {meant}")
    return [found[label] for label in labels]


def _check_pieces(path: str | Path, matrix: Matrix, mine: Sequence[Piece]) -> None:
    """Raise ValueError unless the pieces together make a matrix of this one's shape."""
    for piece in mine:
        alike = piece.up.dtype == piece.down.dtype == mine[0].up.dtype and piece.up.dtype in FACTORS
        if not alike or piece.up.dim() != 2 or piece.down.dim() != 2 or piece.up.shape[1] != len(piece.down):
            raise ValueError(f"{path} is damaged: factors of {matrix.label!r} do not fit each other")
        if not bool(piece.up.isfinite().all() & piece.down.isfinite().all()):
            raise ValueError(f"{path} is damaged: factors of {matrix.label!r} hold NaN or infinity")
    m, widths = sum(len(piece.up) for piece in mine), {piece.down.shape[1] for piece in mine}
    if {(m, n) for n in widths} != {matrix.shape}:
        raise ValueError(f"{path} holds {[m, *widths]} for {matrix.label!r}, which is {list(matrix.shape)}")
    if len(mine) == 1 and mine[0].rows is None:
        return
    rows = [piece.rows for piece in mine if piece.rows is not None and piece.rows.dtype == torch.int64]
    # Sizes first: the checks below allocate m rows.
    fits = [r.shape for r in rows] == [piece.up.shape[:1] for piece in mine] and all(len(r) for r in rows)
    if not fits or not torch.equal(torch.cat(rows).sort().values, torch.arange(m)):
        raise ValueError(f"{path} is damaged: rows of the pieces of {matrix.label!r} are not a permutation")


def _put(model: nn.Module, prepared: Prepared, factored: bool) -> Reduced:
    changes = put(model, [(matrix, mine) for _, matrix, mine in prepared], factored)
    return Reduced(model, prepared, changes)
