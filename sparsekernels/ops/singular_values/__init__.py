"""Gradients of singular values: the derivative of the loss by each of them alone, without any R x R product."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, select
from ..common.arguments import accumulation_dtype, check_floating, packed


def singular_value_grad(grad: Tensor, u: Tensor, v: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Compute the gradient of the singular values of weights from the gradient of the weights.

    Equivalent to `torch.diagonal(u.mT @ grad.to(u.dtype) @ v, dim1=-2, dim2=-1)`, without the R x R product.

    Args:
        grad ([L, M, N] or, of one matrix, [M, N]; fp32, fp64, bf16, fp16): gradient of the weights; not changed.
        u ([L, M, R] or [M, R]; fp32, fp64 for an fp64 gradient): left singular vectors, one per column; not changed.
        v ([L, N, R] or [N, R], dtype of u): right singular vectors; not changed. For `torch.linalg.svd`'s Vh, pass
            `Vh.mT`. R is any number of pairs, in any order; they need not be orthogonal or of length 1.

    Returns:
        ([L, R] or [R], dtype of u): sum over m, n of u[m, i] * grad[m, n] * v[n, i].

    Numerics: products in the dtype of u, each summed over N, on a GPU by torch's matmul; sums over M in fp64, except
    for runs of eight on the CPU and of a block on a GPU. Deterministic.
    Cost: 2*L*M*N*R operations, one read of grad. Copies on the CPU: of v, packed, one matrix at a time or as many as
    fit 16 MiB; on a GPU, one matrix at a time: `grad @ v`, and of a half-precision grad in fp32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Sreeram et al., Compress to Impress, arXiv 2510.20800.

    Examples:
        >>> grad, eye = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.eye(2)
        >>> sk.ops.singular_value_grad(grad, u=eye, v=eye)
        tensor([1., 4.])
    """
    check_floating("grad", grad)
    if grad.dim() not in (2, 3):
        raise ValueError(f"grad must be [L, M, N], or [M, N] of one matrix, got shape {list(grad.shape)}")
    _check_vectors("u", u, grad, "grad", (*grad.shape[:-2], grad.shape[-2]), None)
    _check_vectors("v", v, grad, "grad", (*grad.shape[:-2], grad.shape[-1]), u.shape[-1])
    single = grad.dim() == 2
    if single:
        grad, u, v = grad[None], u[None], v[None]
    out = select("singular_value_grad", grad.device.type, backend)(packed(grad), packed(u), packed(v))
    return out[0] if single else out


def singular_value_grad_linear(
    grad_output: Tensor,
    input: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    per_sample: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Compute the gradient of the singular values of a Linear's weight directly from its activations.

    Equivalent to

        out = ((grad_output.to(u.dtype) @ u) * (input.to(u.dtype) @ v)).sum(1)  # [B, R]; neither factor is kept
        return out if per_sample else out.sum(0)

    Args:
        grad_output ([B, S, M], fp32, fp64, bf16, fp16): gradient of the layer's output; pad ragged samples with zeros.
            Not changed. [T, M] without per_sample.
        input ([B, S, N] or [T, N], same dtype): the layer's input; not changed.
        u ([M, R], fp32, fp64 for fp64 activations): left singular vectors of the weight, one per column; not changed.
        v ([N, R], dtype of u): right singular vectors; not changed. For `torch.linalg.svd`'s Vh, pass `Vh.T`.
        per_sample: return each sample's own gradient; grad_output must be that of the sum of the per-sample losses.

    Returns:
        ([R], or [B, R] with per_sample; dtype of u).

    Numerics: products in the dtype of u, each summed over M or N, on a GPU by torch's matmul (bf16 activations there:
    exact products with the three bf16 parts of fp32 vectors, summed in fp32 on tensor cores; a token with infinity
    gives NaN); sums over tokens in fp64, except for runs of eight on the CPU and of a block on a GPU. Deterministic.
    Cost: 2*T*R*(M + N) operations for T = B*S tokens; on a GPU for bf16 three times as many, in bf16. On the CPU,
    unless per sample, 2*M*N*(T + R) where that is less: a few rows of the weight's gradient then exist at a time.
    Copies on the CPU, packed: of u and v; or of one of them and of the narrower activation, 16384 tokens at a time. On
    a GPU: projections, 128 MiB of either activation at a time; for bf16 also 1.5 times the size of u and v, and three
    copies of the projected activation, 128 MiB at a time.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Sreeram et al., Compress to Impress, arXiv 2510.20800; without the gradient of the weight: ours.

    Examples:
        >>> grad_output, input, eye = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> sk.ops.singular_value_grad_linear(grad_output, input, u=eye, v=eye)
        tensor([3., 8.])
    """
    check_floating("grad_output", grad_output)
    check_floating("input", input)
    if grad_output.dim() not in (2, 3):
        raise ValueError(
            f"grad_output must be [samples, tokens, width] or [tokens, width], got shape {list(grad_output.shape)}"
        )
    if per_sample and grad_output.dim() == 2:
        raise ValueError(
            f"per_sample needs a grad_output of [samples, tokens, width], got shape {list(grad_output.shape)}"
        )
    if input.dtype != grad_output.dtype or input.device != grad_output.device:
        raise ValueError(
            f"input is {input.dtype} on {input.device}, expected {grad_output.dtype} on {grad_output.device}"
        )
    if input.shape[:-1] != grad_output.shape[:-1] or input.dim() != grad_output.dim():
        raise ValueError(
            f"grad_output is {list(grad_output.shape)}, input {list(input.shape)}: samples and tokens must agree"
        )
    _check_vectors("u", u, grad_output, "grad_output", grad_output.shape[-1:], None)
    _check_vectors("v", v, input, "input", input.shape[-1:], u.shape[-1])
    if grad_output.dim() == 2:
        grad_output, input = grad_output[None], input[None]
    run = select("singular_value_grad_linear", input.device.type, backend)
    return run(packed(grad_output), packed(input), packed(u), packed(v), per_sample)


def _check_vectors(
    name: str, x: Tensor, other: Tensor, other_name: str, lead: tuple[int, ...], rank: int | None
) -> None:
    """`lead` is the shape without the number of vectors, which must be `rank` unless that is None."""
    if x.dim() != len(lead) + 1 or tuple(x.shape[:-1]) != tuple(lead) or rank not in (None, x.shape[-1]):
        wanted = ", ".join(map(str, (*lead, "R" if rank is None else rank)))
        raise ValueError(
            f"{name} must have shape [{wanted}], a column for each singular value, to go with {other_name} "
            f"{list(other.shape)}{'' if rank is None else ' and u'}; got {list(x.shape)}"
        )
    compute = accumulation_dtype(other.dtype)
    if x.dtype != compute or x.device != other.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, expected {compute} on {other.device} to go with {other_name} of "
            f"{other.dtype}; pass {name}.to({other_name}.device, {compute})"
        )
