"""Agreement of two models' predictions, and the bound that KS-Lottery certifies."""

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
    """How far the predictions of a partially tuned model agree with those of the embed-tuned one.

    Attributes:
        agreement: the share of equal predictions.
        lower: one-sided lower confidence limit of it (Clopper-Pearson) at confidence 1 - alpha.
        count: number of predictions.
        bound: 1 - alpha, which the paper certifies.

    Source: KS-Lottery (Yuan et al., arXiv 2402.02801); the confidence limit is ours.

    Examples:
        >>> a = torch.arange(100)
        >>> found = sk.methods.ks_lottery.certificate(a, a.clamp(max=98), alpha=0.05)
        >>> found.agreement, found.bound, found.holds
        (0.99, 0.95, True)
    """

    agreement: float
    lower: float
    count: int
    bound: float

    @property
    def holds(self) -> bool:
        """Whether `lower` reaches the bound."""
        return self.lower >= self.bound


def certificate(predicted: Tensor, reference: Tensor, alpha: float = 0.05) -> Certificate:
    """Measure the agreement of two models' predictions, and compare it with the bound that KS-Lottery certifies.

    Args:
        predicted, reference: predictions for the same positions, of equal shape, from `predictions`. Not changed.
        alpha: level of the ticket's test, and of the confidence limit, in (0, 1).

    Returns:
        Certificate. It is about agreement with the embed-tuned model, not about the quality of either. The limit
        assumes independent predictions; tokens of one text are not, so pass one per text where that matters.

    Raises:
        ValueError: alpha out of range, shapes that differ, or no predictions.

    Source: the bound is that of KS-Lottery (Yuan et al., arXiv 2402.02801), as quoted by others. Ours: measuring it.

    Examples:
        >>> sk.methods.ks_lottery.certificate(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]))
        Certificate(agreement=0.75, lower=0.248..., count=4, bound=0.95)
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
    """Return the model's prediction at every labelled position of the batches, given the text before it.

    Args:
        model: a Hugging Face model with logits; run in eval mode, not changed.
        batches: mappings of tensors with integer labels, of tokens or of samples; those of -100 are skipped.
        shift: whether each token predicts the label of the next one. Default: detected from the model's own loss.

    Returns:
        int64 on the CPU: the class of the largest logit for each label, in their order.

    Raises:
        ValueError: batches without labels, only labels of -100, labels that are not classes, or a loss from which the
            shift cannot be detected.

    Source: ours.

    Examples:
        >>> from types import SimpleNamespace
        >>> class Model(torch.nn.Embedding):
        ...     def forward(self, input_ids, labels):
        ...         return SimpleNamespace(logits=super().forward(input_ids))
        >>> batch = {"input_ids": torch.tensor([[2, 0, 1]]), "labels": torch.tensor([[2, 0, 1]])}
        >>> sk.methods.ks_lottery.predictions(Model.from_pretrained(torch.eye(3)), [batch], shift=False)
        tensor([2, 0, 1])
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
                shapes = f"{list(labels.shape)} are not classes for logits {list(logits.shape)}"
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
        raise ValueError(f"batches: cannot tell if labels are shifted by one token; pass shift ({error})") from None
    return bool(rule.shift)
