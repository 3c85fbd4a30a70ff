"""One AdamW step over the rows that a gradient lists, in plain PyTorch: the oracle, and the fallback everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.rounding import EXP_AVG, EXP_AVG_SQ, MAXIMUM, WEIGHT, rounded


def adamw_rows_(
    param: Tensor,
    grad_values: Tensor,
    ids: Tensor,
    slots: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    scales: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    rounding: Sequence[int],
) -> None:
    ids, order = ids.sort(stable=True)
    rows, run, counts = torch.unique_consecutive(ids, return_inverse=True, return_counts=True)
    grad = scales.new_zeros((len(rows), *param.shape[1:]))
    grad.index_add_(0, run, grad_values[order].to(grad.dtype))
    if maximize:
        grad.neg_()
    at = rows if slots is None else slots[rows].long()
    width = grad[0].numel() if len(grad) else 0
    positions = (rows[:, None] * width + torch.arange(width, device=rows.device)).view(grad.shape)

    def store(target: Tensor, at: Tensor, x: Tensor, array: int) -> None:
        target[at] = rounded(x, target.dtype, rounding, positions, array)

    m, v = exp_avg[at].to(grad.dtype), exp_avg_sq[at].to(grad.dtype)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    store(exp_avg, at, m, EXP_AVG)
    store(exp_avg_sq, at, v, EXP_AVG_SQ)
    if max_exp_avg_sq is not None:
        v = torch.maximum(max_exp_avg_sq[at].to(grad.dtype), v)
        store(max_exp_avg_sq, at, v, MAXIMUM)
    if len(scales) > 1:
        scales = scales[order[counts.cumsum(0) - counts]]
    decay, step_size = scales.view(len(scales), 2, *[1] * (param.dim() - 1)).unbind(1)
    x = param[rows].to(m.dtype)
    store(param, rows, x - decay * x - step_size * m / (v.sqrt() + eps), WEIGHT)
