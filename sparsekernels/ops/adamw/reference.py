"""One AdamW step at selected positions, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gather_scatter import reference as gather_scatter


def _updated(
    x: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> Tensor:
    """The rule of torch.optim.AdamW; the moments change in place, the new weight is returned."""
    grad = (-grad if maximize else grad).to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if max_exp_avg_sq is not None:
        exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    return (x * (1 - lr * weight_decay)).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def _whole_rows(compact: Tensor, dense: Tensor) -> bool:
    """Compact rows keep the trailing dimensions of the tensor they come from; compact elements are flat."""
    return compact.dim() == dense.dim() > 0


def adamw_compact_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    weights: Sequence[Tensor],
    positions: Sequence[Tensor],
    *options: Any,
) -> None:
    for i, x in enumerate(values):
        maximum = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        x.copy_(_updated(x, grads[i], exp_avgs[i], exp_avg_sqs[i], maximum, steps[i].item(), *options))
        gather_scatter.scatter_(weights[i], positions[i], x, _whole_rows(x, weights[i]))


def adamw_gathered_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    positions: Sequence[Tensor],
    *options: Any,
) -> None:
    for i, param in enumerate(params):
        exp_avg, rows = exp_avgs[i], _whole_rows(exp_avgs[i], param)
        maximum = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        x = gather_scatter.gather(param, positions[i], rows).to(exp_avg.dtype)
        grad = gather_scatter.gather(grads[i], positions[i], rows)
        x = _updated(x, grad, exp_avg, exp_avg_sqs[i], maximum, steps[i].item(), *options)
        gather_scatter.scatter_(param, positions[i], x, rows)
