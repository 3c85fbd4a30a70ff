"""One AdamW step at selected positions, in Triton: one launch for each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gather_scatter.triton import device_of, tile_grid, tile_offsets

Tensors = Sequence[Tensor]

TILE_BYTES = 2048  # a program's share of each compact array: 16 a thread, or so many arrays would fill its registers


@triton.jit
def square_root(x):
    # fp32 would get the approximate one, which flushes denormals; fp64 has the exact one only.
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def quotient(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def adamw_kernel(
    values, dense, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, positions, scalars, count, width,
    rest1, beta2, rest2, decay, step_size, inv_sqrt_bias2, eps,
    COMPACT: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, SCALARS_IN_MEMORY: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K positions by BLOCK_D columns of one tensor.

        m <- m + rest1 (g - m);  v <- beta2 v + rest2 g^2;  x <- decay x - step_size m / (sqrt(v) inv_sqrt_bias2 + eps)

    rest1 and rest2 are 1 - beta1 and 1 - beta2, which come ready made: the difference of fp32 betas loses digits.
    COMPACT: x is in `values` and written through into `dense`; else x and g are read where they lie, in the dense
    tensors. Arithmetic in the dtype of the moments. Positions are unique: no two programs share an address.
    """
    if SCALARS_IN_MEMORY:
        rest1 = tl.load(scalars)
        beta2 = tl.load(scalars + 1)
        rest2 = tl.load(scalars + 2)
        decay = tl.load(scalars + 3)
        step_size = tl.load(scalars + 4)
        inv_sqrt_bias2 = tl.load(scalars + 5)
        eps = tl.load(scalars + 6)
    compact, scattered, inside = tile_offsets(positions, count, width, BLOCK_K, BLOCK_D)
    m = tl.load(exp_avgs + compact, mask=inside, other=0)
    v = tl.load(exp_avg_sqs + compact, mask=inside, other=0)
    if COMPACT:
        x = tl.load(values + compact, mask=inside, other=0)
        g = tl.load(grads + compact, mask=inside, other=0)
    else:
        x = tl.load(dense + scattered, mask=inside, other=0).to(m.dtype)
        g = tl.load(grads + scattered, mask=inside, other=0).to(m.dtype)

    if MAXIMIZE:
        g = -g
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    tl.store(exp_avgs + compact, m, mask=inside)
    tl.store(exp_avg_sqs + compact, v, mask=inside)
    if AMSGRAD:
        largest = tl.load(max_exp_avg_sqs + compact, mask=inside, other=0)
        v = tl.where((v > largest) | (v != v), v, largest)  # NaN wins, as in torch.maximum
        tl.store(max_exp_avg_sqs + compact, v, mask=inside)
    x = x * decay - quotient(step_size * m, square_root(v) * inv_sqrt_bias2 + eps)
    if COMPACT:
        tl.store(values + compact, x, mask=inside)
    tl.store(dense + scattered, x.to(dense.dtype.element_ty), mask=inside)


def adamw_compact_(
    values: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, steps: Tensors,
    weights: Tensors, positions: Tensors, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float,
    maximize: bool,
) -> None:  # fmt: skip
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, positions)
    _step_all(values, weights, grads, *state, lr, beta1, beta2, weight_decay, eps, maximize)


def adamw_gathered_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, steps: Tensors,
    positions: Tensors, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float, maximize: bool,
) -> None:  # fmt: skip
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, positions)
    _step_all(None, params, grads, *state, lr, beta1, beta2, weight_decay, eps, maximize)


def _step_all(
    values: Tensors | None, dense: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors, steps: Tensors, positions: Tensors,
    lr: float, beta1: float, beta2: float, weight_decay: float, eps: float, maximize: bool,
) -> None:  # fmt: skip
    options = (lr, beta1, beta2, weight_decay, eps)
    table = _scalar_table(exp_avgs, steps, *options)
    for i, exp_avg in enumerate(exp_avgs):
        count = positions[i].shape[0]
        if exp_avg.numel() == 0:
            continue
        width = exp_avg.numel() // count
        grid, block_k, block_d = tile_grid(count, width, TILE_BYTES // exp_avg.itemsize)
        numbers = [0.0] * 7 if i in table else [float(x) for x in _scalars(steps[i].item(), *options)]
        with device_of(exp_avg):
            adamw_kernel[grid](
                values[i] if values is not None else None,
                dense[i],
                grads[i],
                exp_avg,
                exp_avg_sqs[i],
                max_exp_avg_sqs[i] if max_exp_avg_sqs else None,
                positions[i],
                table.get(i),
                count,
                width,
                *numbers,
                COMPACT=values is not None,
                AMSGRAD=len(max_exp_avg_sqs) > 0,
                MAXIMIZE=maximize,
                SCALARS_IN_MEMORY=i in table,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
            )


def _scalars(step, lr, beta1, beta2, weight_decay, eps):
    """What the kernel calls rest1 ... eps; `step` is a number, or a tensor of one number for each parameter."""
    decay = 1 - lr * weight_decay
    return 1 - beta1, beta2, 1 - beta2, decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps


def _scalars_in_memory(exp_avg: Tensor, step: Tensor) -> bool:
    """A Triton float argument is fp32, and a step on the device must stay there: both then travel through memory."""
    return step.is_cuda or exp_avg.dtype == torch.float64


def _scalar_table(exp_avgs: Tensors, steps: Tensors, *options: float) -> dict[int, Tensor]:
    """The scalars of the parameters that need them in memory, made on their device without waiting for it.

    Only fp64 parameters with steps on the host make it wait, for a copy of each.
    """
    wanted = [i for i, exp_avg in enumerate(exp_avgs) if _scalars_in_memory(exp_avg, steps[i])]
    if not wanted:
        return {}
    device = exp_avgs[wanted[0]].device
    step = torch.stack([steps[i].to(device, torch.float64) for i in wanted])
    columns = [x if isinstance(x, Tensor) else torch.full_like(step, x) for x in _scalars(step, *options)]
    rows = torch.stack([*columns, torch.zeros_like(step)], dim=1)  # eight wide: every row starts at 16 bytes
    by_dtype = {exp_avgs[i].dtype: rows.to(exp_avgs[i].dtype) for i in wanted}
    return {i: by_dtype[exp_avgs[i].dtype][row] for row, i in enumerate(wanted)}
