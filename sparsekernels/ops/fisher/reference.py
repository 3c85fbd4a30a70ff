"""Squares of per-sample gradients, in plain PyTorch: the oracle, and the fallback on every device.

Every function makes the gradient of one sample after the other and hands it to `_add`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.arguments import accumulation_dtype


def fisher_squares_(totals: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for total, grad in zip(totals, grads, strict=True):
        total += grad.to(total.dtype).square()


def fisher_linear_(
    grad_output: Tensor,
    input: Tensor,
    total: Tensor | None,
    norms: Tensor | None,
    positions: Tensor | None,
    rows: bool,
) -> None:
    compute = accumulation_dtype(input.dtype)
    for b in range(grad_output.shape[0]):
        real = grad_output[b].ne(0).any(1)
        _add(grad_output[b, real].to(compute).T @ input[b, real].to(compute), b, total, norms, positions, rows)


def fisher_embedding_(
    grad_output: Tensor,
    ids: Tensor,
    total: Tensor | None,
    norms: Tensor | None,
    positions: Tensor | None,
    rows: bool,
    padding_idx: int,
) -> None:
    width = grad_output.shape[2]
    for b in range(grad_output.shape[0]):
        real = ids[b] != padding_idx
        found, slot = ids[b, real].unique(return_inverse=True)
        grad = grad_output.new_zeros((found.shape[0], width), dtype=accumulation_dtype(grad_output.dtype))
        grad.index_add_(0, slot, grad_output[b, real].to(grad.dtype))
        square = grad.square_()
        if positions is None:
            if total is not None:
                total[found] += square
            if norms is not None:
                norms[b] += square.sum()
            continue
        # The selected part, compact: the entries of `positions` whose row occurs in this sample.
        row_of = positions if rows else positions // width
        chosen = torch.isin(row_of, found).nonzero().squeeze(1)
        at = torch.searchsorted(found, row_of[chosen].to(found.dtype))
        selected = square[at] if rows else square[at, positions[chosen] % width]
        if total is not None:
            total[chosen] += selected
        if norms is not None:
            norms[b] += selected.sum()


def fisher_vector_(
    grad_output: Tensor, input: Tensor | None, total: Tensor | None, norms: Tensor | None, positions: Tensor | None
) -> None:
    compute = accumulation_dtype(grad_output.dtype)
    for b in range(grad_output.shape[0]):
        product = grad_output[b].to(compute) if input is None else grad_output[b].to(compute) * input[b].to(compute)
        _add(product.sum(0), b, total, norms, positions, rows=False)


def _add(
    grad: Tensor, sample: int, total: Tensor | None, norms: Tensor | None, positions: Tensor | None, rows: bool
) -> None:
    """Square the gradient of one sample, at the positions only, and add it up."""
    if positions is not None:
        grad = grad[positions] if rows else grad.reshape(-1)[positions]
    square = grad.square()
    if total is not None:
        total += square
    if norms is not None:
        norms[sample] += square.sum()
