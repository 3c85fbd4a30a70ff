"""What the studies compare: ways to choose what is trained, LoRA and its relatives, and dense training."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.common.names import default_targets

from ..finetuning.methods import add_adapters
from ..translating.prompts import Batch
from .tasks import Task

BLOCK = (64, 64)
HEAD_RATE = 1e-2  # of a new head, for every contender: the best of three for dense training in `accuracy`
LOW_RANK = 32  # of the approximation whose largest entries are the principal weights
FISHER_BATCHES, GRADIENT_BATCHES = 8, 4
ADAPTERS = ("lora", "dora", "shira", "tokens")  # PEFT


@dataclass(frozen=True)
class Contender:
    """What is trained, and the middle of the rates that are tried.

    Attributes:
        choice: "dense"; of `ADAPTERS`; "rows", of the embedding; else how entries of the projections are chosen:
            "random", "sift" (gradients), "fish" (Fisher information), "ird", "magnitude", "relative" (gradients over
            weights), "principal" (the largest entries of a low-rank approximation).
        budget: "matrix", the same density in each; or "model", the best of all.
        every: steps after which entries are re-selected; 0 for never.
    """

    choice: str
    lr: float
    granularity: str = "element"
    density: float = 0.0
    rank: int = 0
    budget: str = "matrix"
    every: int = 0

    @property
    def sparse(self) -> bool:
        return self.choice != "dense" and self.choice not in ADAPTERS


@dataclass
class Prepared:
    """A model made ready to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tuned: sk.SparseModel | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def bytes_to_ship(self) -> int:
        """Of a Delta: values and positions; otherwise 4 for each trained weight."""
        return self.tuned.delta().nbytes if self.tuned else 4 * sum(p.numel() for p in self.parameters)


def prepare(
    contender: Contender, task: Task, model: nn.Module, given: Sequence[Batch], rate: float, seed: int
) -> Prepared:
    """The model is changed to train what the contender does, and that alone."""
    head, tuned = task.head(model), None
    if contender.sparse:
        whole = {name: sk.Index.full(model.get_parameter(name).shape) for name in head}
        tuned = sk.train_only(model, select(contender, model, given, seed) | sk.Selection(whole))
        parameters = dict(tuned.named_parameters())
    else:
        if contender.choice in ADAPTERS:
            adapt(contender, model, head, given, seed)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in head], "lr": rate},
        {"params": [p for name, p in parameters.items() if name in head], "lr": HEAD_RATE},
    ]
    groups = [group for group in groups if group["params"]]
    if tuned is not None:
        return Prepared(model, sk.SparseAdamW(groups, weight_decay=0.0), tuned)
    return Prepared(model, torch.optim.AdamW(groups, weight_decay=0.0, fused=True))


def adapt(contender: Contender, model: nn.Module, head: Sequence[str], given: Sequence[Batch], seed: int) -> None:
    """Adapters of PEFT in the projections; of "tokens" in the embedding."""
    if contender.choice == "lora":
        add_adapters(model, head, contender.rank, seed)
        return
    import peft

    torch.manual_seed(seed)
    modules = [name.removesuffix(".weight") for name in default_targets(model)]
    config: Any
    if contender.choice == "dora":
        config = peft.LoraConfig(r=contender.rank, lora_alpha=2 * contender.rank, target_modules=modules, use_dora=True)
    elif contender.choice == "shira":
        config = peft.ShiraConfig(r=contender.rank, target_modules=modules, random_seed=seed)
    else:
        name, index = next(iter(frequent_rows(contender, model, given).items()))
        rows = index.positions.tolist()
        config = peft.TrainableTokensConfig(token_indices=rows, target_modules=[name.removesuffix(".weight")])
    peft.inject_adapter_in_model(config, model)
    for name in head:
        model.get_parameter(name).requires_grad_(True)


