"""Gradients of singular values on a GPU: projections by torch's matmul, their products summed by Triton.

No atomics: a program leaves its sums at a place of its own, and every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.products import product
from ..common.triton import device_of

ROWS, BLOCK_R = tl.constexpr(128), 64  # rows and pairs of vectors of a program
STEP = tl.constexpr(16)  # rows that it takes at a time
BLOCK = 1024  # numbers of a program that splits them
CHUNK_BYTES = 2**27  # of the projections of one side, or of copies of its activation, that exist at a time


@triton.jit
def dot_columns_kernel(a, b, shares, rows, rank, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr):
    """One program owns ROWS rows of a group by BLOCK_R columns: shares[group, block] = sum over them of a * b."""
    program = tl.program_id(0).to(tl.int64)
    across, blocks = tl.cdiv(rank, BLOCK_R), tl.cdiv(rows, ROWS)
    column = program % across * BLOCK_R + tl.arange(0, BLOCK_R)
    block = program // across
    first = block % blocks * ROWS
    place = block // blocks * rows
    total = tl.zeros((STEP, BLOCK_R), shares.dtype.element_ty)
    for start in range(0, ROWS, STEP):
        row = first + start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < rank)[None, :]
        where = (place + row)[:, None] * rank + column[None, :]
        total += tl.load(a + where, mask=inside, other=0) * tl.load(b + where, mask=inside, other=0)
    tl.store(shares + block * rank + column, tl.sum(total, 0), mask=column < rank)


@triton.jit
def split_kernel(x, parts, count, BLOCK: tl.constexpr):
    """One program owns BLOCK numbers in fp32: the sum of parts[:, i], three in bf16, is x[i]; the smallest is first."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    rest = tl.load(x + i, mask=inside, other=0)
    place = parts + i + 2 * tl.cast(count, tl.int64)
    for _ in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        tl.store(place, part, mask=inside)
        place -= count
        wide = part.to(tl.float32)
        rest = tl.where(wide - wide == 0.0, rest - wide, 0.0)  # what is not finite lies in the largest part alone


class Projection:
    """x -> x @ vectors, in the dtype of the vectors; vectors are [N, R] and x is [T, N] in its own dtype.

    By parts, bf16 is multiplied as such: fp32 vectors are the sum of three bf16 matrices, which go below each other, x
    three times beside itself. All products are exact, and added up in fp32 the smallest first, for tensor cores cut off
    what they add. Counted, not measured yet: their three passes take a fifth of the time of one in fp32.
    """

    def __init__(self, vectors: Tensor, dtype: torch.dtype) -> None:
        self.by_parts = vectors.dtype == torch.float32 and dtype == torch.bfloat16 and has_tensor_cores(vectors)
        self.dtype = vectors.dtype
        self.vectors = bf16_parts(vectors).flatten(0, 1) if self.by_parts else vectors

    def __call__(self, x: Tensor) -> Tensor:
        return product(x.repeat(1, 3) if self.by_parts else x.to(self.dtype), self.vectors, self.dtype)

    def bytes(self) -> int:
        """Of what a token needs meanwhile."""
        width, rank = self.vectors.shape
        return max(self.dtype.itemsize * rank, self.vectors.itemsize * width)


def has_tensor_cores(x: Tensor) -> bool:
    """Whether x lies on a GPU that multiplies bf16 with them: Ampere and newer."""
    return x.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(x.device) >= (8, 0)


def bf16_parts(x: Tensor) -> Tensor:
    """[3, *x.shape], bf16: x in fp32 is their sum, added from the first one, if it is no larger than bf16's largest."""
    x = x.contiguous()
    parts = x.new_empty((3, *x.shape), dtype=torch.bfloat16)
    if x.numel():
        with device_of(x):
            split_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, parts, x.numel(), BLOCK=BLOCK)
    return parts


def singular_value_grad(grad: Tensor, u: Tensor, v: Tensor) -> Tensor:
    count, m, _ = grad.shape
    if grad.numel() == 0 or u.shape[2] == 0:
        return u.new_zeros((count, u.shape[2]))
    found = [_dot_columns(u[i], product(grad[i].to(u.dtype), v[i], u.dtype), m)[0] for i in range(count)]
    return torch.stack(found).to(u.dtype)


def singular_value_grad_linear(grad_output: Tensor, input: Tensor, u: Tensor, v: Tensor, per_sample: bool) -> Tensor:
    samples, tokens = input.shape[:2]
    rank = u.shape[1]
    if grad_output.numel() == 0 or input.numel() == 0 or rank == 0:
        return u.new_zeros((samples, rank) if per_sample else (rank,))
    left, right = Projection(u, input.dtype), Projection(v, input.dtype)
    group = tokens if per_sample else 1
    height = max(1, CHUNK_BYTES // (max(left.bytes(), right.bytes()) * group)) * group
    chunks = zip(grad_output.flatten(0, 1).split(height), input.flatten(0, 1).split(height), strict=True)
    sums = [_dot_columns(left(dy), right(x), tokens if per_sample else len(x)) for dy, x in chunks]
    return torch.cat(sums).to(u.dtype) if per_sample else torch.cat(sums).sum(0).to(u.dtype)


def _dot_columns(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """[T / rows, R], fp64: sums over each so many rows of a * b."""
    groups, rank = len(a) // rows, a.shape[1]
    shares = a.new_empty((groups, triton.cdiv(rows, ROWS.value), rank))
    with device_of(a):
        dot_columns_kernel[(groups * shares.shape[1] * triton.cdiv(rank, BLOCK_R),)](
            a, b, shares, rows, rank, ROWS=ROWS, STEP=STEP, BLOCK_R=BLOCK_R
        )
    return shares.sum(1, dtype=torch.float64)
