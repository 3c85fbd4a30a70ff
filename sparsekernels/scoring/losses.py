"""The loss to differentiate: of a batch, or one per sample of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # the label of tokens that have none
TOLERANCE, TOLERANCE_HALF = 1e-5, 2e-2  # relative, between the model's own loss on a sample and ours


def batch_size(batch: Batch, number: int) -> int:
    """The number of samples in a batch; `number` is the batch's, for the message.

    Raises:
        ValueError: it is not a mapping with tensors, is empty, or has a sample whose attention mask is all zero.
    """
    tensors = [x for x in batch.values() if isinstance(x, Tensor) and x.dim()] if isinstance(batch, Mapping) else []
    if not tensors:
        raise ValueError(
            f"samples: batch {number} must be a mapping of tensors, as for a Hugging Face model, "
            f"got {type(batch).__name__}"
        )
    first = batch.get("input_ids", tensors[0])
    mask = batch.get("attention_mask")
    if not len(first):
        raise ValueError(f"samples: batch {number} is empty")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        empty = (mask != 0).any(1).logical_not()
        if bool(empty.any()):
            raise ValueError(
                f"samples: the attention_mask of sample {int(empty.nonzero()[0])} in batch {number} is all zero; "
                "remove the sample"
            )
    return len(first)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def rows_of(batch: Batch, chosen: Tensor, size: int) -> dict[str, Any]:
    """The batch with these samples only; entries that do not have one item per sample are kept as they are."""

    def cut(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[chosen.to(x.device)] if x.dim() and len(x) == size else x
        return [x[i] for i in chosen.tolist()] if isinstance(x, list | tuple) and len(x) == size else x

    return {key: cut(x) for key, x in batch.items()}


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss a Hugging Face model computes itself from a batch with labels."""
    device = next(model.parameters()).device
    output = model(**to_device(batch, device))
    if getattr(output, "loss", None) is None:
        raise ValueError("loss: the model returned none; add labels to the batches or pass a function as loss")
    loss: Tensor = output.loss
    return loss


def check_loss(loss: Any, weights: str, where: str, hint: str = "") -> None:
    """Raise ValueError unless the loss is a finite scalar with a gradient; other arguments are for the message."""
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        got = type(loss).__name__
        if isinstance(loss, Tensor):
            got = f"shape {list(loss.shape)}" if loss.dim() else "one without a gradient"
        raise ValueError(f"loss must be a scalar tensor that depends on {weights}, got {got} at {where}")
    if not bool(loss.isfinite()):
        raise ValueError(f"loss is {loss.item()} at {where}{hint}")


