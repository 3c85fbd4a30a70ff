"""One AdamW step at selected positions, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.units import Tile, offsets_of, side_by_side
from ..common.rounding import EXP_AVG, EXP_AVG_SQ, MAXIMUM, WEIGHT, rounded
from ..gather_scatter import reference as gather_scatter


def _bias(beta: float, step: Tensor, like: Tensor) -> Any:
    """1 - beta^step: a number, or one number for each entry of `like`."""
    if step.dim() == 0:
        return 1 - beta ** step.item()
    return (1 - beta ** step.double()).to(like.dtype)


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
    narrow: Callable[[Tensor, torch.dtype, int], Tensor],
) -> Tensor:
    """The rule of torch.optim.AdamW in the dtype of x; the moments change in place, the new weight is returned."""
    if lr_tensor is not None:
        lr = lr_tensor.item()
    grad = (-grad if maximize else grad).to(x.dtype)
    if grad_scale is not None:
        grad = grad / grad_scale.to(grad.dtype)
    m = exp_avg.to(x.dtype).lerp(grad, 1 - beta1)
    v = exp_avg_sq.to(x.dtype).mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    exp_avg.copy_(narrow(m, exp_avg.dtype, EXP_AVG))
    exp_avg_sq.copy_(narrow(v, exp_avg_sq.dtype, EXP_AVG_SQ))
    if max_exp_avg_sq is not None:
        v = torch.maximum(max_exp_avg_sq.to(x.dtype), v)
        max_exp_avg_sq.copy_(narrow(v, max_exp_avg_sq.dtype, MAXIMUM))
    denominator = v.sqrt().div_(_bias(beta2, step, x) ** 0.5).add_(eps)
    return (x * (1 - lr * weight_decay)).addcdiv_(m * (-lr / _bias(beta1, step, x)), denominator)


def _narrowing(
    x: Tensor, positions: Tensor, shape: torch.Size, tile: Tile, step: Tensor, rounding: Sequence[int], number: int
) -> Callable[[Tensor, torch.dtype, int], Tensor]:
    """How what is stored of tensor `number` is rounded: narrow(x, dtype, array)."""
    if not rounding:
        return lambda x, dtype, array: x.to(dtype)
    seed, first = rounding
    at = offsets_of(positions, shape, tile)[0]
    step_counts = step.to(at.device).long().expand(x.shape)
    return lambda x, dtype, array: rounded(x, dtype, (seed, step_counts, first + number), at, array)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    positions: Sequence[Tensor],
    weights: Sequence[Tensor],
    tiles: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Sequence[int] = (),
) -> None:
    if found_inf is not None and found_inf:
        return
    options = (lr, beta1, beta2, weight_decay, eps, maximize, lr_tensor, grad_scale)
    for i, dense in enumerate(weights or params):
        at, tile, step = positions[i], (tiles[2 * i], tiles[2 * i + 1]), steps[i]
        if weights:
            x, grad = params[i].reshape(-1), grads[i].reshape(-1)
        else:
            x = gather_scatter.gather(dense, at, tile).to(torch.promote_types(dense.dtype, torch.float32))
            grad = gather_scatter.gather(grads[i], at, tile)
        if step.dim() > 0:  # one for each entry
            beside = side_by_side(dense.shape, tile)
            step = step.to(x.device).repeat(tile[0]) if beside else step.to(x.device).repeat_interleave(math.prod(tile))
        exp_avg, exp_avg_sq = exp_avgs[i].view(-1), exp_avg_sqs[i].view(-1)
        maximum = max_exp_avg_sqs[i].view(-1) if max_exp_avg_sqs else None
        narrow = _narrowing(x, at, dense.shape, tile, step, rounding, i)
        new = _updated(x, grad, exp_avg, exp_avg_sq, maximum, step, *options, narrow)
        if weights:
            params[i].view(-1).copy_(new)
        gather_scatter.scatter_(dense, at, new if weights else narrow(new, dense.dtype, WEIGHT), tile)
