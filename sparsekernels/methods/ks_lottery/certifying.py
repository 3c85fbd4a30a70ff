"""Agreement of two models, and the bound that it gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...scoring.eval_mode import in_eval_mode
from ...scoring.losses import IGNORED, PerSampleLoss, batch_size, rows_of, to_device


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
    with in_eval_mode(model), torch.no_grad():
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
