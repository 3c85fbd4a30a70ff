"""Stochastic gates in plain PyTorch: the oracle, and the fallback on every device; csrc/cpu/gate_rule.h is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.rounding import philox_words

STG, FINEGATES, HARD_CONCRETE = range(3)
LOW, HIGH = -0.1, 1.1  # what hard concrete gates stretch (0, 1) to, before they clamp
CHUNK = 1024  # tokens whose products exist at a time


def uniforms(count: int, key: Tensor, stream: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers from (0, 1) for each gate: 23 bits and a half of a step, so exact in fp32, and never 0 or 1."""
    gates = torch.arange(count, device=key.device)
    first, second, _, _ = philox_words(key, gates, stream, 0)
    return tuple(((word >> 9).to(dtype) + 0.5) * 2.0**-23 for word in (first, second))  # type: ignore[return-value]


def gate_values(logits: Tensor, kind: int, noise: float, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
    draws = None if key is None else uniforms(logits.shape[0], key, stream, logits.dtype)
    if kind == HARD_CONCRETE:
        s = logits.sigmoid()
        if draws is not None:
            s = ((draws[0].log() - (1 - draws[0]).log() + logits) / noise).sigmoid()
        before = s * (HIGH - LOW) + LOW
        slopes = (HIGH - LOW) * s * (1 - s) / (1 if draws is None else noise)
    else:
        means = logits.tanh() if kind == FINEGATES else logits
        before = means + 0.5
        if draws is not None:
            before = before + noise * ((-2 * draws[0].log()).sqrt() * (2 * math.pi * draws[1]).cos())
        slopes = 1 - means * means if kind == FINEGATES else torch.ones_like(logits)
    return before.clamp(0, 1), torch.where((before > 0) & (before < 1), slopes, 0)


def gate_probabilities(logits: Sequence[Tensor], kind: int, noise: float) -> tuple[Tensor, Tensor]:
    x = torch.cat(list(logits))
    if kind == HARD_CONCRETE:
        share = (x - noise * math.log(-LOW / HIGH)).sigmoid()
        return share, share * (1 - share)
    means = x.tanh() if kind == FINEGATES else x
    score = (means + 0.5) / noise
    slopes = (-0.5 * score * score).exp() / (math.sqrt(2 * math.pi) * noise)
    if kind == FINEGATES:
        slopes = slopes * (1 - means * means)
    return 0.5 * torch.special.erfc(score * -math.sqrt(0.5)), slopes


def gated_weight(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    kind: int,
    noise: float,
    key: Tensor | None,
    transposed: bool,
    dtype: torch.dtype,
    column_group: int,
) -> tuple[Tensor, Tensor]:
    """The bias comes out empty where there is none."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    out, shift = weight.to(compute), weight.new_empty(0) if bias is None else bias.to(compute)
    if rows is not None:
        z = gate_values(rows, kind, noise, key, 0)[0]
        out = out * (z if transposed else z[:, None])
        shift = shift if bias is None else shift * z
    if columns is not None:
        z = gate_values(columns, kind, noise, key, 1)[0].repeat_interleave(column_group)
        out = out * (z[:, None] if transposed else z)
    return out.to(dtype, copy=True), shift.to(dtype, copy=True)


def gate_gradient(
    a: Tensor, b: Tensor, logits: Tensor, kind: int, noise: float, key: Tensor | None, stream: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(a.dtype, torch.float32)
    products, sums = logits.new_zeros((2, a.shape[1]), dtype=torch.float64)
    for left, right in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        left = left.to(compute)
        products += (left * right.to(compute)).sum(0)
        sums += left.sum(0)
    z, slopes = gate_values(logits, kind, noise, key, stream)
    of_gates = products.view(logits.shape[0], group).sum(1).to(logits.dtype)
    of_values = torch.where(z == 0, 0, of_gates / z)
    each = z.repeat_interleave(group)
    scaled_sum = torch.where(each == 0, 0, each * sums.to(logits.dtype))
    return torch.where(slopes == 0, 0, slopes * of_values), of_values, scaled_sum


def gate_values_fake(logits: Tensor, kind: int, noise: float, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape)


def gate_probabilities_fake(logits: Sequence[Tensor], kind: int, noise: float) -> tuple[Tensor, Tensor]:
    count = sum(x.shape[0] for x in logits)
    return logits[0].new_empty(count), logits[0].new_empty(count)


def gated_weight_fake(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    kind: int,
    noise: float,
    key: Tensor | None,
    transposed: bool,
    dtype: torch.dtype,
    column_group: int,
) -> tuple[Tensor, Tensor]:
    count = 0 if bias is None else bias.shape[0]
    return weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(count, dtype=dtype)


def gate_gradient_fake(
    a: Tensor, b: Tensor, logits: Tensor, kind: int, noise: float, key: Tensor | None, stream: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape), logits.new_empty(a.shape[1])
