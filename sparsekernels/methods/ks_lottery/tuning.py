"""The three tunings of KS-Lottery: the whole input embedding, the rows of a ticket, and a transfer without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...common.names import embedding_weight
from ...index import Index
from ...ops import gather
from ...optim import SparseAdamW, clip_grad_norm_
from ...scoring.losses import check_loss, default_loss
from ...selection import Selection
from ...training.delta import Delta, TensorDelta
from ...training.train_only import SparseModel, train_only
from .selecting import tables_of

Loss = Callable[[nn.Module, Any], Tensor]


def embed_tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    lr: float = 2e-5,
    epochs: int = 3,
    embedding: str | None = None,
    loss: Loss | None = None,
    max_grad_norm: float | None = None,
    progress: bool = True,
) -> SparseModel:
    """Train every row of the input embedding and no other parameter.

    The rows train as fp32 values, whatever the dtype of the table; `select` reads those. There is no weight decay, so
    rows of tokens that never occur do not change. A tied table trains through the output layer too, which gives every
    row a gradient.

    Args:
        model: any torch model; in train mode during training, in its own mode afterwards. Buffers that a forward in
            train mode updates (BatchNorm) are updated, and stay so.
        batches: batches in Hugging Face form (mappings of tensors with labels), or whatever `loss` accepts; iterated
            once per epoch: a list or a DataLoader.
        lr: of SparseAdamW, constant.
        epochs: number of passes over the batches.
        embedding: name of the table; default: the model's input embedding.
        loss: function of (model, batch); default `model(**batch).loss`.
        max_grad_norm: clip the gradient to this norm; default: no clipping.
        progress: show a progress bar.

    Returns:
        SparseModel: pass it to `select`, then `restore()` the parameters, bit for bit, or `merge()`.

    Raises:
        ValueError: numbers out of range, batches that are empty or can be iterated only once, no embedding found, a
            loss that is missing, is not a scalar with a gradient, or is not finite. The parameters are unchanged then.

    Cost: AdamW over the table: 16 B per element, and one fp32 gradient of the table. For your own training loop,
    `train_only(model, Selection({name: Index.full(shape)}))` is the equivalent.

    Source: KS-Lottery (Yuan et al., arXiv 2402.02801), as quoted by others (embedding only; lr, epochs). Ours: no
    decay, constant rate.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> options = {"embedding": "0.weight", "loss": lambda model, ids: model(ids).square().mean(), "lr": 0.1}
        >>> tuned = sk.methods.ks_lottery.embed_tune(model, [torch.tensor([[1, 2, 3], [3, 4, 3]])], **options)
        >>> tuned.selection["0.weight"]
        Index(6 rows of [6, 4])
        >>> model = tuned.restore()
    """
    name = embedding_weight(model, embedding)
    selection = Selection({name: Index.full(model.get_parameter(name).shape)})
    return _tune(model, selection, batches, "embed tuning", lr, epochs, loss, max_grad_norm, progress)


def partial_tune(
    model: nn.Module,
    selection: Selection,
    batches: Iterable[Any],
    *,
    lr: float = 1e-2,
    epochs: int = 5,
    loss: Loss | None = None,
    max_grad_norm: float | None = None,
    progress: bool = True,
) -> SparseModel:
    """Train the selected weights, such as the rows of a ticket, and no other parameter.

    Args:
        model, batches, lr, epochs, loss, max_grad_norm, progress: as in `embed_tune`.
        selection: what to train, by parameter name.

    Returns:
        SparseModel: `delta()` is the file to ship.

    Raises:
        ValueError: an empty selection, and as `embed_tune`.

    Source: KS-Lottery (Yuan et al., arXiv 2402.02801), as quoted by others (lr, epochs). Ours: no decay, constant rate.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> ticket = sk.Selection({"0.weight": sk.Index(torch.tensor([3]), (6, 4), granularity="row")})
        >>> loss = lambda model, ids: model(ids).square().mean()
        >>> sk.methods.ks_lottery.partial_tune(model, ticket, [torch.tensor([[1, 2, 3]])], loss=loss).delta()
        Delta(4 values in 1 tensors, 20 bytes)
    """
    if not selection.numel:
        raise ValueError("selection is empty: there is nothing to tune; raise alpha, or select rows with by_shift")
    return _tune(model, selection, batches, "partial tuning", lr, epochs, loss, max_grad_norm, progress)


def partial_transfer(tuned: SparseModel, selection: Selection) -> Delta:
    """Copy the selected rows out of an embed-tuned model, without any training.

    Args:
        tuned: from `embed_tune`, not yet restored; not changed.
        selection: rows of its embedding, as from `select`.

    Returns:
        Delta, to apply to the model after it is restored: `tuned.restore(); delta.apply(tuned.model)`.

    Raises:
        ValueError: the selection is empty, or is not of rows of the embedding. RuntimeError: `tuned` was restored or
            merged.

    Source: the definition is ours; the paper's was not available.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> loss = lambda model, ids: model(ids).square().mean()
        >>> options = {"embedding": "0.weight", "loss": loss}
        >>> tuned = sk.methods.ks_lottery.embed_tune(model, [torch.tensor([[1, 2, 3]])], **options)
        >>> ticket = sk.Selection({"0.weight": sk.Index(torch.tensor([3]), (6, 4), granularity="row")})
        >>> delta = sk.methods.ks_lottery.partial_transfer(tuned, ticket)
    """
    if len(selection) != 1:
        raise ValueError(f"selection must be rows of one table, got {len(selection)} tensors")
    ((name, index),) = selection.items()
    _, before, after, *_ = tables_of(tuned, None, name)
    if index.granularity != "row" or index.shape != before.shape:
        raise ValueError(f"selection must be rows of {name!r}, {list(before.shape)}, got {index}")
    here = index.to(before.device)
    return Delta({name: TensorDelta.of(here, gather(after, here).to(before.dtype), gather(before, here))})


def _tune(
    model: nn.Module,
    selection: Selection,
    batches: Iterable[Any],
    what: str,
    lr: float,
    epochs: int,
    loss: Loss | None,
    max_grad_norm: float | None,
    progress: bool,
) -> SparseModel:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
    if isinstance(batches, Iterator):
        raise ValueError("batches is an iterator, which the first epoch exhausts; pass a list or a DataLoader")
    modes = [(module, module.training) for module in model.modules()]
    tuned = train_only(model, selection)
    try:
        optimizer = SparseAdamW(tuned.parameters(), lr=lr, weight_decay=0)
        model.train()
        steps = 0
        bar = tqdm(total=_length(batches, epochs), desc=what, unit="step", disable=not progress, leave=False)
        with torch.enable_grad(), bar:
            for epoch in range(epochs):
                before = steps
                for batch in batches:
                    value = (loss or default_loss)(model, batch)
                    check_loss(value, "the trained rows", f"step {steps}", "; lower lr, or look at that batch")
                    value.backward()
                    if max_grad_norm is not None:
                        clip_grad_norm_(tuned.parameters(), max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += 1
                    bar.update()
                    bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
                if steps == before:
                    again = " a second time; pass a list or a DataLoader" if epoch else ""
                    raise ValueError(f"batches is empty{again}")
    except BaseException:
        tuned.restore()
        raise
    finally:
        for module, training in modes:
            module.training = training
    return tuned


def _length(batches: Iterable[Any], epochs: int) -> int | None:
    try:
        return len(batches) * epochs  # type: ignore[arg-type]
    except TypeError:  # the length of a DataLoader may be unknown
        return None
