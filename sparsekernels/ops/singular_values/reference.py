"""Gradients of singular values, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

from torch import Tensor

CHUNK = 1024  # tokens whose projections exist at a time


def singular_value_grad(grad: Tensor, u: Tensor, v: Tensor) -> Tensor:
    out = u.new_empty((u.shape[0], u.shape[2]))
    for i in range(u.shape[0]):
        out[i] = (u[i] * (grad[i].to(u.dtype) @ v[i])).sum(0)
    return out


def singular_value_grad_linear(grad_output: Tensor, input: Tensor, u: Tensor, v: Tensor, per_sample: bool) -> Tensor:
    if not per_sample:
        grad_output, input = grad_output.flatten(0, 1)[None], input.flatten(0, 1)[None]
    out = u.new_zeros((input.shape[0], u.shape[1]))
    for b in range(input.shape[0]):
        for dy, x in zip(grad_output[b].split(CHUNK), input[b].split(CHUNK), strict=True):
            out[b] += ((dy.to(u.dtype) @ u) * (x.to(u.dtype) @ v)).sum(0)
    return out if per_sample else out[0]


def singular_value_grad_fake(grad: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return u.new_empty((u.shape[0], u.shape[2]))


def singular_value_grad_linear_fake(
    grad_output: Tensor, input: Tensor, u: Tensor, v: Tensor, per_sample: bool
) -> Tensor:
    return u.new_empty((input.shape[0], u.shape[1]) if per_sample else (u.shape[1],))
