"""One AdamW step at selected positions, over lists of tensors at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...common.units import Tile
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
    tiles: Sequence[Tile] | None = None,
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
    """Step dense parameters at selected positions, or compact ones, written through into dense weights; in place.

    Equivalent, for every i, to `torch.optim.AdamW` on params[i].view(-1)[positions[i]] and its gradient there; with
    weights, to `torch.optim.AdamW` on params[i], then `weights[i].view(-1)[positions[i]] = params[i]`.

    Args:
        params (floating, contiguous): updated at positions, not touched elsewhere. With weights, compact
            (index.compact_shape, fp32, fp64 for fp64 weights): the master copy of the selected weights, updated.
        grads: gradients, shaped and typed as params; not changed.
        exp_avgs, exp_avg_sqs (index.compact_shape, fp32 or bf16, fp64 for fp64): compact moments; updated.
        max_exp_avg_sqs: empty, or one per tensor for amsgrad; updated.
        steps (fp32): the number of this step, counted from 1: 0-d, or [positions] one per position if they have
            different counts. On the CPU or on the device of params; per-position ones on the latter.
        positions: those of an Index of the dense tensor; not checked again.
        weights (any floating dtype, contiguous): empty, or the dense weights that params stand for; written at
            positions, rounding to nearest even.
        tiles: the `tile` of each Index; None if all are of elements.
        lr: a number, or a 0-d fp32 tensor on the device of params, which the kernel reads.
        beta1, beta2, weight_decay, eps, maximize: as in `torch.optim.AdamW`.
        grad_scale (0-d, fp32, on the device of params): gradients are divided by it when read; grads stay scaled.
        found_inf (0-d, fp32, on the device of params): if it is not 0, nothing changes. Reducing `steps` then is up to
            the caller.
        rounding: () rounds half-precision results to nearest; (seed, stream) stochastically, with random bits
            (Philox4x32-10) from the seed, the step, stream + i, the position in the dense tensor and the array. Weights
            are rounded to nearest in either case: nothing is lost, since params are kept.

    Numerics: fp32 arithmetic (fp64 for fp64 tensors), moments as torch's; half-precision results are rounded once per
    step. Deterministic. On a GPU there is no sync.
    Cost: 20 B * K plus one read of every touched line of grads, one read and one write of params'; with weights (fp32,
    int32 positions) 32 B * K plus a read and a write of every touched 64-byte line.

    Raises:
        RuntimeError: lists of different lengths, or tensors that do not fit each other.

    Source: Loshchilov and Hutter, arXiv 1711.05101, as torch.optim.AdamW computes it; stepping positions only is ours.

    Examples:
        >>> param, grad, m, v = torch.ones(4), torch.tensor([1.0, 5.0, 5.0, -2.0]), torch.zeros(2), torch.zeros(2)
        >>> options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
        >>> positions = torch.tensor([0, 3])
        >>> sk.ops.adamw_([param], [grad], [m], [v], [], [torch.tensor(1.0)], [positions], **options)
        >>> param
        tensor([0.9000, 1.0000, 1.0000, 1.1000])
    """
    device = params[0].device.type if params else "cpu"
    lists = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, positions, weights
    flat = [1, 1] * len(params) if tiles is None else [size for tile in tiles for size in tile]
    number, tensor = (math.nan, lr) if isinstance(lr, Tensor) else (lr, None)
    options = number, beta1, beta2, weight_decay, eps, maximize, tensor, grad_scale, found_inf, list(rounding)
    select("adamw_", device, backend)(*map(list, lists), flat, *options)
