"""One AdamW step at selected positions, in Triton: one launch for each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.rounding_triton import rounded
from ..common.triton import deal, device_of, quotient, square_root, unit_offsets

Tensors = Sequence[Tensor]

NO_BIAS = math.inf  # the step count at which step_size is lr and inv_sqrt_bias2 is 1
SCALARS, ROW = 10, 12  # scalars of a step, and the row that holds them in memory: every row starts at 16 bytes
TILE_BYTES = 2048  # a program's share of each compact array: 16 a thread, or so many arrays would fill its registers


@triton.jit
def bias(step_count, log_beta):
    """1 - beta^t = 1 - e^y with y = t log(beta), t the step count: near zero the series, which loses no digits."""
    y = step_count * log_beta
    near = tl.maximum(y, -0.5)
    series = tl.full(y.shape, 1.0, y.dtype)
    for i in tl.static_range(15):  # the next term is below 0.5^16 / 17!: less than fp64 sees
        series = 1 + series * (near * (1.0 / (16 - i)))
    return tl.where(y > -0.5, -near * series, 1 - tl.exp(y))


@triton.jit
def adamw_kernel(
    values, dense, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, positions, step_counts, scalars, found_inf,
    rest1, beta2, rest2, decay, step_size, inv_sqrt_bias2, eps, sign, log_beta1, log_beta2, seed, step, stream,
    count, rows, columns, height, width,
    COMPACT: tl.constexpr, AMSGRAD: tl.constexpr, PER_POSITION: tl.constexpr, SCALARS_IN_MEMORY: tl.constexpr,
    SKIPPABLE: tl.constexpr, STOCHASTIC: tl.constexpr, COMPUTE: tl.constexpr,
    RUNS: tl.constexpr, BESIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K by BLOCK_D of the compact form of one tensor.

        g <- sign g;  m <- m + rest1 (g - m);  v <- beta2 v + rest2 g^2
        x <- decay x - step_size m / (sqrt(v) inv_sqrt_bias2 + eps)

    rest1 and rest2 are 1 - beta1 and 1 - beta2, which come ready made: the difference of fp32 betas loses digits.
    PER_POSITION: each position has taken `step_counts` steps, and step_size comes as lr. SKIPPABLE: nothing is done if
    found_inf is not 0.
    COMPACT: x is in `values` and written through into `dense`; else x and g are read where they lie, in the dense
    tensors. Arithmetic in COMPUTE; STOCHASTIC: what is stored narrower is rounded stochastically. Positions are
    unique: no two programs share an address.
    """
    if SCALARS_IN_MEMORY:
        rest1 = tl.load(scalars)
        beta2 = tl.load(scalars + 1)
        rest2 = tl.load(scalars + 2)
        decay = tl.load(scalars + 3)
        step_size = tl.load(scalars + 4)
        inv_sqrt_bias2 = tl.load(scalars + 5)
        eps = tl.load(scalars + 6)
        sign = tl.load(scalars + 7)
        if PER_POSITION:
            log_beta1 = tl.load(scalars + 8)
            log_beta2 = tl.load(scalars + 9)
    compact, scattered, slots, _, inside = unit_offsets(
        positions, count, rows, columns, height, width, RUNS, BESIDE, BLOCK_K, BLOCK_D
    )
    if SKIPPABLE:
        inside = inside & (tl.load(found_inf + tl.zeros((1, 1), tl.int32)) == 0)
    m = tl.load(exp_avgs + compact, mask=inside, other=0).to(COMPUTE)
    v = tl.load(exp_avg_sqs + compact, mask=inside, other=0).to(COMPUTE)
    if COMPACT:
        x = tl.load(values + compact, mask=inside, other=0)
        g = tl.load(grads + compact, mask=inside, other=0)
    else:
        x = tl.load(dense + scattered, mask=inside, other=0).to(m.dtype)
        g = tl.load(grads + scattered, mask=inside, other=0).to(m.dtype)

    if PER_POSITION:
        step_count = tl.load(step_counts + slots, mask=slots < count, other=1).to(m.dtype)
        step_count = step_count[None, :] if BESIDE else step_count[:, None]
        step_size = step_size / bias(step_count, log_beta1)
        inv_sqrt_bias2 = 1 / square_root(bias(step_count, log_beta2))
    g *= sign
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    if STOCHASTIC:
        if PER_POSITION:
            step = step_count.to(tl.int64)
        else:
            step = tl.load(step).to(tl.int64)
    stored = rounded(m, exp_avgs, seed, scattered, step, stream, STOCHASTIC, 1)
    tl.store(exp_avgs + compact, stored, mask=inside)
    stored = rounded(v, exp_avg_sqs, seed, scattered, step, stream, STOCHASTIC, 2)
    tl.store(exp_avg_sqs + compact, stored, mask=inside)
    if AMSGRAD:
        largest = tl.load(max_exp_avg_sqs + compact, mask=inside, other=0).to(COMPUTE)
        v = tl.where((v > largest) | (v != v), v, largest)  # NaN wins, as in torch.maximum
        stored = rounded(v, max_exp_avg_sqs, seed, scattered, step, stream, STOCHASTIC, 3)
        tl.store(max_exp_avg_sqs + compact, stored, mask=inside)
    x = x * decay - quotient(step_size * m, square_root(v) * inv_sqrt_bias2 + eps)
    if COMPACT:  # nothing is lost by rounding to nearest: the values stay
        tl.store(values + compact, x, mask=inside)
        tl.store(dense + scattered, x.to(dense.dtype.element_ty), mask=inside)
    else:
        tl.store(dense + scattered, rounded(x, dense, seed, scattered, step, stream, STOCHASTIC, 0), mask=inside)


