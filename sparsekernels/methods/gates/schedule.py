"""Which gates are to close, and when: importance of gates, the share that is to be removed by now, and its price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DECAY = 0.97  # of the running mean of squared gradients, a step


@dataclass(frozen=True)
class Schedule:
    """Shares of the training steps: nothing closes before `begin`, all is asked for by `end`, gates rest from `settle`.

    In between the share that is asked for grows as 1 - (1 - t)^3 (Zhu and Gupta, arXiv 1710.01878): fast while there is
    much that does no harm.
    """

    steps: int
    target: float
    begin: float = 0.1
    end: float = 0.5
    settle: float = 0.8

    def wanted(self, step: int) -> float:
        """The share to be removed after `step` steps."""
        t = (step / self.steps - self.begin) / (self.end - self.begin)
        return self.target * (1 - (1 - min(1.0, max(0.0, t))) ** 3)

    def settles(self, step: int) -> bool:
        """Whether gates become fixed after `step` steps."""
        return step >= self.settle * self.steps


class Importance:
    """What closing each gate would cost the loss, an element that it saves: g^2 / elements, g the gradient by the gate.

    The mean of g^2 over batches is, but for a factor, the diagonal of the Fisher information of the gates; half of it
    is the second-order estimate of what closing one adds to the loss. It is taken over the steps in which the gate was
    drawn open, and kept while it is closed.
    """

    def __init__(self, elements: Tensor) -> None:
        self.elements = elements  # [gates]: what goes with each gate, if nothing else does
        self.squares = torch.zeros_like(elements)
        self.seen = torch.zeros_like(elements)

    def add(self, gradients: Tensor) -> None:
        """Take in the gradients by the values of the gates, 0 for those that were drawn closed, of one step."""
        known = (gradients != 0) & gradients.isfinite()
        squares = self.squares * DECAY + (1 - DECAY) * gradients.square()
        self.squares = torch.where(known, squares, self.squares)
        self.seen = torch.where(known, self.seen * DECAY + (1 - DECAY), self.seen)

    def values(self) -> Tensor:
        """[gates]; 0 for a gate that never had a gradient."""
        return self.squares / self.seen.clamp_min(1e-30) / self.elements


def price(scores: Tensor, removed: Callable[[Tensor], float], share: float) -> tuple[float, Tensor]:
    """The lowest price at which enough is given up: gates with a score below it close.

    Args:
        scores ([gates], >= 0).
        removed: of a mask of open gates, the share of the elements that goes; grows as gates close.
        share: that is to go, at least.

    Returns:
        The price, and the mask [gates] of what stays open.
    """
    order = scores.sort().values
    low, high = 0, len(order)  # so many gates close
    while low < high:
        middle = (low + high) // 2
        threshold = order[middle] if middle < len(order) else order.new_tensor(torch.inf)
        if removed(scores >= threshold) < share:
            low = middle + 1
        else:
            high = middle
    threshold = order[low] if low < len(order) else order.new_tensor(torch.inf)
    return float(threshold), scores >= threshold
