"""Squares of per-sample gradients, summed over samples (Fisher) or over weights (norms); none is ever stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...index import Index
from ..backend import Backend, select
from ..columns import take_columns
from ..common.arguments import accumulation_dtype, check_floating, packed
from ..common.bands import as_blocks, bands


def fisher_squares_(totals: Sequence[Tensor], grads: Sequence[Tensor], *, backend: Backend | None = None) -> None:
    """Add the square of each gradient to its total, in place.

    Equivalent to `for total, grad in zip(totals, grads): total += grad.to(total.dtype).square()`.

    Args:
        totals (fp32; fp64 for fp64 gradients): contiguous; changed in place.
        grads (fp32, fp64, bf16 or fp16, all of one dtype, shapes as totals): not changed.

    Numerics: squared in the dtype of totals. Deterministic.
    Cost: one read of grads, one read and write of totals.

    Raises:
        ValueError: lengths, shapes, dtypes, devices or contiguity do not fit; nothing is written then.

    Source: FISH (Sung et al., arXiv 2111.09839), section 3.1.

    Examples:
        >>> total = torch.tensor([1.0, 1.0])
        >>> sk.ops.fisher_squares_([total], [torch.tensor([2.0, 3.0])])
        >>> total
        tensor([ 5., 10.])
    """
    totals, grads = list(totals), list(grads)
    if len(totals) != len(grads):
        raise ValueError(f"totals has {len(totals)} tensors, grads {len(grads)}")
    for i, (total, grad) in enumerate(zip(totals, grads, strict=True)):
        _check_activation(f"grads[{i}]", grad, like=grads[0])
        _check_sum(f"totals[{i}]", total, grad.shape, grad)
    if totals:
        select("fisher_squares_", totals[0].device.type, backend)(totals, [packed(grad) for grad in grads])
        torch.autograd.graph.increment_version(totals)


def fisher_linear_(
    grad_output: Tensor,
    input: Tensor,
    total: Tensor | None = None,
    norms: Tensor | None = None,
    index: Index | None = None,
    *,
    backend: Backend | None = None,
) -> None:
    """Add a Linear's squared per-sample weight gradients to `total`, their sums over the weight to `norms`, in place.

    Equivalent to

        g = torch.einsum("bsm,bsn->bmn", grad_output, input)[:, index]  # only a tile of a sample exists at a time
        total += g.square().sum(0); norms += g.square().flatten(1).sum(1)

    Args:
        grad_output ([B, S, M], fp32, fp64, bf16, fp16): gradient of the layer's output, of the sum of the per-sample
            losses. A token whose row is all zeros counts as padding, whatever its input: pad ragged samples with zeros.
        input ([B, S, N], same dtype): the layer's input.
        total ([M, N], or index.compact_shape; fp32, fp64 for fp64 activations): changed in place; None: not wanted.
        norms ([B], dtype of total): changed in place; None: not wanted.
        index: positions in the [M, N] weight; None for all of it.

    Numerics: products and squares in the dtype of total; norms are summed in fp64, except for runs of a few squares.
    Deterministic.
    Cost: 2*B*S*M*N operations, or 2*B*S*K where few elements are selected; one read and write of total for a chunk of
    about 1024 tokens on the CPU, for all of them on a GPU. Copies: of the chunk, packed; on a GPU, with elements
    selected, both activations transposed, or an int32 map of M*N entries. Columns: as a Linear with these inputs alone.
    Blocks: a Linear for each set of rows that some blocks have.

    Raises:
        ValueError: shapes, dtypes, devices or contiguity do not fit; nothing is written then.

    Source: FISH (Sung et al., arXiv 2111.09839), section 3.1; per-sample gradients from activations as in Goodfellow,
    arXiv 1510.01799.

    Examples:
        >>> grad_output, input = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])
        >>> total, norms = torch.zeros(1, 2), torch.zeros(2)
        >>> sk.ops.fisher_linear_(grad_output, input, total, norms)
        >>> total, norms
        (tensor([[9., 4.]]), tensor([9., 4.]))
    """
    _check_activation("grad_output", grad_output, dims=3)
    _check_activation("input", input, like=grad_output, dims=3)
    if input.shape[:2] != grad_output.shape[:2]:
        raise ValueError(f"grad_output is {list(grad_output.shape)}, input {list(input.shape)}: B and S must agree")
    shape = torch.Size((grad_output.shape[2], input.shape[2]))
    _check_sums(grad_output, shape, total, norms, index)
    if total is None and norms is None:
        return
    run = select("fisher_linear_", input.device.type, backend)
    grad_output, input = packed(grad_output), packed(input)
    if index is None or index.granularity in ("element", "row"):
        run(grad_output, input, total, norms, *_selected(index))
    elif index.granularity == "column":  # of these input features, all
        run(grad_output, take_columns(input, index.positions), total, norms, None, False)
    else:
        for rows, columns, blocks in bands(index, across=True):
            part = None if total is None else total.new_zeros(rows.stop - rows.start, len(columns))
            run(packed(grad_output[..., rows]), take_columns(input, columns), part, norms, None, False)
            if total is not None and part is not None:
                total[blocks] += as_blocks(part, index, across=True)
    _bump(total, norms)


def fisher_embedding_(
    grad_output: Tensor,
    ids: Tensor,
    total: Tensor | None = None,
    norms: Tensor | None = None,
    index: Index | None = None,
    *,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> None:
    """Add the squared per-sample gradients of an Embedding's table to `total`, their sums over it to `norms`, in place.

    Equivalent to

        g = torch.zeros(B, V, D)
        for b in range(B): g[b].index_add_(0, ids[b], grad_output[b])  # tokens of one id are summed, then squared
        total += g[:, index].square().sum(0); norms += g[:, index].square().flatten(1).sum(1)

    Args:
        grad_output ([B, S, D], fp32, fp64, bf16, fp16): of the looked-up rows, of the sum of per-sample losses.
        ids ([B, S], int32 or int64): the looked-up rows, any order, with duplicates; in [0, V).
        total ([V, D], or index.compact_shape; fp32, fp64 for fp64 gradients): changed in place; None: not wanted.
        norms ([B], dtype of total): changed in place; None: not wanted.
        index: positions in the [V, D] table; None for all of it.
        padding_idx: tokens with this id contribute nothing, as in `torch.nn.Embedding`.

    Numerics: tokens of one id are summed in their order, in the dtype of total; norms in fp64. Deterministic.
    Cost: a sort of the B*S ids, one read of grad_output, one read and write of a row of total for each id and sample.

    Raises:
        ValueError: shapes, dtypes, devices or contiguity do not fit; nothing is written then.
        RuntimeError: an id outside a total of whole rows (CPU kernel).

    Source: FISH (Sung et al., arXiv 2111.09839), section 3.1; per-sample gradients from activations as in Goodfellow,
    arXiv 1510.01799.

    Examples:
        >>> total, norms = torch.zeros(3, 1), torch.zeros(1)
        >>> sk.ops.fisher_embedding_(torch.ones(1, 3, 1), torch.tensor([[2, 0, 2]]), total, norms)
        >>> total, norms
        (tensor([[1.],
                [0.],
                [4.]]), tensor([5.]))
    """
    _check_activation("grad_output", grad_output, dims=3)
    if ids.shape != grad_output.shape[:2] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids must be int32 or int64 of shape {list(grad_output.shape[:2])}, got {ids.dtype} {list(ids.shape)}"
        )
    if ids.device != grad_output.device:
        raise ValueError(f"ids are on {ids.device}, grad_output on {grad_output.device}")
    table = index.shape[0] if index is not None and index.shape else total.shape[0] if total is not None else 0
    _check_sums(grad_output, torch.Size((table, grad_output.shape[2])), total, norms, index)
    if total is None and norms is None:
        return
    run = select("fisher_embedding_", ids.device.type, backend)
    padding = -1 if padding_idx is None else padding_idx
    grad_output, ids = packed(grad_output), ids.contiguous()
    if index is None or index.granularity in ("element", "row"):
        run(grad_output, ids, total, norms, *_selected(index), padding)
    elif index.granularity == "column":
        run(take_columns(grad_output, index.positions), ids, total, norms, None, False, padding)
    else:
        for columns, rows, blocks in bands(index, across=False):
            part = None if total is None else total.new_zeros(len(rows), columns.stop - columns.start)
            run(packed(grad_output[..., columns]), ids, part, norms, rows, True, padding)
            if total is not None and part is not None:
                total[blocks] += as_blocks(part, index, across=False)
    _bump(total, norms)


def fisher_vector_(
    grad_output: Tensor,
    input: Tensor | None = None,
    total: Tensor | None = None,
    norms: Tensor | None = None,
    index: Index | None = None,
    *,
    backend: Backend | None = None,
) -> None:
    """Add the squared per-sample gradients of a bias or a norm's weight to `total`, their sums to `norms`, in place.

    Equivalent to

        g = (grad_output * input).sum(1)[:, index]  # [B, M]; input None stands for ones: a bias
        total += g.square().sum(0); norms += g.square().sum(1)

    Args:
        grad_output ([B, S, M], fp32, fp64, bf16, fp16): of the output, of the sum of the per-sample losses.
        input ([B, S, M], same dtype): for the weight of a norm, its factor; None for a bias.
        total ([M], or [K] with an index; fp32, fp64 for fp64 activations): changed in place; None: not wanted.
        norms ([B], dtype of total): changed in place; None: not wanted.
        index: positions in the [M] parameter; None for all of it.

    Numerics: summed over tokens in the dtype of total; norms in fp64. Deterministic.
    Cost: one read of the activations.

    Raises:
        ValueError: shapes, dtypes, devices or contiguity do not fit; nothing is written then.

    Source: FISH (Sung et al., arXiv 2111.09839), section 3.1; per-sample gradients from activations as in Goodfellow,
    arXiv 1510.01799.

    Examples:
        >>> total = torch.zeros(2)
        >>> sk.ops.fisher_vector_(torch.tensor([[[1.0, 2.0], [1.0, 1.0]]]), total=total)  # of a bias
        >>> total
        tensor([4., 9.])
    """
    _check_activation("grad_output", grad_output, dims=3)
    if input is not None:
        _check_activation("input", input, like=grad_output, dims=3)
        if input.shape != grad_output.shape:
            raise ValueError(
                f"input must have the shape of grad_output, {list(grad_output.shape)}, got {list(input.shape)}"
            )
    _check_sums(grad_output, grad_output.shape[2:], total, norms, index)
    if total is None and norms is None:
        return
    run = select("fisher_vector_", grad_output.device.type, backend)
    run(packed(grad_output), None if input is None else packed(input), total, norms, _selected(index)[0])
    _bump(total, norms)


def _selected(index: Index | None) -> tuple[Tensor | None, bool]:
    return (None, False) if index is None else (index.positions, index.granularity == "row")


def _bump(*sums: Tensor | None) -> None:
    """Ops defined by hand do not increment versions themselves."""
    torch.autograd.graph.increment_version([x for x in sums if x is not None])


def _check_activation(name: str, x: Tensor, like: Tensor | None = None, dims: int | None = None) -> None:
    check_floating(name, x)
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must be [samples, tokens, width], got shape {list(x.shape)}")
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(f"{name} is {x.dtype} on {x.device}, expected {like.dtype} on {like.device}")


def _check_sum(name: str, x: Tensor, shape: torch.Size, activation: Tensor) -> None:
    compute = accumulation_dtype(activation.dtype)
    if x.shape != shape or x.dtype != compute or x.device != activation.device:
        raise ValueError(
            f"{name} must be {compute} of shape {list(shape)} on {activation.device}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but autograd does not record this write; detach it")


def _check_sums(
    activation: Tensor, shape: torch.Size, total: Tensor | None, norms: Tensor | None, index: Index | None
) -> None:
    if index is not None and index.shape != shape:
        raise ValueError(f"the index was made for shape {list(index.shape)}, the activations give {list(shape)}")
    if index is not None and index.positions.device != activation.device:
        raise ValueError(f"the index is on {index.positions.device}, the activations on {activation.device}")
    if total is not None:
        _check_sum("total", total, shape if index is None else index.compact_shape, activation)
    if norms is not None:
        _check_sum("norms", norms, activation.shape[:1], activation)
