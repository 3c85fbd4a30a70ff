"""Selections that follow one another, and AdamW of every weight by itself as the oracle of training across them."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from samples.case import put, take
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

SHAPES = {"up.weight": (32, 16), "embed.weight": (61, 16), "norm.bias": (16,), "experts.weight": (3, 16, 16)}


def selection(number: int) -> Selection:
    """Elements and rows of changing tensors, every other time in another order."""
    names = [name for i, name in enumerate(SHAPES) if (i + number) % 4]
    chosen = dict(Selection.random(SHAPES, 0.4, seed=number, names=names))
    for name in names:
        if name != "norm.bias" and (number + len(name)) % 3 == 0:
            shape = SHAPES[name]
            chosen[name] = Index(torch.arange(number % 2, shape[0], 2), shape, granularity="row")
    return Selection({name: chosen[name] for name in (names if number % 2 else reversed(names))})


def by_elements(chosen: Selection) -> Selection:
    return Selection({name: index.to_elements() for name, index in chosen.items()})


def pick(positions: list[int], shape: Iterable[int] = (1, 4), name: str = "0.weight") -> Selection:
    return Selection({name: Index(torch.tensor(positions), shape)})


class Oracle:
    """AdamW of every selected weight by itself, in fp64 and with a step count of its own."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, amsgrad: bool) -> None:
        self.base = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        self.weights = {name: value.clone() for name, value in self.base.items()}
        zeros = {name: torch.zeros_like(value) for name, value in self.base.items()}
        self.state = [copy.deepcopy(zeros) for _ in range(4)]  # exp_avg, exp_avg_sq, the largest of that, age
        self.masks = {name: value.bool() for name, value in zeros.items()}
        self.lr, self.weight_decay, self.amsgrad = lr, weight_decay, amsgrad

    def select(self, chosen: Selection, restore: bool) -> None:
        for name, mask in self.masks.items():
            now = torch.zeros_like(mask)
            if name in chosen:
                now = put(now, chosen[name], torch.ones(chosen[name].compact_shape, dtype=torch.bool))
            for table in self.state:
                table[name][~(mask & now)] = 0
            if restore:
                gone = mask & ~now
                self.weights[name][gone] = self.base[name][gone]
            self.masks[name] = now

    def step(self, grads: dict[str, Tensor]) -> None:
        for name, mask in self.masks.items():
            w, g = self.weights[name], grads[name].double()
            m, v, largest, step_count = (table[name] for table in self.state)
            step_count += mask
            m.copy_(torch.where(mask, 0.9 * m + 0.1 * g, m))
            v.copy_(torch.where(mask, 0.999 * v + 0.001 * g * g, v))
            torch.maximum(largest, v, out=largest)
            second = largest if self.amsgrad else v
            update = m / (1 - 0.9**step_count) / ((second / (1 - 0.999**step_count)).sqrt() + 1e-8)
            w.copy_(torch.where(mask, w * (1 - self.lr * self.weight_decay) - self.lr * update, w))


def random_grads(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in weights(model)}


def weights(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, p.shape) for name, p in model.named_parameters() if not name.endswith("_values")]


def stepped(tuned: sk.SparseModel, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, Tensor]:
    grads = random_grads(tuned.model, seed)
    for name, values in tuned.named_parameters():
        values.grad = take(grads[name], tuned.selection[name]).to(values.dtype)
    optimizer.step()
    return grads
