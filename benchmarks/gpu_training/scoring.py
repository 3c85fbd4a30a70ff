"""Methods that score weights by passes over samples: LASER beside a plain backward, FISH, IRD, and KS-Lottery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.methods import laser
from sparsekernels.methods.laser.decompositions import Split

from ..kernels.case import WrongResult
from .llama import Shape, causal_loss, make_batches, make_model
from .steps import Run, finite, once

DENSITY = 0.005  # of FISH and IRD


@dataclass(frozen=True)
class Samples:
    """Batches of samples of equal length."""

    shape: Shape
    batches: int
    size: int
    length: int

    @property
    def count(self) -> int:
        return self.batches * self.size

    @property
    def tokens(self) -> int:
        return self.count * self.length

    def make(self) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        return make_model(self.shape), make_batches(self.shape, self.batches, self.size, self.length)


def plain_backward(samples: Samples) -> Run:
    """Forward and backward over all samples, with the gradient of every weight, and no step."""
    model, batches = samples.make()

    def call() -> Tensor:
        total = torch.zeros((), device=batches[0]["input_ids"].device)
        for batch in batches:
            loss = causal_loss(model, batch)
            loss.backward()
            total += loss.detach()
        model.zero_grad()
        return total

    return Run(call, finite)


def laser_rank(samples: Samples) -> Run:
    """laser.rank of every matrix at every default rho; the decompositions that it needs are made before."""
    model, batches = samples.make()
    found, kept = sk.matrices(model), laser.Decompositions()
    _, decomposing = once(lambda: kept.of(model, [(matrix, Split(1, False)) for matrix in found.values()], 1.0))

    def check(rankings: list[laser.Ranking]) -> None:
        for ranking in rankings:
            if len(ranking) != len(found) * len(laser.RHOS):
                raise WrongResult(f"{len(ranking)} reductions of {len(found)} matrices")
            if not all(math.isfinite(reduction.predicted or 0.0) for reduction in ranking):
                raise WrongResult("a predicted gain is not finite")

    return Run(
        lambda: laser.rank(model, batches, loss=causal_loss, decompositions=kept, progress=False),
        check,
        {"SVDs of all matrices": decomposing},
    )


def fish(samples: Samples) -> Run:
    model, batches = samples.make()
    return Run(
        lambda: sk.methods.fish(model, batches, DENSITY, num_samples=None, progress=False),
        lambda selections: _check_size(selections, samples.shape),
    )


def ird(samples: Samples) -> Run:
    model, batches = samples.make()
    return Run(
        lambda: sk.methods.ird(model, batches, DENSITY, progress=False),
        lambda selections: _check_size(selections, samples.shape),
    )


def _check_size(selections: list[sk.Selection], shape: Shape) -> None:
    for selection in selections:
        if selection.numel != int(DENSITY * shape.weights):
            raise WrongResult(f"{selection.numel} elements of {shape.weights} are selected")


def embed_tune(samples: Samples) -> Run:
    """A step for each batch, by the model's own loss: a tied table trains through the head too."""
    model, batches = samples.make()

    def call() -> Tensor:
        tuned = sk.methods.ks_lottery.embed_tune(model, batches, epochs=1, progress=False)
        ((_, values),) = tuned.named_parameters()
        total = values.detach().sum()
        tuned.restore()
        return total

    return Run(call, finite)


def ks_lottery(samples: Samples) -> Run:
    model, batches = samples.make()
    tuned = sk.methods.ks_lottery.embed_tune(model, batches, epochs=1, progress=False)

    def check(selections: list[Any]) -> None:
        for selection in selections:
            p = selection.report["pvalues"]
            if len(p) != samples.shape.vocab or not bool(((p >= 0) & (p <= 1)).all()):
                raise WrongResult("p-values are not between 0 and 1, one a row")
            if not bool((selection.report["statistics"] > 0).any()):
                raise WrongResult("tuning moved no row")

    return Run(lambda: sk.methods.ks_lottery.select(tuned, fallback_density=0), check)
