"""The parts of `Gates`: vectors of gates, their penalty, and the original state of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.gated import Gating
from ...ops import gate_probabilities

# By kind: the largest logit, of an open gate; the smallest, of a shut one; the learning rate. At either limit the
# default noise changes a gate in less than one draw of 500 (finegates, whose tanh is below 1: more often).
OPEN = {"stg": 2.0, "finegates": 1.5, "hard_concrete": 8.0}
SHUT = {"stg": -2.0, "finegates": -1.5, "hard_concrete": -8.0}
PUBLISHED_SIGMA = 0.5  # in FineGates' penalty
RATES = {"stg": 0.1, "finegates": 0.08, "hard_concrete": 0.4}


@dataclass(frozen=True)
class Vector:
    """The gates of one side of a layer: `count` of them from `start` in the vector of all, `group` positions each."""

    layer: str
    side: str  # "rows" or "columns"
    start: int
    count: int
    group: int


@dataclass(frozen=True)
class Original:
    """The original state of a parameter: whether it was trained, and its value if it is trained now."""

    parameter: nn.Parameter
    trained: bool
    value: Tensor | None

    def put_back(self) -> None:
        self.parameter.requires_grad_(self.trained)
        self.parameter.grad = None
        if self.value is not None:
            with torch.no_grad():
                self.parameter.copy_(self.value)


def distance(logits: Sequence[Tensor], keep: float) -> Tensor:
    """The mean over vectors of |mean P(open) - keep|, as FineGates has it: with a noise that is not the gates'."""
    means = [torch.special.ndtr((torch.tanh(each) + 0.5) / PUBLISHED_SIGMA).mean() for each in logits]
    return (torch.stack(means) - keep).abs().mean()


class Wrong(torch.autograd.Function):
    """Sum over gates of |weight| times the probability of the state that the weight's sign penalises."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, gating: Gating, *logits: Tensor) -> Tensor:
        share, slopes = gate_probabilities(logits, kind=gating.kind, noise=gating.noise)
        ctx.sizes = [len(each) for each in logits]
        ctx.save_for_backward(weights * slopes)
        return (weights.clamp_min(0) * share - weights.clamp_max(0) * (1 - share)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, *(grads[0] * gradient).split(ctx.sizes)