class PerSampleLoss:
    """Computes the terms, each [B], whose squared gradients are summed.

    With given labels there is one term: the model's own loss on each sample alone, recomputed from its logits and
    labels; samples of the first batch are run alone to check that the two agree. With expected labels there is one term
    for each class y, sqrt(p(y|x)) * log p(y|x), the root held constant, so that its squared gradient is that of
    log p(y|x) weighted by p(y|x).
    """

    def __init__(self, loss: Loss | None, labels: str) -> None:
        if labels not in ("given", "expected"):
            raise ValueError(f'labels must be "given" or "expected", got {labels!r}')
        if loss is not None and labels == "expected":
            raise ValueError('labels="expected" has its own loss, the log-likelihood; leave loss out')
        self.custom, self.expected = loss, labels == "expected"
        self.shift: bool | None = None

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Raise ValueError if the loss is not per sample; determine whether the model shifts its labels."""
        size = batch_size(batch, 0)
        if self.custom is not None or self.expected:
            with torch.no_grad():
                next(iter(self.terms(model, batch, size)))
            return
        candidates = [True, False]  # whether tokens predict the next label, or their own
        for b in range(size):
            alone = rows_of(batch, torch.tensor([b]), size)
            with torch.no_grad():
                output = model(**alone)
            own = getattr(output, "loss", None)
            if own is None:
                raise ValueError("samples: the model returns no loss for them; add labels or pass loss")
            logits, labels = _logits(output), _labels(alone)
            if logits.dim() < 3:
                candidates = [False]
            candidates = _fitting(own, logits, labels, candidates)
            if len(candidates) == 1:
                self.shift = candidates[0]
                return
        raise ValueError("loss: cannot tell whether the model's labels are shifted by one token; pass loss")

    def terms(self, model: nn.Module, batch: Batch, size: int) -> Iterator[Tensor]:
        """Each term, [B]; they share one forward."""
        if self.expected:
            logits = _logits(model(**{key: x for key, x in batch.items() if key != "labels"}))
            if logits.dim() != 2:
                raise ValueError(f'labels="expected" needs logits [samples, classes], got {list(logits.shape)}')
            log_p = F.log_softmax(logits, 1)
            roots = log_p.detach().div(2).exp()
            yield from (roots * log_p).unbind(1)
            return
        if self.custom is None:
            # An encoder-decoder makes its decoder's input from labels; other models would only compute an unused loss.
            inside = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            output = model(**{key: x for key, x in batch.items() if inside or key != "labels"})
            yield _of_labels(_logits(output), _labels(batch), bool(self.shift))
            return
        losses = self.custom(model, batch)
        single = size == 1 and isinstance(losses, Tensor) and losses.dim() == 0
        if not single and (not isinstance(losses, Tensor) or losses.shape != (size,)):
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss must return one value per sample, shape [{size}], got {got}; "
                'a mean over the batch mixes the samples: use reduction="none"'
            )
        yield losses.reshape(size)


def _labels(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError('samples have no labels; add them to the batches, or use labels="expected" or loss')
    return labels


def _fitting(own: Tensor, logits: Tensor, labels: Tensor, candidates: list[bool]) -> list[bool]:
    """The candidates for `shift` under which our loss of one sample equals the model's own."""
    found: dict[bool, Tensor] = {}
    failure: ValueError | None = None
    for shift in candidates:
        try:
            found[shift] = _of_labels(logits, labels, shift)
        except ValueError as error:
            failure = error
    if failure and not found:
        raise failure
    near = TOLERANCE if own.dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    fits = [shift for shift, ours in found.items() if torch.allclose(ours, own.to(ours), near, 1e-3 * near)]
    if not fits:
        values = " or ".join(f"{float(ours):.6g}" for ours in found.values())
        raise ValueError(
            f"loss: the model's own loss on one sample is {float(own):.6g}, cross-entropy or squared error from its "
            f"logits {values}; pass loss, a function of (model, batch) that returns one loss per sample"
        )
    return fits


def _of_labels(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """[B]: cross-entropy, over tokens if there are any, squared error, or binary cross-entropy of several labels."""
    if logits.dim() == 3 and labels.dim() == 2:
        return _over_tokens(logits, labels, shift)
    if logits.dim() == 2 and labels.is_floating_point():
        if labels.dim() == 2 and labels.shape[1] > 1:
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)
        return F.mse_loss(logits.reshape(-1), labels.to(logits).reshape(-1), reduction="none")
    if logits.dim() == 2 and labels.dim() == 1:
        if bool((labels == IGNORED).any()):
            raise ValueError(
                f"samples: sample {int((labels == IGNORED).nonzero()[0])} of a batch has the label {IGNORED}"
            )
        return F.cross_entropy(logits, labels, reduction="none")
    raise ValueError(
        f"loss: no per-sample loss is known for logits {list(logits.shape)} and labels {list(labels.shape)}; "
        "pass loss, a function of (model, batch) that returns one loss per sample"
    )


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError("loss: the model returns no logits; pass loss, a function of (model, batch) -> [samples]")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _over_tokens(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """The mean over the labelled tokens of each sample."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    real = labels != IGNORED
    counts = real.sum(1)
    if bool((counts == 0).any()):
        raise ValueError(f"samples: sample {int((counts == 0).nonzero()[0])} of a batch has no labelled token")
    # Flat, with classes last: over another dimension torch is slow for a large vocabulary.
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view_as(labels).sum(1) / counts
