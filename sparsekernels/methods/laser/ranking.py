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
    """One matrix replaced by its best approximation of lower rank.

    Attributes:
        matrix: its label, as in `sk.matrices(model)`.
        rho: the share of its singular triplets that is kept: rank floor(rho * min(M, N)).
        blocks: into how many groups its rows are split, each reduced on its own, to rank floor(rho * min(M', N)).
        clustered: whether the groups are clusters of rows (k-subspaces) instead of consecutive blocks.
        predicted: the score that `rank` gave it. measured: what it gained where it was tried, in the units of that.
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
        return Split(self.blocks, self.clustered, self.rho if self.clustered else None)

    def __str__(self) -> str:
        how = "" if self.blocks == 1 else f", {self.blocks} {'clusters' if self.clustered else 'blocks'}"
        return f"{self.matrix}, rho {self.rho:g}{how}"


@dataclass(frozen=True)
class Ranking:
    """What `rank` found; goes over its reductions, the best first.

    Attributes:
        reductions: sorted by predicted score. score: which one. loss: mean loss over the samples, unreduced.
        matrices: label -> Matrix. decompositions: for further calls of `rank` and for `reduce`.
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
    """Predict what reducing each matrix to each rank would do to the loss, from one backward over the samples.

    The model is left as it was. No weight gradient of a Linear or Conv1D is formed, if it runs by its own forward.

    Args:
        model: any torch model; one under train_only must be restored first.
        samples: batches in Hugging Face form (mappings of tensors with labels), some 100 samples in all.
        rhos: shares of the triplets to keep, in [0, 1].
        names: patterns (as in `fnmatch`) of matrices or parameters, see `sk.matrices`. Default: projections of
            attention and MLP in numbered blocks; those of fused projections and of experts one by one.
        blocks: into how many consecutive blocks to split the rows; 1 is the matrix as a whole.
        clusters: the same for clusters of rows. They are found anew for each rho, which takes long: name few matrices.
        score: by which reductions are ranked. With G the mean gradient, d_i = u_i^T G v_i, and the sum over all
            triplets that are cut off:
            "first_order": of s_i d_i, which is <G, W - W_r>: the first-order fall of the mean loss;
            "second_order": that, less half the mean over samples b of <G_b, W - W_r>^2: the second-order fall, with the
            empirical Fisher matrix for the Hessian. It penalises steps that go too far.
        loss: function of (model, batch) that returns the mean loss of a batch. Default: the model's own.
        decompositions: of an earlier ranking of this model; those of weights that have not changed are used again.
        progress: show a progress bar.

    Returns:
        Ranking of len(rhos) * (len(blocks) + len(clusters)) reductions for each matrix that has as many rows.

    Numerics: triplets of a repeated singular value are scored as one. Deterministic on the CPU.
    Cost: the decompositions (kept), then that of `singular_value_gradients`, per sample for "second_order": models with
    experts in one tensor, say, run sample by sample then, as do batches of texts with unequal numbers of labels. With
    small rho only so many triplets are computed, by a randomised method, see `factorize`.

    Raises:
        ValueError: numbers out of range, an unknown score, names that match nothing, weights that are not finite, a
            loss whose gradient is zero in all matrices, as that of a contrastive loss of one sample is, and all that
            `singular_value_gradients` raises.

    Source: scoring matrices by the gradients of their singular values, from about 100 samples, is the idea of Sreeram
    et al. (arXiv 2510.20800); splitting rows too. Sign and aggregation could not be read: the scores are ours, and so
    are the default rhos.
    """
    check_options(rhos, blocks, clusters, score)
    found, cache = targets(model, names), decompositions or Decompositions()
    return rank_matrices(model, samples, found, rhos, blocks, clusters, score, loss, cache, progress)


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
    rhos: Sequence[float],
    blocks: Sequence[int],
    clusters: Sequence[int],
    score: Score,
    loss: Loss | None,
    cache: Decompositions,
    progress: bool,
) -> Ranking:
    """As `rank`, of matrices that were found before."""
    wanted = {
        label: [Split(k, False) for k in blocks if k <= matrix.shape[0]]
        + [Split(k, True, rho) for k in clusters for rho in rhos if k <= matrix.shape[0]]
        for label, matrix in found.items()
    }
    asked = [(found[label], split) for label, splits in wanted.items() for split in splits]
    parts = cache.of(model, asked, max(rhos))
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
    return Ranking(reductions, score, mean, found, cache)


def _flat(score: Score) -> str:
    message = "samples: the gradient of the loss is zero in all of the matrices, so nothing tells one from another"
    if score == "second_order":
        return (
            f'{message}; "second_order" takes the loss of each sample alone: pass score="first_order" if the loss '
            "compares samples"
        )
    return f"{message}; a loss that compares samples needs several in a batch"


def targets(model: nn.Module, names: Iterable[str] | None) -> dict[str, Matrix]:
    """The matrices that are meant. Raises ValueError if there are none."""
    found = matrices(model, names)
    if not found:
        raise ValueError("names: the model has no projections in numbered blocks; say which matrices are meant")
    return found


def _scores(score: Score, parts: Sequence[tuple[Factors, Tensor]], inner: Tensor, rhos: Sequence[float]) -> list[float]:
    """For each rho, over all parts of a matrix, for what is cut off. Derivatives are [R], or [samples, R]."""
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
