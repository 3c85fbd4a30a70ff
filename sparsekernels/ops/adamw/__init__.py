"""One AdamW step at selected positions, over lists of tensors at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..backend import Backend, select


def adamw_compact_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    weights: Sequence[Tensor],
    positions: Sequence[Tensor],
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
    """Step compact values and write them through into the dense weights they stand for.

    Equivalent, for every i, to `torch.optim.AdamW` on values[i], then `weights[i].view(-1)[positions[i]] = values[i]`.

    Args:
        values ([K] or [R, *row], fp32, fp64 for fp64 weights): the master copy of the selected weights; updated.
        grads: gradients, shaped and typed as values.
        exp_avgs, exp_avg_sqs: moments, shaped as values, fp32 or bf16 (fp64 for fp64); updated.
        max_exp_avg_sqs: empty, or one a tensor for amsgrad; updated.
        steps (fp32): the number of this step, counted from 1: 0-d, or ([K] or [R]) one for each position where they
            have been trained for different times. On the CPU, or where the values are; one a position: there.
        weights (any floating dtype, contiguous): written at positions, rounding to nearest even.
        positions ([K] or [R]): as in an Index of the weight, and not checked again: take them from one.
        lr: a number, or a 0-d fp32 tensor on the device of the values, which the kernel reads.
        grad_scale (0-d, fp32, there too): gradients are taken for `grad_scale` times what they are. They are only read:
            they stay scaled.
        found_inf (0-d, fp32, there too): nothing at all changes where it is not 0. `steps` is the caller's to put back.
        rounding: () rounds what is stored in half precision to nearest; (seed, stream) stochastically, by random bits
            (Philox4x32-10) that the seed, the step, stream + i, the position in the weight and the array determine.
            The weights of this op are rounded to nearest all the same: nothing is lost, for the values stay.

    Numerics: fp32 arithmetic (fp64 for fp64 values), moments as torch's. Deterministic. On a GPU nothing waits for it.
    Cost: 32 B * K (weights fp32, int32 positions) plus a read and a write of every touched 64-byte line.

    Raises:
        RuntimeError: lists of different lengths, or tensors that do not fit each other.
    """
    select("adamw_compact_", _device(values), backend)(
        list(values),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(steps),
        list(weights),
        list(positions),
        math.nan if isinstance(lr, Tensor) else lr,
        beta1,
        beta2,
        weight_decay,
        eps,
        maximize,
        lr if isinstance(lr, Tensor) else None,
        grad_scale,
        found_inf,
        list(rounding),
    )


def adamw_gathered_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    positions: Sequence[Tensor],
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
    """Step dense parameters at selected positions only: gather, AdamW and scatter in one pass.

    Equivalent, for every i, to `torch.optim.AdamW` on params[i].view(-1)[positions[i]] and its gradient there.

    Args:
        params (floating, contiguous): updated at positions, untouched elsewhere.
        grads: dense gradients, shaped and typed as params.
        exp_avgs, exp_avg_sqs ([K] or [R, *row], fp32 or bf16, fp64 for fp64 params): compact moments; updated.
        the rest as `adamw_compact_`, but for `rounding`, which here goes for params, too.

    Numerics: fp32 arithmetic; a half-precision parameter is rounded once a step. Deterministic.
    Cost: 20 B * K plus one read of every touched line of grads, one read and one write of params'.
    """
    select("adamw_gathered_", _device(params), backend)(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(steps),
        list(positions),
        math.nan if isinstance(lr, Tensor) else lr,
        beta1,
        beta2,
        weight_decay,
        eps,
        maximize,
        lr if isinstance(lr, Tensor) else None,
        grad_scale,
        found_inf,
        list(rounding),
    )


def _device(tensors: Sequence[Tensor]) -> str:
    return tensors[0].device.type if tensors else "cpu"
