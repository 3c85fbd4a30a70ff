"""Weight gradients at selected positions only; the dense gradient is never formed as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import Index
from ..backend import Backend, has_native, in_full_precision, select
from ..columns import take_columns
from ..common.arguments import accumulation_dtype, check_floating

# Above one element in this many, a dense product, a block of rows at a time, is faster than one dot product for each
# element (measured on two cores of Zen 4: 512 tokens, 2048 x 2048). An int, because torch.compile(dynamic=True)
# turns a float into an input of the graph, and fails if the backward of a second layer reads it.
DENSE_ABOVE_ONE_IN = 4

# Whether torch's products in bf16 are faster than those of the CPU kernel in fp32.
FAST_BF16 = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def masked_grad_linear(grad_output: Tensor, input: Tensor, index: Index, *, backend: Backend | None = None) -> Tensor:
    """Compute the weight gradient of a Linear at the selected positions.

    Equivalent to `gather(grad_output.T @ input, index)`, without the dense product.

    Args:
        grad_output ([T, M], fp32, fp64, bf16, fp16): gradient of the layer's output; leading dimensions are flattened.
            Not changed.
        input ([T, N], same dtype): the layer's input; not changed.
        index: positions in the [M, N] weight.

    Returns:
        (index.compact_shape, fp32; fp64 for fp64 inputs).

    Numerics: products accumulate in the dtype returned, and the result is deterministic. torch's matmul, with numerics
    of its own (a result rounded to the dtype of its inputs, TF32 on a GPU if that is allowed), computes rows and
    columns in bf16 where the CPU has instructions for it, single ones, and all of them without the CPU kernel; and, in
    the dtype returned, many elements.
    Cost: rows: a product with the selected columns of grad_output, 2*T*R*N operations; columns: with those of input,
    2*T*M*C; and a copy of these columns, by the CPU kernel of 2048 tokens at most, in the dtype returned. Blocks: 2*T
    operations for each element of a block, and a packed copy of what the block needs of either, a chunk of tokens at a
    time. Elements: 2*T*K operations and a transposed copy of both (on the CPU a block of tokens at a time); if many are
    selected, the dense product, a block of rows at a time, is faster: on the CPU past a quarter of all elements, unless
    a backend is named or torch.compile traces; on a GPU past 1 of 256 (bf16, fp16) or of 32, or more if tokens are few.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.

    Source: ours.

    Examples:
        >>> grad_output, input = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
        >>> sk.ops.masked_grad_linear(grad_output, input, sk.Index(torch.tensor([0, 5]), (2, 3)))
        tensor([ 3., 10.])
    """
    grad_output, input = grad_output.flatten(0, -2), input.flatten(0, -2)
    expected = torch.Size((grad_output.shape[1], input.shape[1]))
    if index.shape != expected or grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"grad_output {list(grad_output.shape)} and input {list(input.shape)} give a weight of {list(expected)}, "
            f"the index was made for {list(index.shape)}"
        )
    if grad_output.dtype != input.dtype:
        raise ValueError(f"grad_output is {grad_output.dtype}, input {input.dtype}; they must agree")
    _check_device(grad_output, index)
    device = input.device.type
    if index.granularity in ("row", "column") and _takes_matmul(index, input, backend):
        every = len(index) == index.num_positions
        if index.granularity == "row":
            grad_output = grad_output if every else take_columns(grad_output, index.positions)
        else:
            input = input if every else take_columns(input, index.positions)
        with in_full_precision(input):
            return _product(grad_output, input).to(accumulation_dtype(input.dtype))
    if (
        index.granularity == "element"
        and backend is None
        and device == "cpu"
        and DENSE_ABOVE_ONE_IN * len(index) > index.shape.numel()
    ):
        backend = None if torch.compiler.is_compiling() else "reference"  # it reads positions on the host
    run = select("masked_grad_linear", device, backend)
    return index.shaped(run(grad_output.contiguous(), input.contiguous(), index.positions, index.tile))


def masked_grad_embedding(
    grad_output: Tensor, ids: Tensor, index: Index, *, padding_idx: int | None = None, backend: Backend | None = None
) -> Tensor:
    """Compute the weight gradient of an Embedding at the selected positions.

    Equivalent to `gather(zeros(V, D).index_add_(0, ids, grad_output), index)`, without the [V, D] table.

    Args:
        grad_output ([T, D], fp32, fp64, bf16 or fp16): leading dimensions are flattened. Not changed.
        ids ([T], int32 or int64): the looked-up rows, any order, with duplicates.
        index: positions in the [V, D] table.
        padding_idx: tokens with this id contribute nothing, as in `torch.nn.Embedding`.

    Returns:
        (index.compact_shape, fp32; fp64 for fp64 gradients).

    Numerics: duplicates are summed in the order of the tokens, in the dtype returned. Deterministic.
    Cost: T lookups in the positions, and one read of grad_output for each token of a selected row. Columns: the same
    for all rows of a table of these columns.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.

    Source: ours.

    Examples:
        >>> ids, index = torch.tensor([4, 1, 4]), sk.Index(torch.tensor([4]), (5, 2), "row")
        >>> sk.ops.masked_grad_embedding(torch.ones(3, 2), ids, index)
        tensor([[2., 2.]])
    """
    grad_output, ids = grad_output.flatten(0, -2), ids.flatten()
    if len(index.shape) != 2 or grad_output.shape != (ids.shape[0], index.shape[1]):
        raise ValueError(
            f"grad_output must be [{ids.shape[0]} tokens, {list(index.shape)[-1:]} columns] for this index, "
            f"got {list(grad_output.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != grad_output.device:
        raise ValueError(f"ids must be int32 or int64 on {grad_output.device}, got {ids.dtype} on {ids.device}")
    _check_device(grad_output, index)
    run = select("masked_grad_embedding", ids.device.type, backend)
    padding = -1 if padding_idx is None else padding_idx
    positions, tile = index.positions, index.tile
    if index.granularity == "column":  # all rows of a narrower table
        grad_output = take_columns(grad_output, positions)
        positions, tile = torch.arange(index.shape[0], device=ids.device), (1, len(index))
    return index.shaped(run(grad_output.contiguous(), ids.contiguous(), positions, tile, padding))


def _takes_matmul(index: Index, input: Tensor, backend: Backend | None) -> bool:
    """Whether rows or columns are left to torch, which may use instructions for bf16, and is faster at a single one."""
    if backend is not None:
        return backend != "native"
    if index.tile == (1, 1) or not has_native("masked_grad_linear", input.device.type):
        return True
    return input.dtype == torch.bfloat16 and FAST_BF16


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b, contiguous. BLAS is up to half as fast where the right factor is the narrower one."""
    return a.T @ b if a.shape[1] <= b.shape[1] else (b.T @ a).T.contiguous()


def _check_device(grad_output: Tensor, index: Index) -> None:
    check_floating("grad_output", grad_output)
    if grad_output.device != index.positions.device:
        raise ValueError(f"grad_output is on {grad_output.device}, the index on {index.positions.device}")
