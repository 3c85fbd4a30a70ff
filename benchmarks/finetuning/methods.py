"""The fine-tuning methods that can be compared. To add one: write a `prepare_*` function and a row of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import sparsekernels as sk
from sparsekernels.methods.sift import default_head

from .text_task import Batch

if TYPE_CHECKING:
    from sparsekernels.sparsify import SparseModel

    from .training import Config


@dataclass
class Prepared:
    """A model made ready to train: what trains, by which optimizer, and for a sparse method its `SparseModel`."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    head: set[str]
    tuned: SparseModel | None = None
    gradient_curve: list[tuple[float, float]] | None = None

    def extra_bytes(self, *, head: bool) -> int:
        """Bytes a sparse method keeps beside gradients and optimizer state: master values, positions, originals."""
        slots = self.tuned.slots if self.tuned else {}
        return sum(
            slot.values.nbytes + slot.index.positions.nbytes + slot.originals.nbytes
            for name, slot in slots.items()
            if (name in self.head) == head
        )


@dataclass(frozen=True)
class Method:
    """A row of the registry. ``lr`` is the default learning rate outside the head, None if nothing else trains."""

    prepare: Callable[[nn.Module, list[Batch], Config], Prepared]
    lr: float | None
    help: str
    sparse: bool = False


def groups(parameters: dict[str, nn.Parameter], head: set[str], config: Config) -> list[dict[str, Any]]:
    """Optimizer groups, one rule for every method: the head has its own rate, biases and norms do not decay."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = not (name.endswith("bias") or "norm" in name.lower())
        key = (config.head_lr if name in head else config.lr, config.weight_decay if decays else 0.0)
        found.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in found.items()]


def prepare_dense(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    parameters, head = dict(model.named_parameters()), set(default_head(model))
    return Prepared(parameters, torch.optim.AdamW(groups(parameters, head, config), fused=True), head)


def prepare_head(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    head = set(default_head(model))
    if not head:
        raise ValueError("--method head: the model has no task head (classifier, score, pooler ...) to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    parameters = {name: p for name, p in model.named_parameters() if name in head}
    return Prepared(parameters, torch.optim.AdamW(groups(parameters, head, config), fused=True), head)


def prepare_sift(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    selection = sk.methods.sift(model, batches, config.density)
    return sparse(model, selection, config, selection.report["curve"])


def prepare_random(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    """As many positions of each tensor as SIFT selects, drawn uniformly; the same dense head."""
    head, chosen = set(default_head(model)), sk.methods.sift(model, batches, config.density)
    generator = torch.Generator().manual_seed(config.seed)
    indices = {}
    for name, index in chosen.items():
        drawn = torch.randperm(index.shape.numel(), generator=generator)[: len(index)].sort().values
        indices[name] = index if name in head else sk.Index(drawn, index.shape)
    return sparse(model, sk.Selection(indices), config)


def sparse(
    model: nn.Module, selection: sk.Selection, config: Config, curve: list[tuple[float, float]] | None = None
) -> Prepared:
    """Train a selection with `SparseAdamW`."""
    head = set(default_head(model))
    tuned = sk.sparsify(model, selection)
    parameters = dict(tuned.named_parameters())
    return Prepared(parameters, sk.SparseAdamW(groups(parameters, head, config)), head, tuned, curve)


METHODS: dict[str, Method] = {
    "dense": Method(prepare_dense, 1e-4, "every weight, torch.optim.AdamW(fused=True)"),
    "sift": Method(prepare_sift, 1e-3, "the largest gradients of the first batch, and the head", sparse=True),
    "random": Method(prepare_random, 1e-3, "a random mask of the same size, and the head", sparse=True),
    "head": Method(prepare_head, None, "the head alone: classifier and, where the model has one, pooler"),
}
