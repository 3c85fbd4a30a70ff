"""Stochastic gates in Triton. Gates are drawn by whoever needs them; nothing is stored.

No atomics: a program leaves its sums at a place of its own, and every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import device_of, tile
from .draws import draw_gates, number_of, open_gates

GATES = 256  # of a program
TILE = 8192  # bytes of a weight, or of activations, that a program has in its registers
TOKENS, STEP = tl.constexpr(64), tl.constexpr(8)  # tokens of a program that sums them, in all and at a time
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def gate_values_kernel(
    logits, values, slopes, noise, key, stream, count, KIND: tl.constexpr, IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr
):
    """One program owns BLOCK gates."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    x = tl.load(logits + i, mask=inside, other=0)
    value, slope = draw_gates(x, i, number_of(noise, IN_MEMORY), key, stream, KIND)
    tl.store(values + i, value, mask=inside)
    tl.store(slopes + i, slope, mask=inside)


@triton.jit
def gate_probabilities_kernel(
    logits, values, slopes, noise, start, count, KIND: tl.constexpr, IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr
):
    """One program owns BLOCK gates of one vector, which begins at `start` in the results."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    value, slope = open_gates(tl.load(logits + i, mask=inside, other=0), number_of(noise, IN_MEMORY), KIND)
    tl.store(values + start + i, value, mask=inside)
    tl.store(slopes + start + i, slope, mask=inside)


@triton.jit
def factors(
    logits, i, inside, group, noise, key, KIND: tl.constexpr, STREAM: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gates of rows or columns i; ones where there are no logits."""
    if logits is None:
        return tl.full(i.shape, 1.0, COMPUTE)
    else:
        x = tl.load(logits + i // group, mask=inside, other=0)
        value, _ = draw_gates(x, i // group, noise, key, STREAM, KIND)
        return value


@triton.jit
def narrowed(x, like):
    """x in the dtype of what `like` points to; fp64 by way of fp32, as in PyTorch."""
    if like.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    return x.to(like.dtype.element_ty)


@triton.jit
def gated_weight_kernel(
    weight, bias, rows, columns, out, gated_bias, noise, key, height, width, column_group,
    KIND: tl.constexpr, IN_MEMORY: tl.constexpr, TRANSPOSED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_I by BLOCK_J of the weight as it lies, and the bias of its rows, if it is the first there:

    out[i, j] = weight[i, j] * z_row * z_column, gated_bias = bias * z_row.
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.maximum(tl.cdiv(width, BLOCK_J), 1)
    i = program // across * BLOCK_I + tl.arange(0, BLOCK_I)
    j = program % across * BLOCK_J + tl.arange(0, BLOCK_J)
    noise = number_of(noise, IN_MEMORY)
    if TRANSPOSED:
        outer = factors(columns, i, i < height, column_group, noise, key, KIND, 1, COMPUTE)
        inner = factors(rows, j, j < width, 1, noise, key, KIND, 0, COMPUTE)
        row, of_rows, whose = j, inner, (j < width) & (program < across)
    else:
        outer = factors(rows, i, i < height, 1, noise, key, KIND, 0, COMPUTE)
        inner = factors(columns, j, j < width, column_group, noise, key, KIND, 1, COMPUTE)
        row, of_rows, whose = i, outer, (i < height) & (program % across == 0)
    place = i[:, None] * width + j[None, :]
    inside = (i < height)[:, None] & (j < width)[None, :]
    found = tl.load(weight + place, mask=inside, other=0).to(COMPUTE) * outer[:, None] * inner[None, :]
    tl.store(out + place, narrowed(found, out), mask=inside)
    if bias is not None:
        found = tl.load(bias + row, mask=whose, other=0).to(COMPUTE) * of_rows
        tl.store(gated_bias + row, narrowed(found, gated_bias), mask=whose)


@triton.jit
def sum_tokens_kernel(
    a, b, parts, tokens, width, a_stride, b_stride,
    COMPUTE: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns TOKENS tokens by BLOCK columns: parts[block, 0, j] = sum of a b, parts[block, 1, j] of a."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, BLOCK)
    block = program // across
    j = program % across * BLOCK + tl.arange(0, BLOCK)
    products = tl.zeros((STEP, BLOCK), COMPUTE)
    sums = tl.zeros((STEP, BLOCK), COMPUTE)
    for start in range(0, TOKENS, STEP):
        t = block * TOKENS + start + tl.arange(0, STEP)
        inside = (t < tokens)[:, None] & (j < width)[None, :]
        left = tl.load(a + t[:, None] * a_stride + j[None, :], mask=inside, other=0).to(COMPUTE)
        products += left * tl.load(b + t[:, None] * b_stride + j[None, :], mask=inside, other=0).to(COMPUTE)
        sums += left
    place = parts + 2 * block * width + j
    tl.store(place, tl.sum(products, 0), mask=j < width)
    tl.store(place + width, tl.sum(sums, 0), mask=j < width)


@triton.jit
def gate_gradient_kernel(
    of_gates, sums, logits, gradient, of_values, scaled_sum, noise, key, stream, width, group,
    KIND: tl.constexpr, IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK columns, and the gates that begin there. of_gates: sums of a b over tokens and groups."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = j // group
    z, slope = draw_gates(
        tl.load(logits + i, mask=j < width, other=0), i, number_of(noise, IN_MEMORY), key, stream, KIND
    )
    total = tl.load(sums + j, mask=j < width, other=0)
    # A gate that is closed, or clamped, lets nothing through, whatever NaN the activations hold.
    tl.store(scaled_sum + j, tl.where(z == 0.0, 0.0, z * total), mask=j < width)
    first = (j < width) & (j == i * group)
    of_value = tl.load(of_gates + i, mask=first, other=0) / tl.where(z == 0.0, 1.0, z)
    of_value = tl.where(z == 0.0, 0.0, of_value)
    tl.store(of_values + i, of_value, mask=first)
    tl.store(gradient + i, tl.where(slope == 0.0, 0.0, slope * of_value), mask=first)


def gate_values(logits: Tensor, kind: int, noise: float, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
    values, slopes = torch.empty_like(logits), torch.empty_like(logits)
    count = logits.shape[0]
    if count:
        with device_of(logits):
            gate_values_kernel[(triton.cdiv(count, GATES),)](
                logits, values, slopes, _noise(noise, logits), key, stream, count,
                KIND=kind, IN_MEMORY=_in_memory(logits), BLOCK=GATES,
            )  # fmt: skip
    return values, slopes


def gate_probabilities(logits: Sequence[Tensor], kind: int, noise: float) -> tuple[Tensor, Tensor]:
    total = sum(each.shape[0] for each in logits)
    values, slopes = logits[0].new_empty(total), logits[0].new_empty(total)
    start, number = 0, _noise(noise, logits[0])
    for each in logits:
        count = each.shape[0]
        if count:
            with device_of(each):
                gate_probabilities_kernel[(triton.cdiv(count, GATES),)](
                    each, values, slopes, number, start, count,
                    KIND=kind, IN_MEMORY=_in_memory(each), BLOCK=GATES,
                )  # fmt: skip
        start += count
    return values, slopes


def gated_weight(
    weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None, kind: int, noise: float,
    key: Tensor | None, transposed: bool, dtype: torch.dtype, column_group: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    height, width = weight.shape
    out = weight.new_empty(weight.shape, dtype=dtype)
    gated_bias = weight.new_empty(0 if bias is None else bias.shape[0], dtype=dtype)
    if out.numel() == 0 and gated_bias.numel() == 0:
        return out, gated_bias
    like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))  # of logits, present or not
    block_i, block_j = tile(height, width, TILE // like.itemsize)
    with device_of(weight):
        gated_weight_kernel[(max(triton.cdiv(height, block_i), 1) * max(triton.cdiv(width, block_j), 1),)](
            weight, bias, rows, columns, out, gated_bias, _noise(noise, like), key, height, width, column_group,
            KIND=kind, IN_MEMORY=_in_memory(like), TRANSPOSED=transposed, COMPUTE=COMPUTE[like.dtype],
            BLOCK_I=block_i, BLOCK_J=block_j,
        )  # fmt: skip
    return out, gated_bias


def gate_gradient(
    a: Tensor, b: Tensor, logits: Tensor, kind: int, noise: float, key: Tensor | None, stream: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = a.shape
    gradient, of_values = torch.empty_like(logits), torch.empty_like(logits)
    scaled_sum = logits.new_empty(width)
    if width == 0:
        return gradient, of_values, scaled_sum
    compute = torch.promote_types(a.dtype, torch.float32)
    parts = a.new_empty((triton.cdiv(tokens, TOKENS.value), 2, width), dtype=compute)
    block = min(triton.next_power_of_2(width), TILE // 4 // STEP.value)
    with device_of(a):
        if tokens:
            sum_tokens_kernel[(parts.shape[0] * triton.cdiv(width, block),)](
                a, b, parts, tokens, width, a.stride(0), b.stride(0),
                COMPUTE=COMPUTE[compute], TOKENS=TOKENS, STEP=STEP, BLOCK=block,
            )  # fmt: skip
        products, sums = parts.sum(0, dtype=torch.float64)
        of_gates = products.view(-1, group).sum(1).to(logits.dtype)
        gate_gradient_kernel[(triton.cdiv(width, GATES),)](
            of_gates, sums.to(logits.dtype), logits, gradient, of_values, scaled_sum, _noise(noise, logits), key,
            stream, width, group, KIND=kind, IN_MEMORY=_in_memory(logits), BLOCK=GATES,
        )  # fmt: skip
    return gradient, of_values, scaled_sum


def _noise(noise: float, logits: Tensor) -> float | Tensor:
    return logits.new_tensor([noise]) if _in_memory(logits) else float(noise)


def _in_memory(logits: Tensor) -> bool:
    return logits.dtype == torch.float64
