"""The fine-tuning methods that can be compared. To add one: write a `prepare_*` function and a row of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.common.names import default_head, default_targets
from sparsekernels.methods.fisher_search import take

from .config import Config
from .text_task import Batch

if TYPE_CHECKING:
    from sparsekernels.training.train_only import SparseModel

RANK = 16  # of LoRA


@dataclass
class Prepared:
    """A model made ready to train: what trains, by which optimizer, and for a sparse method its `SparseModel`."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    head: set[str]
    tuned: SparseModel | None = None
    gradient_curve: list[tuple[float, float]] | None = None
    shrinking: list[dict[str, Any]] | None = None
    head_apart: bool = False  # whether the head is what else is trained beside the method's own

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


def prepare_lora(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    head = set(default_head(model))
    parameters = add_adapters(model, head, RANK, config.seed)
    optimizer = torch.optim.AdamW(groups(parameters, head, config), fused=True)
    return Prepared(parameters, optimizer, head, head_apart=True)


def add_adapters(model: nn.Module, head: Iterable[str], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """What trains: PEFT's LoRA in the projections that SIFT selects from, and the head."""
    import peft

    modules = [name.removesuffix(".weight") for name in default_targets(model)]
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules), model)
    for name in head:
        model.get_parameter(name).requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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


def prepare_columns(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    return sparse(model, sk.methods.random_mask(model, config.density, seed=config.seed), config)


def prepare_fish(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    chosen = sk.methods.fish(model, batches, config.density, num_samples=config.samples)
    return sparse(model, chosen, config)


def prepare_ird(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    chosen = sk.methods.ird(model, take(batches, config.samples), config.density)
    return sparse(model, chosen, config, history=chosen.report["history"])


def prepare_reversed(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    """As many entries as FISH selects, those with the smallest Fisher information.

    Where it is zero, as for rows of the embedding that no text looks up, the first come: little but the head trains.
    """
    head = set(default_head(model))
    chosen = sk.methods.fish(model, batches, config.density, num_samples=config.samples)
    names = [name for name, _ in model.named_parameters() if name not in head]
    fisher = sk.fisher_diagonal(model, take(batches, config.samples), names=names)
    count = sum(index.numel for name, index in chosen.items() if name not in head)
    smallest = sk.Selection.topk({name: -total for name, total in fisher.items()}, count)
    heads = sk.Selection({name: index for name, index in chosen.items() if name in head})
    return sparse(model, smallest | heads, config)


def prepare_uniform(model: nn.Module, batches: list[Batch], config: Config) -> Prepared:
    """As many entries as FISH selects, drawn uniformly over all that compete there."""
    parameters, head = dict(model.named_parameters()), set(default_head(model))
    count = int(config.density * sum(map(Tensor.numel, parameters.values())))
    count -= sum(parameters[name].numel() for name in head)
    if count < 1:
        raise ValueError(f"density {config.density} leaves no weights beside the head's")
    generator = torch.Generator().manual_seed(config.seed)
    scores = {n: torch.rand(p.shape, generator=generator) for n, p in parameters.items() if n not in head}
    heads = sk.Selection({name: sk.Index.full(parameters[name].shape) for name in head})
    return sparse(model, sk.Selection.topk(scores, count) | heads, config)


def sparse(
    model: nn.Module,
    selection: sk.Selection,
    config: Config,
    curve: list[tuple[float, float]] | None = None,
    history: list[dict[str, Any]] | None = None,
) -> Prepared:
    """Train a selection with `SparseAdamW`."""
    head = set(default_head(model))
    tuned = sk.train_only(model, selection)
    parameters = dict(tuned.named_parameters())
    optimizer = sk.SparseAdamW(groups(parameters, head, config))
    return Prepared(parameters, optimizer, head, tuned, curve, history, head_apart=True)


METHODS: dict[str, Method] = {
    "dense": Method(prepare_dense, 1e-4, "every weight, torch.optim.AdamW(fused=True)"),
    "lora": Method(prepare_lora, 3e-3, f"PEFT LoRA, r={RANK}, in the projections that sift selects from, and the head"),
    "sift": Method(prepare_sift, 1e-3, "the largest gradients of the first batch, and the head", sparse=True),
    "columns": Method(prepare_columns, 1e-2, "random columns, as random_mask selects them, and the head", sparse=True),
    "random": Method(prepare_random, 1e-2, "as many random elements as sift selects, and the head", sparse=True),
    "fish": Method(prepare_fish, 3e-3, "the largest Fisher information over all tensors, and the head", sparse=True),
    "ird": Method(prepare_ird, 3e-3, "the same, over samples that are selected by it too", sparse=True),
    "reversed": Method(prepare_reversed, 3e-3, "the smallest Fisher information, and the head", sparse=True),
    "uniform": Method(prepare_uniform, 9e-3, "a random mask over all tensors, and the head", sparse=True),
    "head": Method(prepare_head, None, "the head alone: classifier and, where the model has one, pooler"),
}


def name_of(config: Config) -> str:
    """What a run is called in tables and files."""
    if config.method == "lora":
        return f"LoRA r={RANK} (PEFT)"
    return f"{config.method} {100 * config.density:g}%" if METHODS[config.method].sparse else config.method