def select(contender: Contender, model: nn.Module, given: Sequence[Batch], seed: int) -> sk.Selection:
    """Entries or units of the projections, or rows of the embedding. The model is one that train_only has not seen."""
    if contender.choice == "rows":
        return frequent_rows(contender, model, given)
    names = default_targets(model)
    units: dict[str, Any] = {"granularity": contender.granularity}
    if contender.granularity == "block":
        units["block"] = BLOCK
    per_tensor = contender.budget == "matrix"
    if contender.choice == "random":
        return sk.Selection.random(model, contender.density, seed=seed, names=names, **units)
    if contender.choice == "sift" and per_tensor:
        return sk.methods.sift(
            model,
            given,
            contender.density,
            targets=names,
            head=(),
            num_batches=GRADIENT_BATCHES,
            progress=False,
            **units,
        )
    if contender.choice == "ird":
        share = sum(model.get_parameter(name).numel() for name in names) / sum(p.numel() for p in model.parameters())
        samples = given[:FISHER_BATCHES]
        return sk.methods.ird(model, samples, contender.density * share, targets=names, head=(), progress=False)
    scores = scores_of(contender.choice, model, names, given)
    return sk.Selection.topk(scores, density=contender.density, per_tensor=per_tensor, **units)


def scores_of(choice: str, model: nn.Module, names: Sequence[str], given: Sequence[Batch]) -> dict[str, Tensor]:
    """Name of a projection -> scores of its entries; larger ones are chosen first."""
    weights = {name: model.get_parameter(name).detach() for name in names}
    if choice == "fish":
        fisher = sk.fisher_diagonal(model, given[:FISHER_BATCHES], names=names, progress=False)
        # The Fisher information of a unit is the sum over its entries: topk sums squares.
        return {name: total.sqrt_() for name, total in fisher.items()}
    if choice == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    if choice == "principal":
        found = sk.factorize(list(weights.values()), LOW_RANK)
        factors = [each.truncated(LOW_RANK) for each in found]
        return {name: (up @ down).abs_() for name, (up, down) in zip(names, factors, strict=True)}
    gradients = summed_gradients(model, names, given[:GRADIENT_BATCHES])
    if choice == "relative":
        # Weights of zero come first, and of these those with the largest gradient.
        tiny = torch.finfo(torch.float32).tiny
        return {name: grad.abs_().div_(weights[name].abs() + tiny) for name, grad in gradients.items()}
    return {name: grad.abs_() for name, grad in gradients.items()}


def summed_gradients(model: nn.Module, names: Sequence[str], given: Sequence[Batch]) -> dict[str, Tensor]:
    """Of the loss, summed over batches, in the mode that the model is in."""
    weights = [model.get_parameter(name) for name in names]
    totals = [torch.zeros_like(weight) for weight in weights]
    for batch in given:
        for total, grad in zip(totals, torch.autograd.grad(model(**batch).loss, weights), strict=True):
            total += grad
    return dict(zip(names, totals, strict=True))


def frequent_rows(contender: Contender, model: nn.Module, given: Sequence[Batch]) -> sk.Selection:
    """Rows of the embedding for the tokens that training texts have most, in number a share of the projections."""
    (name, table), *_ = ((n, p) for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)  # type: ignore[operator]
    size = sum(model.get_parameter(target).numel() for target in default_targets(model))
    count = round(contender.density * size / table.shape[1])
    tokens = itertools.chain.from_iterable(
        batch["input_ids"][batch["attention_mask"].bool()].tolist() for batch in given
    )
    rows = sorted(token for token, _ in Counter(tokens).most_common(count))
    return sk.Selection({name: sk.Index(torch.tensor(rows), table.shape, granularity="row")})


def reselect(contender: Contender, prepared: Prepared, copy: nn.Module, given: Sequence[Batch], seed: int) -> None:
    """Train another selection from now on; what leaves keeps what it learned. `copy` is a model of the same kind."""
    assert prepared.tuned is not None
    copy.load_state_dict(prepared.model.state_dict())
    projections = set(default_targets(copy))
    kept = {name: index for name, index in prepared.tuned.selection.items() if name not in projections}
    chosen = select(contender, copy.train(), given, seed) | sk.Selection(kept)
    prepared.tuned.reselect(chosen, prepared.optimizer, restore=False)
