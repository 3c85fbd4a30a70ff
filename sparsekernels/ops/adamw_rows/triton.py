"""One AdamW step over the rows that a gradient lists, in Triton: one launch, no atomics, no host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.rounding_triton import rounded
from ..common.triton import device_of, quotient, square_root

MAX_BLOCK = 1024  # columns of a program


@triton.jit
def adamw_rows_kernel(
    param, grad_values, ids, order, slots, exp_avg, exp_avg_sq, max_exp_avg_sq, scales, numbers, count, width,
    rest1, beta2, rest2, eps, seed, step, stream,
    HAS_SLOTS: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, SCALES_EACH: tl.constexpr,
    NUMBERS_IN_MEMORY: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK columns of the row ids[i], if i is the first entry of that row; others end at once.

    rest1 and rest2 are 1 - beta1 and 1 - beta2. Arithmetic in the dtype of the state. Duplicates are added one after
    another, in the order of ids.
    """
    if NUMBERS_IN_MEMORY:
        rest1 = tl.load(numbers)
        beta2 = tl.load(numbers + 1)
        rest2 = tl.load(numbers + 2)
        eps = tl.load(numbers + 3)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + i)
    before = tl.load(ids + i - 1, mask=i > 0, other=-1)
    if before != row:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        slot = row
        if HAS_SLOTS:
            slot = tl.load(slots + row).to(tl.int64)
        state = slot * width + column
        position = row * width + column
        m = tl.load(exp_avg + state, mask=inside, other=0).to(scales.dtype.element_ty)
        v = tl.load(exp_avg_sq + state, mask=inside, other=0).to(m.dtype)
        g = tl.zeros((BLOCK,), m.dtype)
        d = i
        same = d < count
        while same:
            g += tl.load(grad_values + tl.load(order + d) * width + column, mask=inside, other=0).to(m.dtype)
            d += 1
            same = tl.load(ids + d, mask=d < count, other=-1) == row
        if MAXIMIZE:
            g = -g
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        stored = rounded(m, exp_avg, seed, position, step, stream, STOCHASTIC, 1)
        tl.store(exp_avg + state, stored, mask=inside)
        stored = rounded(v, exp_avg_sq, seed, position, step, stream, STOCHASTIC, 2)
        tl.store(exp_avg_sq + state, stored, mask=inside)
        if AMSGRAD:
            largest = tl.load(max_exp_avg_sq + state, mask=inside, other=0).to(m.dtype)
            v = tl.where((v > largest) | (v != v), v, largest)  # NaN wins, as in torch.maximum
            stored = rounded(v, max_exp_avg_sq, seed, position, step, stream, STOCHASTIC, 3)
            tl.store(max_exp_avg_sq + state, stored, mask=inside)
        line = scales
        if SCALES_EACH:
            line = scales + 2 * tl.load(order + i)
        x = tl.load(param + position, mask=inside, other=0).to(m.dtype)
        x -= tl.load(line) * x
        x -= quotient(tl.load(line + 1) * m, square_root(v) + eps)
        tl.store(param + position, rounded(x, param, seed, position, step, stream, STOCHASTIC, 0), mask=inside)


def adamw_rows_(
    param: Tensor, grad_values: Tensor, ids: Tensor, slots: Tensor | None, exp_avg: Tensor,
    exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, scales: Tensor, beta1: float, beta2: float, eps: float,
    maximize: bool, rounding: Sequence[int],
) -> None:  # fmt: skip
    count = ids.shape[0]
    if grad_values.numel() == 0:
        return
    width = grad_values.numel() // count
    ids, order = ids.sort(stable=True)
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    numbers = [1 - beta1, beta2, 1 - beta2, eps]
    # A Triton float argument is fp32: what is fp64 travels through memory.
    in_memory = scales.new_tensor(numbers) if scales.dtype == torch.float64 else None
    with device_of(param):
        adamw_rows_kernel[(count, triton.cdiv(width, block))](
            param,
            grad_values,
            ids,
            order,
            slots,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            scales,
            in_memory,
            count,
            width,
            *numbers,
            *(rounding or (0, 0, 0)),
            HAS_SLOTS=slots is not None,
            AMSGRAD=max_exp_avg_sq is not None,
            MAXIMIZE=maximize,
            SCALES_EACH=scales.shape[0] > 1,
            NUMBERS_IN_MEMORY=in_memory is not None,
            STOCHASTIC=len(rounding) > 0,
            BLOCK=block,
        )
