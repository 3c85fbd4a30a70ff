"""A linear layer whose weight is stored as low-rank factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(eq=False)
class Block:
    """Rows of a weight that are factored together: `up @ down`, or `down` itself.

    Attributes:
        down ([r, N]): r may be 0. For a dense block the rows themselves, [M_k, N].
        up ([M_k, r]): None for a dense block.
    """

    down: Tensor
    up: Tensor | None = None

    @property
    def rows(self) -> int:
        """M_k, the number of rows of the weight."""
        return self.down.shape[0] if self.up is None else self.up.shape[0]

    @property
    def numel(self) -> int:
        """Number of stored elements."""
        return self.down.numel() + (0 if self.up is None else self.up.numel())


class LowRankLinear(nn.Module):
    """`nn.Linear` with its weight [M, N] in factors, split by rows into blocks, each low-rank or dense.

        y = torch.cat([(x @ b.down.T) @ b.up.T for b in blocks], -1)  # x @ b.down.T for a dense block
        y = y[..., rows.argsort()] + bias

    Parameters are `down` ([R, N], those of all blocks concatenated), `up0`, `up1`, ... ([M_k, r_k], one per low-rank
    block, by its number), and `bias`; a buffer `places` if the rows are permuted. They are copies of the arguments,
    except that a bias that is a Parameter stays the same object. They are trainable, unless the arguments are frozen
    Parameters.

    Args:
        blocks: at least one; factors of one floating dtype, on one device.
        bias ([M], same dtype and device), or None.
        rows ([M], integers): a permutation: the output that row j of the concatenated blocks computes. None: in order.

    Cost: R * N + sum(r_k * M_k) multiplications per token instead of M * N, and as many stored elements; rows of dense
    blocks count in R, and not in the sum. Smaller than a Linear if `is_smaller`: for one block if r < M * N / (M + N).

    Raises:
        ValueError: no blocks; shapes that do not fit each other; several dtypes or devices, or one that is not a
            floating-point dtype; rows that are not a permutation.

    Source: LASER (Sharma et al., arXiv 2312.13558) for low-rank weights; blocks of rows as in arXiv 2510.20800.

    Examples:
        >>> from sparsekernels.nn.low_rank import Block
        >>> u, s, v = torch.linalg.svd(torch.randn(64, 4) @ torch.randn(4, 32))
        >>> layer = sk.LowRankLinear([Block(down=s[:4, None] * v[:4], up=u[:, :4])])
        >>> layer.in_features, layer.out_features, layer.rows, layer.is_smaller(layer.blocks)
        (32, 64, None, True)
        >>> torch.equal(layer.to_linear().weight, layer.weight)
        True
    """

    down: nn.Parameter
    bias: nn.Parameter | None
    places: Tensor | None

    def __init__(self, blocks: Sequence[Block], bias: Tensor | None = None, rows: Tensor | None = None) -> None:
        super().__init__()
        blocks = list(blocks)
        _check(blocks, bias, rows)
        self.ranks = [block.down.shape[0] for block in blocks]
        self.down = _parameter([block.down for block in blocks])
        for k, block in enumerate(blocks):
            self.register_parameter(f"up{k}", None if block.up is None else _parameter([block.up]))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = _parameter([bias])
        self.register_parameter("bias", bias)
        self.register_buffer("places", None if rows is None else rows.to(self.down.device, torch.int64).argsort())

    @property
    def blocks(self) -> list[Block]:
        """The blocks: views of `down`, and the parameters `up0`, ..."""
        return [Block(down, up) for down, up in zip(self.down.split(self.ranks), self._ups(), strict=True)]

    @property
    def in_features(self) -> int:
        """N, the number of inputs."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """M, the number of outputs."""
        return sum(rank if up is None else up.shape[0] for rank, up in zip(self.ranks, self._ups(), strict=True))

    @property
    def rows(self) -> Tensor | None:
        """The permutation, as passed to the constructor."""
        return None if self.places is None else self.places.argsort()

    @property
    def weight(self) -> Tensor:
        """The dense weight [M, N], multiplied in fp32 (fp64 for fp64) and rounded; differentiable.

        Recomputed at every access, at the cost of a forward of N tokens; for the dtype or device alone, read `down`'s.
        """
        compute_dtype = torch.promote_types(self.down.dtype, torch.float32)
        with torch.autocast(self.down.device.type, enabled=False):
            parts = [
                b.down if b.up is None else (b.up.to(compute_dtype) @ b.down.to(compute_dtype)).to(b.down)
                for b in self.blocks
            ]
            weight = torch.cat(parts)
        return weight if self.places is None else weight[self.places]

    def forward(self, input: Tensor) -> Tensor:
        """[..., N] to [..., M]."""
        ups = self._ups()
        if len(ups) == 1 and self.places is None:
            up = ups[0]
            if up is None:
                return F.linear(input, self.down, self.bias)
            return F.linear(F.linear(input, self.down), up, self.bias)
        pieces = F.linear(input, self.down).split(self.ranks, -1)
        y = torch.cat([p if up is None else F.linear(p, up) for p, up in zip(pieces, ups, strict=True)], -1)
        if self.places is not None:
            # On the CPU, index_select of 2-byte elements takes three times as long as via fp32.
            slow = y.device.type == "cpu" and y.itemsize == 2
            y = (y.float() if slow else y).index_select(-1, self.places).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_linear(self) -> nn.Linear:
        """Make a dense layer with this `weight` and a copy of the bias; requires_grad as of `down` and the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach(), self.down.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @staticmethod
    def is_smaller(blocks: Sequence[Block]) -> bool:
        """Whether the blocks have fewer elements than their dense weight: for one block, if r < M * N / (M + N)."""
        return sum(b.numel for b in blocks) < sum(b.rows * b.down.shape[1] for b in blocks)

    def extra_repr(self) -> str:
        """Shape, rank of each block, and number of stored elements."""
        kinds = ["dense" if up is None else rank for rank, up in zip(self.ranks, self._ups(), strict=True)]
        stored = sum(block.numel for block in self.blocks)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ranks={kinds}, "
            f"bias={self.bias is not None}, stores {stored:,} for {self.in_features * self.out_features:,} elements"
        ).replace("'", "")

    def _ups(self) -> list[nn.Parameter | None]:
        return [getattr(self, f"up{k}") for k in range(len(self.ranks))]


