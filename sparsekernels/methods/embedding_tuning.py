"""What KS-Lottery tunes and moves: the whole input embedding, or the rows of a ticket, and how well the two agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..delta import Change, Delta
from ..evaluating import evaluating
from ..losses import IGNORED, PerSampleLoss, batch_size, check_loss, default_loss, rows_of, to_device
from ..names import embedding_weight
from ..ops import gather
from ..optim import SparseAdamW, clip_grad_norm_
from ..selection import Index, Selection
from ..sparsify import SparseModel, sparsify
from .ks_lottery import tables_of

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

    The rows train as fp32 values, whatever the dtype of the table: `ks_lottery` reads those. Without weight decay, so
    that rows of tokens that never occur stay as they are. A tied table trains through the output layer too, which
    gives every row a gradient.

    Args:
        model: any torch model, in train mode during training and in its own mode after. Buffers that a forward in train
            mode updates (BatchNorm) are updated, and stay so.
        batches: batches in Hugging Face form (mappings of tensors with labels), or whatever `loss` takes; gone through
            once an epoch: a list or a DataLoader.
        lr: of SparseAdamW, constant.
        epochs: times to go through the batches.
        embedding: name of the table; default: the model's input embedding.
        loss: function of (model, batch); default `model(**batch).loss`.
        max_grad_norm: clip the gradient to this norm; default: no clipping.
        progress: show a progress bar.

    Returns:
        SparseModel: pass it to `ks_lottery`, then `restore()` the parameters, bit for bit, or `merge()`.

    Raises:
        ValueError: numbers out of range, batches that are empty or can be gone through once only, no embedding to be
            found, a loss that is missing, no scalar with a gradient, or not finite. The parameters are then as before.

    Cost: AdamW over the table: 16 B an element, and one fp32 gradient of the table. For loops of your own,
    `sparsify(model, Selection({name: Index.full(shape)}))` is all that this does.

    Source: the paper, as quoted by others (embedding only; lr, epochs). Ours: no decay, constant rate.
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
    """Train what is selected, the rows of a ticket, and no other parameter, from the model as it is.

    Args, and the errors they raise, are those of `embed_tune`; an empty selection is refused.

    Returns:
        SparseModel: `delta()` is the file to ship.

    Source: the paper, as quoted by others (lr, epochs). Ours: no decay, constant rate.
    """
    if not selection.numel:
        raise ValueError("selection is empty: there is nothing to tune; raise alpha, or choose rows by_shift")
    return _tune(model, selection, batches, "partial tuning", lr, epochs, loss, max_grad_norm, progress)


def partial_transfer(tuned: SparseModel, selection: Selection) -> Delta:
    """Copy the selected rows out of an embed-tuned model, without any training.

    Args:
        tuned: what `embed_tune` returned, not yet restored.
        selection: rows of its embedding, as `ks_lottery` returns them.

    Returns:
        Delta, to be applied to the model once it is restored: `tuned.restore(); delta.apply(tuned.model)`.

    Raises:
        ValueError: the selection is empty, or of something else than rows of the embedding. RuntimeError: `tuned` was
            restored or merged.

    Source: the definition is ours; the paper's could not be read.
    """
    if len(selection) != 1:
        raise ValueError(f"selection must be of rows of one table, got {len(selection)} tensors")
    ((name, index),) = selection.items()
    _, before, after = tables_of(tuned, None, name)
    if not index.rows or index.shape != before.shape:
        raise ValueError(f"selection must be of rows of {name!r}, {list(before.shape)}, got {index}")
    here = index.to(before.device)
    return Delta({name: Change.of(here, gather(after, here).to(before.dtype), gather(before, here))})


def predictions(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, shift: bool | None = None) -> Tensor:
    """What the model predicts, with the given text before it, at every labelled position of the batches.

    Args:
        model: a Hugging Face model with logits; run in eval mode, left as it was.
        batches: mappings of tensors with integer labels, of tokens or of samples; those of -100 are left out.
        shift: whether a token is to predict the label of the next one. Default: what the model's own loss tells.

    Returns:
        int64 on the CPU: the class of the largest logit for each label, in their order.

    Raises:
        ValueError: batches without labels, none that count, labels that are no classes, or a loss that does not tell
            whether labels are shifted.
    """
    found = []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(batches):
            size = batch_size(batch, number)
            here = to_device(batch, device)
            labels = here.get("labels")
            if not isinstance(labels, Tensor) or labels.is_floating_point():
                raise ValueError(f"batches: batch {number} has no integer labels")
            counting = (labels != IGNORED).reshape(size, -1).any(1).nonzero().reshape(-1)
            if not len(counting):
                continue
            if shift is None:
                shift = _shift(model, rows_of(here, counting[:1], size))
            logits: Tensor = model(**here).logits
            if logits.dim() != labels.dim() + 1 or logits.shape[-1] < 2:
                shapes = f"{list(labels.shape)} are no classes for logits {list(logits.shape)}"
                raise ValueError(f"batches: the labels of batch {number}, {shapes}")
            if logits.dim() == 3 and shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            found.append(logits.argmax(-1)[labels != IGNORED].cpu())
    if not found or not sum(map(len, found)):
        raise ValueError("batches hold no labels to predict")
    return torch.cat(found)


def _shift(model: nn.Module, sample: Mapping[str, Any]) -> bool:
    if sample["labels"].dim() < 2:
        return False
    rule = PerSampleLoss(None, "given")
    try:
        rule.check(model, sample)
    except ValueError as error:
        raise ValueError(f"batches do not tell whether labels are shifted by one token; pass shift ({error})") from None
    return bool(rule.shift)


@dataclass(frozen=True)
class Certificate:
    """How far predictions of a partially tuned model agree with those of the embed-tuned one.

    Attributes:
        agreement: the share of equal predictions. count: how many there are.
        lower: one-sided lower confidence limit of it (Clopper-Pearson) at confidence 1 - alpha.
        bound: 1 - alpha, what the paper certifies.
        holds: whether `lower` reaches the bound.
    """

    agreement: float
    lower: float
    count: int
    bound: float

    @property
    def holds(self) -> bool:
        return self.lower >= self.bound


def certificate(predicted: Tensor, reference: Tensor, alpha: float = 0.05) -> Certificate:
    """Measure the agreement of two models, and set it beside the bound that KS-Lottery certifies.

    Args:
        predicted, reference: predictions at the same places, of equal shape, as `predictions` returns them.
        alpha: the level of the ticket's test, and of the confidence limit, in (0, 1).

    Returns:
        Certificate. It speaks of agreement with the embed-tuned model, not of the quality of either. The limit takes
        predictions as independent; tokens of one text are not, so pass one a text where that matters.

    Raises:
        ValueError: alpha out of range, shapes that differ, or no predictions.

    Source: the bound is the paper's, as quoted by others. Ours: measuring it.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if predicted.shape != reference.shape or not predicted.numel():
        raise ValueError(
            "predicted and reference must be predictions at the same places, "
            f"got {list(predicted.shape)} and {list(reference.shape)}"
        )
    from scipy.stats import beta

    same, count = int((predicted == reference).sum()), predicted.numel()
    lower = float(beta.ppf(alpha, same, count - same + 1)) if same else 0.0
    return Certificate(same / count, lower, count, 1 - alpha)


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
        raise ValueError("batches is an iterator, which one epoch uses up; pass a list or a DataLoader")
    modes = [(module, module.training) for module in model.modules()]
    tuned = sparsify(model, selection)
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
    except TypeError:  # a DataLoader has a length that may not be known
        return None
