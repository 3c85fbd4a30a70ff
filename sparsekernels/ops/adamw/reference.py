"""One AdamW step at selected positions, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gather_scatter import reference as gather_scatter


def _bias(beta: float, step: Tensor, like: Tensor) -> Any:
    """1 - beta^step: a number, or a column of one number for each position of `like`."""
    if step.dim() == 0:
        return 1 - beta ** step.item()
    return (1 - beta ** step.double()).view(-1, *(1,) * (like.dim() - 1)).to(like.dtype)


def _updated(
    x: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
) -> Tensor:
    """The rule of torch.optim.AdamW; the moments change in place, the new weight is returned."""
    if lr_tensor is not None:
        lr = lr_tensor.item()
    grad = (-grad if maximize else grad).to(exp_avg.dtype)
    if grad_scale is not None:
        grad = grad / grad_scale.to(grad.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if max_exp_avg_sq is not None:
        exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denominator = exp_avg_sq.sqrt().div_(_bias(beta2, step, x) ** 0.5).add_(eps)
    return (x * (1 - lr * weight_decay)).addcdiv_(exp_avg * (-lr / _bias(beta1, step, x)), denominator)


def _skips(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf)


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
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if _skips(found_inf):
        return
    options = (lr, beta1, beta2, weight_decay, eps, maximize, lr_tensor, grad_scale)
    for i, x in enumerate(values):
        maximum = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        x.copy_(_updated(x, grads[i], exp_avgs[i], exp_avg_sqs[i], maximum, steps[i], *options))
        gather_scatter.scatter_(weights[i], positions[i], x, _whole_rows(x, weights[i]))


def adamw_gathered_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    positions: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if _skips(found_inf):
        return
    options = (lr, beta1, beta2, weight_decay, eps, maximize, lr_tensor, grad_scale)
    for i, param in enumerate(params):
        exp_avg, rows = exp_avgs[i], _whole_rows(exp_avgs[i], param)
        maximum = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        x = gather_scatter.gather(param, positions[i], rows).to(exp_avg.dtype)
        grad = gather_scatter.gather(grads[i], positions[i], rows)
        x = _updated(x, grad, exp_avg, exp_avg_sqs[i], maximum, steps[i], *options)
        gather_scatter.scatter_(param, positions[i], x, rows)
