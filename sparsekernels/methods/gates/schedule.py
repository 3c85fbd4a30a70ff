"""Which gates close, and when: importance, the share to be removed at each step, and the threshold that removes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DECAY = 0.97  # of the running mean of squared gradients, per step


@dataclass(frozen=True)
class Schedule:
    """Shares of the training steps: gates close from `begin` to `end`, and are frozen from `freeze_from`.

    In between, the wanted share grows as 1 - (1 - t)^3 (Zhu and Gupta, arXiv 1710.01878): fast while there are many
    gates that do no harm.
    """

    total_steps: int
    pruning_ratio: float
    begin: float = 0.1
    end: float = 0.5
    freeze_from: float = 0.8

    def wanted(self, step: int) -> float:
        """The share to be removed after `step` steps."""
        t = (step / self.total_steps - self.begin) / (self.end - self.begin)
        return self.pruning_ratio * (1 - (1 - min(1.0, max(0.0, t))) ** 3)

    def freezes(self, step: int) -> bool:
        """Whether gates are frozen after `step` steps."""
        return step >= self.freeze_from * self.total_steps


class Importance:
    """The cost in loss of closing each gate, per element saved: g^2 / elements, with g the gradient by the gate.

    The mean of g^2 over batches is, up to a factor, the diagonal of the Fisher information of the gates; half of it is
    the second-order estimate of the loss that closing one adds. It is averaged over the steps in which the gate was
    drawn open, and kept while it is closed.
    """

    def __init__(self, elements: Tensor) -> None:
        self.elements = elements  # [gates]: parameters removed with each gate, if it alone is closed
        self.squares = torch.full_like(elements, torch.inf)  # until a backward has reached the gate
        self.seen = torch.zeros_like(elements)

    def add(self, gradients: Tensor) -> None:
        """Add one step's gradients by the values of the gates: 0 for those drawn closed, NaN where no backward came."""
        reached = gradients.isfinite()
        squares = self.squares.masked_fill(reached & self.squares.isinf(), 0)
        drawn = reached & (gradients != 0)
        self.squares = torch.where(drawn, squares * DECAY + (1 - DECAY) * gradients.square(), squares)
        self.seen = torch.where(drawn, self.seen * DECAY + (1 - DECAY), self.seen)

    def values(self) -> Tensor:
        """[gates]; infinite for those never measured, 0 for those whose gradients were all 0."""
        return self.squares / self.seen.clamp_min(1e-30) / self.elements


def closing_order(scores: Tensor, layers: Tensor, first: Tensor | None = None) -> Tensor:
    """The gates in the order in which they close: by score, those never measured last.

    Gates with equal scores are interleaved over layers: at any point every layer has closed the same share of them, in
    their order within the layer, so that a tie never decides over a whole layer. Ours.

    Args:
        scores ([gates], >= 0): infinite if never measured.
        layers ([gates], integers): the layer of each gate.
        first ([gates], bool): those that close before all other measured ones.
    """
    score, layer = scores.numpy(), layers.numpy()
    order = np.lexsort((score, layer))
    new = np.ones(len(order), np.bool_)
    new[1:] = (np.diff(layer[order]) != 0) | (score[order[1:]] != score[order[:-1]])
    starts, tie = np.flatnonzero(new), np.cumsum(new) - 1
    counts = np.diff(starts, append=len(order))
    turn = np.empty(len(order))
    turn[order] = (np.arange(len(order)) - starts[tie] + 0.5) / counts[tie]
    later = np.zeros(len(order), np.bool_) if first is None else ~first.numpy()
    return torch.from_numpy(np.lexsort((turn, score, later, np.isinf(score))))


def threshold(scores: Tensor, order: Tensor, removed: Callable[[Tensor], float], share: float) -> tuple[float, Tensor]:
    """Close as few gates as needed to remove the share, in this order; those never measured stay open in any case.

    Args:
        scores ([gates], >= 0).
        order ([gates]): from `closing_order`.
        removed: function from a mask of open gates to the share of the elements removed; grows as gates close.
        share: minimum share to remove.

    Returns:
        The threshold: the score of the first gate that stays open, infinite if none does or if the share is out of
        reach; and the mask [gates] of the gates that stay open.
    """

    def stays(closed: int) -> Tensor:
        mask = torch.ones(len(order), dtype=torch.bool)
        mask[order[:closed]] = False
        return mask

    low, high = 0, int(scores.isfinite().sum())
    while low < high:
        middle = (low + high) // 2
        if removed(stays(middle)) < share:
            low = middle + 1
        else:
            high = middle
    return float(scores[order[low]]) if low < len(order) else torch.inf, stays(low)
