"""A linear layer that computes some of its outputs from some of its inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


class PrunedLinear(nn.Module):
    """`nn.Linear` that stores some rows and columns of its weight; the others are 0.

        y = input.new_zeros(*input.shape[:-1], out_features)
        y[..., rows] = input[..., columns] @ weight.T + bias

    Parameters are `weight` and `bias`, buffers `rows` and `columns`.

    Args:
        weight ([R, C], any floating dtype): a Parameter stays the same object, a tensor shares its memory.
        bias ([R], dtype and device of weight), or None: likewise. Outputs that are not in `rows` have no bias: they are
        0.
        rows ([R], integers): the outputs that are computed; sorted, unique, in [0, out_features). None: all.
        columns ([C], integers): the inputs that are read; sorted, unique, in [0, in_features). None: all.
        in_features: N, required with columns.
        out_features: M, required with rows.

    Cost: R * C multiplications per token instead of M * N, and as many stored elements. With columns, one more read of
    the input and a write of its C columns; with rows, one more read of R columns and a write of M.

    Raises:
        ValueError: shapes, dtypes, devices or sizes that do not fit, or rows or columns that are not sorted and unique.

    Source: ours.

    Examples:
        >>> layer = sk.PrunedLinear(torch.ones(2, 3), rows=torch.tensor([0, 3]), out_features=4)
        >>> layer(torch.ones(3))
        tensor([3., 0., 0., 3.], grad_fn=<_PutBackward>)
        >>> layer.to_linear().weight.shape
        torch.Size([4, 3])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    rows: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"weight must be [R, C] of a floating dtype, got {list(weight.shape)} of {weight.dtype}")
        self.out_features = _size("rows", rows, weight.shape[0], "out_features", out_features)
        self.in_features = _size("columns", columns, weight.shape[1], "in_features", in_features)
        if bias is not None and (bias.shape, bias.dtype, bias.device) != (
            weight.shape[:1],
            weight.dtype,
            weight.device,
        ):
            raise ValueError(
                f"bias must be [{weight.shape[0]}] of {weight.dtype} on {weight.device}, one for each row of weight; "
                f"got {list(bias.shape)} of {bias.dtype} on {bias.device}"
            )
        self.weight = _parameter(weight)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        for name, index in (("rows", rows), ("columns", columns)):
            self.register_buffer(name, None if index is None else index.to(weight.device, torch.int32))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if input.shape[-1] != self.in_features:
            raise ValueError(f"input must be [..., {self.in_features}], got {list(input.shape)}")
        if self.columns is not None:
            input = _Take.apply(input, self.columns)
        y = F.linear(input, self.weight, self.bias)
        return y if self.rows is None else _Put.apply(y, self.rows, self.out_features)

    def to_linear(self) -> nn.Linear:
        """Make a dense layer with zeros for everything left out, with the requires_grad of the weight and the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight.detach()
        if self.columns is not None:
            weight = weight.new_zeros(weight.shape[0], self.in_features).index_copy_(1, self.columns.long(), weight)
        linear.weight = nn.Parameter(self._spread(weight), self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self._spread(self.bias.detach()), self.bias.requires_grad)
        return linear.train(self.training)

    def _spread(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return x.clone()
        return x.new_zeros(self.out_features, *x.shape[1:]).index_copy_(0, self.rows.long(), x)

    def extra_repr(self) -> str:
        """Shape, and how many columns are read and rows computed."""
        rows, columns = self.weight.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"reads {columns:,} and computes {rows:,}"
        )


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        ctx.width = x.shape[-1]
        return ops.take_columns(x, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Put.apply(grad, *ctx.saved_tensors, ctx.width), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(columns)
        return ops.put_columns(x, columns, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Take.apply(grad, *ctx.saved_tensors), None, None


def _parameter(x: Tensor) -> nn.Parameter:
    return x if isinstance(x, nn.Parameter) else nn.Parameter(x.detach())


def _size(name: str, index: Tensor | None, count: int, feature: str, size: int | None) -> int:
    """Number of rows or columns of the dense weight."""
    if index is None:
        if size not in (None, count):
            raise ValueError(f"{feature} is {size}, but weight has {count} {name}; pass `{name}` to say which")
        return count
    if size is None:
        raise ValueError(f"{feature} must be given with {name}")
    if index.shape != (count,) or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"{name} must be integers of shape [{count}], one for each of weight's; got {index.dtype} of "
            f"{list(index.shape)}"
        )
    if count and (int(index[0]) < 0 or int(index[-1]) >= size or not bool((index[1:] > index[:-1]).all())):
        raise ValueError(f"{name} must be sorted, unique and lie in [0, {size}), as {feature} is {size}")
    return size
