"""Which matrices are worth reducing, and to which rank: predicted by one backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...scoring.losses import Batch, Loss
from ...scoring.singular_values import singular_value_gradients
from ...structure.matrices import Matrix, matrices
from ...structure.svd import Factors, group_equal
from .decompositions import Decompositions, Split, rank_for

Score = Literal["second_order", "first_order"]
RHOS = (0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Reduction:
    """One matrix to replace by its best approximation of lower rank.

    Args:
        matrix: its label, as in `sk.matrices(model)`.
        rho: the share of its singular triplets to keep: rank floor(rho * min(M, N)).
        blocks: number of groups of its rows, each reduced separately, to rank floor(rho * min(M', N)).
        clustered: whether the groups are clusters of rows (k-subspaces) instead of consecutive blocks.
        predicted: the score that `rank` gave it.
        measured: its gain where it was evaluated, in the units of `evaluate`.

    Raises:
        ValueError: rho outside [0, 1], blocks below 1, or clusters with one block.

    Source: LASER (Sharma et al., arXiv 2312.13558); groups of rows, Sreeram et al. (arXiv 2510.20800).

    Examples:
        >>> print(sk.methods.laser.Reduction("h.0.mlp.c_fc.weight", rho=0.1, blocks=4))
        h.0.mlp.c_fc.weight, rho 0.1, 4 blocks
    """

    matrix: str
    rho: float
    blocks: int = 1
    clustered: bool = False
    predicted: float | None = field(default=None, compare=False)
    measured: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must lie in [0, 1], got {self.rho} for {self.matrix!r}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks} for {self.matrix!r}")
        if self.clustered and self.blocks == 1:
            raise ValueError(f"blocks must be at least 2 to cluster rows, got 1 for {self.matrix!r}")

    @property
    def split(self) -> Split:
        """How the rows are grouped; clusters are made for this rho."""
        return Split(self.blocks, self.clustered, self.rho if self.clustered else None)

    def __str__(self) -> str:
        how = "" if self.blocks == 1 else f", {self.blocks} {'clusters' if self.clustered else 'blocks'}"
        return f"{self.matrix}, rho {self.rho:g}{how}"


@dataclass(frozen=True)
class Ranking:
    """The result of `rank`: iterates over its reductions, the best first.

    Attributes:
        reductions: sorted by predicted score, descending.
        score: which score, "second_order" or "first_order".
        loss: mean loss of the unreduced model over the samples.
        matrices: label -> Matrix.
        decompositions: to pass to further calls of `rank` and to `reduce`.

    Source: ours; see `rank`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> ranking = sk.methods.laser.rank(model, [{"x": torch.randn(16, 8)}], rhos=(0.5, 0.1), loss=loss)
        >>> len(ranking), sorted(reduction.matrix for reduction in ranking.best())
        (4, ['0.weight', '2.weight'])
    """

    reductions: list[Reduction]
    score: Score
    loss: float
    matrices: Mapping[str, Matrix]
    decompositions: Decompositions

    def __iter__(self) -> Iterator[Reduction]:
        return iter(self.reductions)

    def __len__(self) -> int:
        return len(self.reductions)

    def best(self) -> list[Reduction]:
        """The best reduction of each matrix, the best matrix first."""
        found: dict[str, Reduction] = {}
        for reduction in self.reductions:
            found.setdefault(reduction.matrix, reduction)
        return list(found.values())


class NoGradient(ValueError):
    """The loss does not depend on any of the matrices."""


def rank(
    model: nn.Module,
    samples: Iterable[Batch],
    *,
    rhos: Sequence[float] = RHOS,
    names: Iterable[str] | None = None,
    blocks: Sequence[int] = (1,),
    clusters: Sequence[int] = (),
    score: Score = "second_order",
    loss: Loss | None = None,
    decompositions: Decompositions | None = None,
    progress: bool = True,
) -> Ranking:
    """Predict the effect on the loss of reducing each matrix to each rank, from one backward; the model is not changed.

    No weight gradient of a Linear or Conv1D is formed, if it runs its own forward.

    Args:
        model: any torch model, not under train_only.
        samples: batches in Hugging Face form (mappings of tensors with labels), about 100 samples in all.
        rhos: shares of the triplets to keep, in [0, 1].
        names: patterns (as in `fnmatch`) of matrices or parameters, see `sk.matrices`. Default: projections of
            attention and MLP in numbered blocks; those of fused projections and of experts separately.
        blocks: numbers of consecutive blocks to split the rows into; 1 is the whole matrix.
        clusters: the same for clusters of rows. They are computed for each rho, which is slow: name few matrices.
        score: how reductions are ranked. With G the mean gradient, d_i = u_i^T G v_i, and sums over all triplets that
            are cut off: "first_order": sum of s_i d_i, which is <G, W - W_r>: the first-order decrease of the mean
            loss; "second_order": that, minus half the mean over samples b of <G_b, W - W_r>^2: the second-order
            decrease, with the empirical Fisher matrix as Hessian. It penalises large changes.
        loss: function of (model, batch) that returns the mean loss of a batch. Default: the model's own.
        decompositions: of an earlier ranking of this model; those of unchanged weights are reused.
        progress: show a progress bar.

    Returns:
        Ranking of len(rhos) * (len(blocks) + len(clusters)) reductions for each matrix that has enough rows.

    Numerics: triplets of a repeated singular value are scored as one. Deterministic on the CPU.
    Cost: the decompositions (kept), plus that of `singular_value_gradients`, per sample for "second_order": then models
    with experts in one tensor and batches of texts with unequal numbers of labels run sample by sample. With small rho
    only the triplets needed are computed, by a randomised method, see `factorize`.

    Raises:
        ValueError: numbers out of range, an unknown score, names that match nothing, weights that are not finite, a
            loss whose gradient is zero in all matrices (as for a contrastive loss of one sample), and all that
            `singular_value_gradients` raises.

    Source: scoring matrices by the gradients of their singular values, from about 100 samples, is the idea of Sreeram
    et al. (arXiv 2510.20800); so is splitting rows. Sign and aggregation were not available: the scores and the default
    rhos are ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> ranking = sk.methods.laser.rank(model, [{"x": torch.randn(16, 8)}], loss=loss)
        >>> len(ranking), ranking.score
        (16, 'second_order')
    """
    check_options(rhos, blocks, clusters, score)
    return rank_matrices(
        model,
        samples,
        targets(model, names),
        rhos=rhos,
        blocks=blocks,
        clusters=clusters,
        score=score,
        loss=loss,
        decompositions=Decompositions() if decompositions is None else decompositions,
        progress=progress,
    )


def check_options(rhos: Sequence[float], blocks: Sequence[int], clusters: Sequence[int], score: Score) -> None:
    if score not in ("second_order", "first_order"):
        raise ValueError(f'score must be "second_order" or "first_order", got {score!r}')
    if not rhos or not all(0 <= rho <= 1 for rho in rhos):
        raise ValueError(f"rhos must be shares in [0, 1], at least one, got {list(rhos)}")
    if any(k < 1 for k in blocks) or any(k < 2 for k in clusters):
        raise ValueError(f"blocks must be at least 1 and clusters at least 2, got {list(blocks)} and {list(clusters)}")


def rank_matrices(
    model: nn.Module,
    samples: Iterable[Batch],
    found: Mapping[str, Matrix],
    *,
    rhos: Sequence[float],
    blocks: Sequence[int],
    clusters: Sequence[int],
    score: Score,
    loss: Loss | None,
    decompositions: Decompositions,
    progress: bool,
) -> Ranking:
    """As `rank`, for matrices that were already found."""
    wanted = {
        label: [Split(k, False) for k in blocks if k <= matrix.shape[0]]
        + [Split(k, True, rho) for k in clusters for rho in rhos if k <= matrix.shape[0]]
        for label, matrix in found.items()
    }
    asked = [(found[label], split) for label, splits in wanted.items() for split in splits]
    parts = decompositions.of(model, asked, max(rhos))
    flat = {
        matrix: [part for split in wanted[label] for part in parts[matrix, split]] for label, matrix in found.items()
    }
    derivatives, mean = singular_value_gradients(
        model, samples, flat, per_sample=score == "second_order", loss=loss, progress=progress
    )
    if not any(bool(x.any()) for of in derivatives.values() for x in (of.inner, *of.values)):
        raise NoGradient(_flat(score))
    reductions = []
    for label, matrix in found.items():
        values = iter(derivatives[matrix].values)
        for split in wanted[label]:
            mine = [(part, next(values)) for part in parts[matrix, split]]
            these = rhos if split.rho is None else [split.rho]
            for rho, predicted in zip(these, _scores(score, mine, derivatives[matrix].inner, these), strict=True):
                reductions.append(Reduction(label, rho, split.blocks, split.clustered, predicted))
    reductions.sort(key=lambda reduction: -(reduction.predicted or 0.0))
    return Ranking(reductions, score, mean, found, decompositions)


def _flat(score: Score) -> str:
    message = "samples: the gradient of the loss is zero in all of the matrices, so they cannot be ranked"
    if score == "second_order":
        return (
            f'{message}; "second_order" uses the loss of each sample alone: pass score="first_order" if the loss '
            "compares samples"
        )
    return f"{message}; a loss that compares samples needs several in a batch"


def targets(model: nn.Module, names: Iterable[str] | None) -> dict[str, Matrix]:
    """The matrices that `names` stands for. Raises ValueError if there are none."""
    found = matrices(model, names)
    if not found:
        raise ValueError("names: the model has no projections in numbered blocks; pass names")
    return found


def _scores(score: Score, parts: Sequence[tuple[Factors, Tensor]], inner: Tensor, rhos: Sequence[float]) -> list[float]:
    """For each rho, the score of what is cut off, over all parts of a matrix. Derivatives are [R], or [samples, R]."""
    whole = all(part.complete for part, _ in parts)
    found = torch.zeros(*inner.shape, len(rhos), dtype=inner.dtype, device=inner.device)
    for part, values in parts:
        values = part.s * group_equal(values, part.s)
        sums = torch.cat([torch.zeros_like(values[..., :1]), values.cumsum(-1)], -1)  # of the first r, for every r
        kept = sums[..., [rank_for(rho, part) for rho in rhos]]
        found += sums[..., -1:] - kept if whole else -kept
    if not whole:
        found += inner[..., None]
    if score == "second_order":
        found = found.mean(0) - found.square().mean(0) / 2
    return [float(x) for x in found]
