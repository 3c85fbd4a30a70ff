"""Find which matrices to reduce: from one backward and a few evaluations, or by exhaustive search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...scoring.eval_mode import in_eval_mode
from ...scoring.losses import Batch, Loss, batch_size, default_loss, to_device
from ...structure.matrices import Matrix
from ...training.layers import refuse_train_only
from .decompositions import Decompositions, product
from .ranking import RHOS, NoGradient, Ranking, Reduction, Score, check_options, rank_matrices, targets
from .reducing import Reduced, reduce

Evaluate = Callable[[nn.Module], float]


def adapt(
    model: nn.Module,
    samples: Iterable[Batch],
    evaluate: Evaluate | None = None,
    *,
    rhos: Sequence[float] = RHOS,
    names: Iterable[str] | None = None,
    blocks: Sequence[int] = (1,),
    clusters: Sequence[int] = (),
    num_candidates: int = 16,
    max_matrices: int = 3,
    score: Score = "second_order",
    loss: Loss | None = None,
    factored: bool = True,
    progress: bool = True,
) -> Reduced:
    """Reduce the rank of matrices where that improves the model, found by a few backwards over the same samples.

    In each round: rank all matrices by one backward; evaluate the `num_candidates` best reductions; keep the best of
    them if it improves the model, and start the next round, else stop. With more than one way to group rows, a second
    backward ranks these for the matrices that are best as a whole.

    Args:
        model: any torch model; changed in place, undone by `Reduced.revert()`.
        samples: batches in Hugging Face form (mappings of tensors with labels), about 100 samples in all.
        evaluate: function of the model, in eval mode and without gradients; larger is better. Default: minus the mean
            loss over the samples.
        rhos, names, blocks, clusters, score, loss: as in `rank`.
        num_candidates: number of reductions to evaluate per round.
        max_matrices: maximum number of matrices to reduce.
        factored: as in `reduce`.
        progress: show progress bars.

    Returns:
        Reduced. `.plan` is the reductions that were kept, with predicted and measured gain; it may be empty. `.report`
        has "backwards" and "evaluations", the number of passes over the samples; "before" and "after", the values of
        `evaluate`; "candidates", for each round its reductions with measured gains; "ranking", all reductions of the
        first round with predicted scores.

    Cost: `max_matrices` times that of `rank` and `num_candidates` evaluations; the decompositions of all matrices are
    kept in memory, see `Decompositions`. Reductions that make `evaluate` infinite or NaN gain minus infinity.
    Deterministic on the CPU.

    Raises:
        ValueError: as `rank`, an evaluate that is not finite for the unchanged model, numbers below 1. The model is
            unchanged then.

    Source: Sreeram et al. (arXiv 2510.20800), as far as available: one backward ranks, candidates are evaluated on the
    same samples. Ours: the scores, `num_candidates`, greedy composition with a new ranking in each round.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> reduced = sk.methods.laser.adapt(model, [{"x": torch.randn(16, 8)}], loss=loss, max_matrices=1)
        >>> len(reduced.plan), reduced.report["after"] > reduced.report["before"]
        (1, True)
    """
    if num_candidates < 1 or max_matrices < 1:
        raise ValueError(f"num_candidates and max_matrices must be at least 1, got {num_candidates} and {max_matrices}")
    batches = list(samples)
    if not batches:
        raise ValueError("samples holds no batch")
    splits = [k for k in blocks if k != 1]
    check_options(rhos, blocks, clusters, score)
    left = targets(model, names)
    trial = _Trial(model, left, evaluate or _minus_loss(batches, loss))
    options: dict[str, Any] = {"rhos": rhos, "score": score, "loss": loss, "decompositions": trial.decompositions}
    options["progress"] = False
    plan: list[Reduction] = []
    history: list[list[Reduction]] = []
    backwards = 0
    first: Ranking | None = None
    bar = tqdm(total=max_matrices, desc="adapt", unit="round", disable=not progress, leave=False)
    with trial, bar:
        before = best = trial.start()
        for _ in range(min(max_matrices, len(left))):
            backwards += 1
            try:
                ranking = rank_matrices(model, batches, left, blocks=(1,), clusters=(), **options)
            except NoGradient:
                if first is None:
                    raise
                break  # the other matrices no longer affect the loss
            first = first or ranking
            candidates = list(ranking) if 1 in blocks else []
            if splits or clusters:
                chosen = {r.matrix: left[r.matrix] for r in ranking.best()[:num_candidates]}
                backwards += 1
                try:
                    again = rank_matrices(model, batches, chosen, blocks=splits, clusters=clusters, **options)
                except NoGradient:  # in the best ones; all others are predicted to make the model worse
                    if not candidates:
                        break
                else:
                    candidates = sorted([*candidates, *again], key=lambda reduction: -(reduction.predicted or 0.0))
            if not candidates:
                raise ValueError("blocks and clusters: no matrix has that many rows")
            measured = [trial.measure(reduction, best) for reduction in candidates[:num_candidates]]
            history.append(measured)
            kept = max(measured, key=lambda reduction: _gain(reduction))
            bar.update()
            if not _gain(kept) > 0:
                break
            best += _gain(kept)
            trial.keep(kept)
            plan.append(kept)
            del left[kept.matrix]
    reduced = reduce(model, plan, factored=factored, decompositions=trial.decompositions)
    reduced.report = {
        "backwards": backwards,
        "evaluations": trial.count,
        "before": before,
        "after": best,
        "candidates": history,
        "ranking": list(first or ()),
    }
    return reduced


def search(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    rhos: Sequence[float] = RHOS,
    names: Iterable[str] | None = None,
    max_matrices: int = 3,
    factored: bool = True,
    progress: bool = True,
) -> Reduced:
    """Reduce the rank of matrices where that improves the model, found by evaluating every matrix at every rho.

    The original, exhaustive search: each reduction is evaluated separately; then, starting with the best, each is added
    if it improves the model further, up to `max_matrices` matrices.

    Args:
        model, rhos, names, max_matrices, factored, progress: as in `adapt`.
        evaluate: as in `adapt`, over data of its own; called at least len(rhos) times per matrix.

    Returns:
        Reduced, as from `adapt`; `.report` has "evaluations", "before", "after" and "candidates", all reductions with
        their measured gains.

    Raises:
        ValueError: as `adapt`. The model is unchanged then.

    Source: LASER (Sharma et al., arXiv 2312.13558). Each decomposition is computed once for all rhos.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> x = torch.randn(16, 8)
        >>> reduced = sk.methods.laser.search(model, lambda model: -float(model(x).square().mean()), rhos=(0.5, 0.1))
        >>> len(reduced.report["candidates"]), reduced.report["after"] > reduced.report["before"]
        (4, True)
    """
    if max_matrices < 1:
        raise ValueError(f"max_matrices must be at least 1, got {max_matrices}")
    found = targets(model, names)
    trial = _Trial(model, found, evaluate)
    every = [Reduction(label, rho) for label in found for rho in sorted(rhos, reverse=True)]
    if not every:
        raise ValueError("rhos is empty")
    plan: list[Reduction] = []
    with trial, tqdm(total=len(every), desc="search", unit="reduction", disable=not progress, leave=False) as bar:
        before = best = trial.start()
        measured = []
        for reduction in every:
            measured.append(trial.measure(reduction, before))
            bar.update()
        for reduction in sorted(measured, key=lambda reduction: -_gain(reduction)):
            if len(plan) == max_matrices or not _gain(reduction) > 0:
                break
            if reduction.matrix in [kept.matrix for kept in plan]:
                continue
            together = trial.measure(reduction, best) if plan else reduction
            if _gain(together) > 0:
                best += _gain(together)
                trial.keep(together)
                plan.append(together)
    reduced = reduce(model, plan, factored=factored, decompositions=trial.decompositions)
    reduced.report = {"evaluations": trial.count, "before": before, "after": best, "candidates": measured}
    return reduced


def _gain(reduction: Reduction) -> float:
    assert reduction.measured is not None
    return reduction.measured


def _minus_loss(batches: Sequence[Batch], loss: Loss | None) -> Evaluate:
    sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]

    def evaluate(model: nn.Module) -> float:
        device = next(model.parameters()).device
        losses = [(loss or default_loss)(model, to_device(batch, device)) for batch in batches]
        return -sum(float(x) * size for x, size in zip(losses, sizes, strict=True)) / sum(sizes)

    return evaluate


class _Trial:
    """Evaluates a model with reductions applied temporarily; kept ones stay applied until the context is left.

    The tensors inside parameters are exchanged: the originals are never written, and their versions do not change.
    """

    def __init__(self, model: nn.Module, found: Mapping[str, Matrix], evaluate: Evaluate) -> None:
        refuse_train_only(model)
        self.model, self.evaluate, self.matrices = model, evaluate, dict(found)
        self.decompositions = Decompositions()
        self.count = 0
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def value(self) -> float:
        with in_eval_mode(self.model), torch.no_grad():
            found = float(self.evaluate(self.model))
        self.count += 1
        return found

    def start(self) -> float:
        """The value of the unchanged model. Raises ValueError if it is not finite."""
        found = self.value()
        if not math.isfinite(found):
            raise ValueError(f"evaluate must return a finite number for the model as it is, got {found}")
        return found

    def measure(self, reduction: Reduction, before: float) -> Reduction:
        """The reduction, with its gain over `before`; minus infinity if that is not finite."""
        with self._with(reduction):
            gain = self.value() - before
        return replace(reduction, measured=gain if math.isfinite(gain) else -math.inf)

    def keep(self, reduction: Reduction) -> None:
        parameter, data = self._reduced(reduction)
        self._kept.append((parameter, parameter.data))
        parameter.data = data

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, data in reversed(self._kept):
            parameter.data = data

    @contextmanager
    def _with(self, reduction: Reduction) -> Iterator[None]:
        parameter, data = self._reduced(reduction)
        original, parameter.data = parameter.data, data
        try:
            yield
        finally:
            parameter.data = original

    def _reduced(self, reduction: Reduction) -> tuple[nn.Parameter, Tensor]:
        matrix = self.matrices[reduction.matrix]
        parameter = self.model.get_parameter(matrix.parameter)
        data = parameter.data.clone(memory_format=torch.preserve_format)
        pieces = self.decompositions.pieces(self.model, matrix, reduction.split, reduction.rho)
        matrix.write_(data, product(matrix, pieces))
        return parameter, data
