"""Weight gradients at selected positions, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..common.arguments import accumulation_dtype

ROWS_AT_ONCE = 256  # rows of the dense gradient that exist at a time


def masked_grad_linear(grad_output: Tensor, input: Tensor, positions: Tensor) -> Tensor:
    n = input.shape[1]
    compute = input.to(accumulation_dtype(input.dtype))
    out = input.new_zeros(positions.shape[0], dtype=accumulation_dtype(input.dtype))
    starts = torch.arange(0, grad_output.shape[1] + ROWS_AT_ONCE, ROWS_AT_ONCE, device=positions.device)
    bounds = torch.searchsorted(positions, (starts * n).to(positions.dtype)).tolist()
    for block, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            first = block * ROWS_AT_ONCE
            dense = grad_output[:, first : first + ROWS_AT_ONCE].to(out.dtype).T @ compute
            out[begin:end] = dense.reshape(-1)[positions[begin:end].long() - first * n]
    return out


def masked_grad_embedding(grad_output: Tensor, ids: Tensor, positions: Tensor, rows: bool, padding_idx: int) -> Tensor:
    width = grad_output.shape[1]
    dtype = accumulation_dtype(grad_output.dtype)
    if positions.numel() == 0:
        return grad_output.new_zeros((0, width) if rows else (0,), dtype=dtype)
    positions = positions.long()
    row_of = positions if rows else positions // width
    hit = torch.isin(ids, row_of) & (ids != padding_idx)
    hit_rows, slot = torch.unique(ids[hit], return_inverse=True)
    sums = grad_output.new_zeros((hit_rows.shape[0], width), dtype=dtype)
    sums.index_add_(0, slot, grad_output[hit].to(dtype))
    chosen = torch.isin(row_of, hit_rows)
    sums_of = torch.searchsorted(hit_rows, row_of[chosen])
    out = grad_output.new_zeros((positions.shape[0], width) if rows else positions.shape, dtype=dtype)
    out[chosen] = sums[sums_of] if rows else sums[sums_of, positions[chosen] % width]
    return out


def masked_grad_linear_fake(grad_output: Tensor, input: Tensor, positions: Tensor) -> Tensor:
    return input.new_empty(positions.shape, dtype=accumulation_dtype(input.dtype))


def masked_grad_embedding_fake(
    grad_output: Tensor, ids: Tensor, positions: Tensor, rows: bool, padding_idx: int
) -> Tensor:
    shape = (positions.shape[0], grad_output.shape[1]) if rows else positions.shape
    return grad_output.new_empty(shape, dtype=accumulation_dtype(grad_output.dtype))
