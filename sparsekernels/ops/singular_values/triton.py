"""Gradients of singular values, in Triton: a tile of projections lives in the registers of a program, nowhere else.

No atomics: a program leaves its sums at a place of its own, and every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gather_scatter.triton import device_of

# Rows that a program owns, pairs of vectors, terms of a product at a time, warps, stages: nothing spills.
TILE = (64, 64, 16, 4, 1)
DOUBLE_TILE = (32, 32, 1, 4, 3)


@triton.jit
def project(
    x, vectors, row, there, width, column, chosen, rank,
    TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """sum over k of x[row, k] * vectors[k, column], in the dtype of the vectors: [TILE_M, TILE_R]."""
    total = tl.zeros((TILE_M, TILE_R), vectors.dtype.element_ty)
    step = tl.arange(0, TILE_K)
    for start in range(0, width, TILE_K):
        k = start + step.to(tl.int64)
        live = k < width
        # Halves are widened before they are multiplied: the vectors are fp32, and the interpreter knows no bf16 dot.
        left = tl.load(x + row[:, None] * width + k[None, :], mask=there[:, None] & live[None, :], other=0)
        left = left.to(total.dtype)
        right = tl.load(vectors + k[:, None] * rank + column[None, :], mask=live[:, None] & chosen[None, :], other=0)
        if TILE_K == 1:  # an outer product: not every Triton has a tl.dot for fp64
            total += left * right
        else:
            total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def singular_value_grad_kernel(
    grad, u, v, shares, m, n, rank, TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr
):
    """One program owns TILE_M rows of one matrix by TILE_R pairs of vectors:

    shares[matrix, block of rows, i] = sum over its rows j of u[matrix, j, i] * (grad[matrix, j] . v[matrix, :, i]).
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(rank, TILE_R)
    column = program % across * TILE_R + tl.arange(0, TILE_R)
    chosen = column < rank
    block = program // across
    blocks = tl.cdiv(m, TILE_M)
    matrix = block // blocks
    place = block % blocks * TILE_M + tl.arange(0, TILE_M)
    there = place < m
    row = matrix * m + place
    right = project(grad, v + matrix * n * rank, row, there, n, column, chosen, rank, TILE_M, TILE_R, TILE_K)
    inside = there[:, None] & chosen[None, :]
    left = tl.load(u + row[:, None] * rank + column[None, :], mask=inside, other=0)
    tl.store(shares + block * rank + column, tl.sum(tl.where(inside, left * right, 0.0), 0), mask=chosen)


@triton.jit
def singular_value_grad_linear_kernel(
    grad_output, input, u, v, shares, tokens, m, n, rank,
    TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One program owns TILE_M tokens of one sample by TILE_R pairs of vectors:

    shares[sample, block of tokens, i] = sum over its tokens t of (grad_output[t] . u[:, i]) * (input[t] . v[:, i]).
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(rank, TILE_R)
    column = program % across * TILE_R + tl.arange(0, TILE_R)
    chosen = column < rank
    block = program // across
    blocks = tl.cdiv(tokens, TILE_M)
    place = block % blocks * TILE_M + tl.arange(0, TILE_M)
    there = place < tokens
    row = block // blocks * tokens + place
    left = project(grad_output, u, row, there, m, column, chosen, rank, TILE_M, TILE_R, TILE_K)
    right = project(input, v, row, there, n, column, chosen, rank, TILE_M, TILE_R, TILE_K)
    # 0 is no token's product where a vector holds infinity.
    product = tl.where(there[:, None], left * right, 0.0)
    tl.store(shares + block * rank + column, tl.sum(product, 0), mask=chosen)


def singular_value_grad(grad: Tensor, u: Tensor, v: Tensor) -> Tensor:
    count, m, n = grad.shape
    rank = u.shape[2]
    if grad.numel() == 0 or rank == 0:
        return u.new_zeros((count, rank))
    tile_m, tile_r, tile_k, warps, stages = DOUBLE_TILE if grad.dtype == torch.float64 else TILE
    shares = u.new_empty((count, triton.cdiv(m, tile_m), rank))
    with device_of(grad):
        singular_value_grad_kernel[(count * shares.shape[1] * triton.cdiv(rank, tile_r),)](
            grad, u, v, shares, m, n, rank,
            TILE_M=tile_m, TILE_R=tile_r, TILE_K=tile_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return shares.sum(1, dtype=torch.float64).to(u.dtype)


def singular_value_grad_linear(grad_output: Tensor, input: Tensor, u: Tensor, v: Tensor, per_sample: bool) -> Tensor:
    rank = u.shape[1]
    samples, tokens = input.shape[:2] if per_sample else (1, input.shape[0] * input.shape[1])
    if grad_output.numel() == 0 or input.numel() == 0 or rank == 0:
        return u.new_zeros((input.shape[0], rank) if per_sample else (rank,))
    tile_m, tile_r, tile_k, warps, stages = DOUBLE_TILE if input.dtype == torch.float64 else TILE
    shares = u.new_empty((samples, triton.cdiv(tokens, tile_m), rank))
    with device_of(input):
        singular_value_grad_linear_kernel[(samples * shares.shape[1] * triton.cdiv(rank, tile_r),)](
            grad_output, input, u, v, shares, tokens, grad_output.shape[2], input.shape[2], rank,
            TILE_M=tile_m, TILE_R=tile_r, TILE_K=tile_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    sums = shares.sum(1, dtype=torch.float64).to(u.dtype)
    return sums if per_sample else sums[0]
