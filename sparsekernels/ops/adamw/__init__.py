"""One AdamW step at selected positions, over lists of tensors at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..backend import Backend, select


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    positions: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Sequence[int] = (),
    backend: Backend | None = None,
) -> None:
    """Step dense parameters at selected positions, or compact ones, which are written through into dense weights.

    Equivalent, for every i, to `torch.optim.AdamW` on params[i].view(-1)[positions[i]] and its gradient there; with
    weights, to `torch.optim.AdamW` on params[i], then `weights[i].view(-1)[positions[i]] = params[i]`.

    Args:
        params (floating, contiguous): updated at positions, untouched elsewhere. With weights, compact: [K] or
            [R, *row], fp32, fp64 for fp64 weights; the master copy of the selected weights, updated.
        grads: gradients, shaped and typed as params.
        exp_avgs, exp_avg_sqs ([K] or [R, *row], fp32 or bf16, fp64 for fp64): compact moments; updated.
        max_exp_avg_sqs: empty, or one a tensor for amsgrad; updated.
        steps (fp32): the number of this step, counted from 1: 0-d, or ([K] or [R]) one for each position where they
            have been trained for different times. On the CPU, or where params are; one a position: there.
        positions ([K] or [R]): as in an Index of the dense tensor, and not checked again: take them from one.
        weights (any floating dtype, contiguous): empty, or the dense weights that params stand for; written at
            positions, rounding to nearest even.
        lr: a number, or a 0-d fp32 tensor on the device of params, which the kernel reads.
        grad_scale (0-d, fp32, there too): gradients are taken for `grad_scale` times what they are. They are only read:
            they stay scaled.
        found_inf (0-d, fp32, there too): nothing at all changes where it is not 0. `steps` is the caller's to put back.
        rounding: () rounds what is stored in half precision to nearest; (seed, stream) stochastically, by random bits
            (Philox4x32-10) that the seed, the step, stream + i, the position in the dense tensor and the array
            determine. Weights are rounded to nearest all the same: nothing is lost, for params stay.

    Numerics: fp32 arithmetic (fp64 for fp64 tensors), moments as torch's; what is stored in half precision is rounded
    once a step. Deterministic. On a GPU nothing waits for it.
    Cost: 20 B * K plus one read of every touched line of grads, one read and one write of params'; with weights (fp32,
    int32 positions) 32 B * K plus a read and a write of every touched 64-byte line.

    Raises:
        RuntimeError: lists of different lengths, or tensors that do not fit each other.
    """
    device = params[0].device.type if params else "cpu"
    lists = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, positions, weights
    number, tensor = (math.nan, lr) if isinstance(lr, Tensor) else (lr, None)
    options = number, beta1, beta2, weight_decay, eps, maximize, tensor, grad_scale, found_inf, list(rounding)
    select("adamw_", device, backend)(*map(list, lists), *options)