def adamw_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, steps: Tensors,
    positions: Tensors, weights: Tensors, tiles: Sequence[int],
    lr: float | Tensor, beta1: float, beta2: float, weight_decay: float, eps: float, maximize: bool,
    lr_tensor: Tensor | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    rounding: Sequence[int] = (),
) -> None:  # fmt: skip
    dense = weights or params
    sign = -1.0 if maximize else 1.0
    options = (lr if lr_tensor is None else lr_tensor.double(), beta1, beta2, weight_decay, eps,
               sign if grad_scale is None else sign / grad_scale.double())  # fmt: skip
    compute = [torch.promote_types(x.dtype, torch.float32) for x in dense]
    table = _scalar_table(compute, exp_avgs, steps, *options)
    seed, stream = rounding or (0, 0)
    for i, exp_avg in enumerate(exp_avgs):
        if exp_avg.numel() == 0:
            continue
        tile = (tiles[2 * i], tiles[2 * i + 1])
        grid, units = deal(positions[i].shape[0], dense[i].shape, tile, TILE_BYTES // compute[i].itemsize)
        per_position = steps[i].dim() > 0
        numbers = [0.0] * SCALARS
        step = None  # read on the device, where all of the step is
        if rounding and not per_position:
            step = steps[i].to(exp_avg.device)
        if i not in table:
            numbers = [float(x) for x in _scalars(NO_BIAS if per_position else steps[i].item(), *options)]
        with device_of(exp_avg):
            adamw_kernel[grid](
                params[i] if weights else None,
                dense[i],
                grads[i],
                exp_avg,
                exp_avg_sqs[i],
                max_exp_avg_sqs[i] if max_exp_avg_sqs else None,
                positions[i],
                steps[i].to(exp_avg.device) if per_position else None,
                table.get(i),
                found_inf,
                *numbers,
                seed,
                step,
                stream + i,
                **units,
                COMPACT=len(weights) > 0,
                AMSGRAD=len(max_exp_avg_sqs) > 0,
                PER_POSITION=per_position,
                SCALARS_IN_MEMORY=i in table,
                SKIPPABLE=found_inf is not None,
                STOCHASTIC=len(rounding) > 0,
                COMPUTE=tl.float64 if compute[i] == torch.float64 else tl.float32,
            )


def _scalars(step, lr, beta1, beta2, weight_decay, eps, sign):
    """What the kernel calls rest1 ... log_beta2; `step` is a number, or a tensor of one number for each parameter."""
    decay = 1 - lr * weight_decay
    biased = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    logarithms = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    return 1 - beta1, beta2, 1 - beta2, decay, *biased, eps, sign, *logarithms


def _scalars_in_memory(compute: torch.dtype, step: Tensor, lr: float | Tensor, sign: float | Tensor) -> bool:
    """A Triton float argument is fp32, and what is on the device must stay there: both then travel through memory."""
    on_device = isinstance(lr, Tensor) or isinstance(sign, Tensor) or (step.is_cuda and step.dim() == 0)
    return on_device or compute == torch.float64


def _scalar_table(
    compute: Sequence[torch.dtype], exp_avgs: Tensors, steps: Tensors, *options: Any
) -> dict[int, Tensor]:
    """The scalars of the parameters that need them in memory, made on their device without waiting for it.

    Only fp64 parameters with steps on the host make it wait, for a copy of each.
    """
    lr, *_, sign = options
    wanted = [i for i, dtype in enumerate(compute) if _scalars_in_memory(dtype, steps[i], lr, sign)]
    if not wanted:
        return {}
    device = exp_avgs[wanted[0]].device
    no_bias = torch.full((), NO_BIAS, device=device, dtype=torch.float64)
    step = torch.stack([steps[i].to(no_bias) if steps[i].dim() == 0 else no_bias for i in wanted])
    columns = [x.to(step).expand_as(step) if isinstance(x, Tensor) else torch.full_like(step, x)
               for x in _scalars(step, *options)]  # fmt: skip
    rows = torch.stack(columns + [torch.zeros_like(step)] * (ROW - SCALARS), dim=1)
    by_dtype = {compute[i]: rows.to(compute[i]) for i in wanted}
    return {i: by_dtype[compute[i]][row] for row, i in enumerate(wanted)}