def _parameter(parts: Sequence[Tensor]) -> nn.Parameter:
    """A copy, which keeps no other memory alive that the parts are views of."""
    trains = any(not isinstance(part, nn.Parameter) or part.requires_grad for part in parts)
    return nn.Parameter(torch.cat([part.detach() for part in parts]), trains)


def _check(blocks: Sequence[Block], bias: Tensor | None, rows: Tensor | None) -> None:
    if not blocks:
        raise ValueError("blocks is empty; pass at least one Block, of rank 0 if the weight is zero")
    first = blocks[0].down
    if not first.is_floating_point():
        raise ValueError(f"blocks: factors must have a floating-point dtype, got {first.dtype}; convert them")
    given, columns = {"bias": bias}, first.shape[-1] if first.dim() else 0
    for k, block in enumerate(blocks):
        given.update({f"blocks[{k}].down": block.down, f"blocks[{k}].up": block.up})
        if block.down.dim() != 2 or block.down.shape[1] != columns:
            raise ValueError(
                f"blocks[{k}].down must be [r, N] with the N of all blocks, {columns}; got {list(block.down.shape)}"
            )
        if block.up is not None and (block.up.dim() != 2 or block.up.shape[1] != block.down.shape[0]):
            raise ValueError(
                f"blocks[{k}].up must be [M, r] with r = {block.down.shape[0]} as in its down; "
                f"got {list(block.up.shape)}"
            )
    for name, tensor in given.items():
        if tensor is not None and (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, blocks[0].down {first.dtype} on {first.device}; "
                "convert one with .to()"
            )
    outputs = sum(block.rows for block in blocks)
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], the number of rows of the blocks; got {list(bias.shape)}")
    if rows is not None:
        fits = rows.shape == (outputs,) and not rows.is_floating_point() and rows.dtype != torch.bool
        if not fits or not torch.equal(rows.long().sort().values, torch.arange(outputs, device=rows.device)):
            raise ValueError(
                f"rows must contain each of 0 to {outputs - 1} once, in an integer tensor; got {list(rows.shape)} "
                f"of {rows.dtype}; for rows in order pass None"
            )
