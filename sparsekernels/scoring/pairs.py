"""The two activations whose product is a parameter's gradient, and the ops that square it per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..index import Index
from ..ops import fisher_embedding_, fisher_linear_, fisher_vector_
from ..structure.layers import kind_of


@dataclass
class Pair:
    """One use of a parameter: the gradient of sample b is the sum over tokens s of left[b, s] times right[b, s].

    kind "matrix": outer product of left [B, S, M] and right [B, S, N], for a weight [M, N].
    kind "lookup": right [B, S] are row numbers of a table to which left [B, S, D] is added.
    kind "vector": elementwise product of left [B, S, M] and right, of the same shape or None for ones.
    """

    kind: str
    left: Tensor
    right: Tensor | None
    padding_idx: int | None = None


def pair_of(module: nn.Module, attribute: str, grad: Tensor, x: Tensor) -> Pair:
    """The pair for one parameter of a module, from the gradient of its output [B, S, ...] and its input.

    The input is cast to the dtype of the gradient, in which autocast computes.
    """
    kind = kind_of(module)
    if attribute == "bias":
        return Pair("vector", grad, None)
    if kind == "embedding":
        return Pair("lookup", grad, x.reshape(grad.shape[:2]), module.padding_idx)  # type: ignore[arg-type]
    if kind == "norm":
        return Pair("vector", grad, _normalised(module, x).to(grad.dtype).reshape(grad.shape))
    x = x.to(grad.dtype).reshape(*grad.shape[:2], -1)
    return Pair("matrix", x, grad) if kind == "conv1d" else Pair("matrix", grad, x)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The factor of a norm's weight: its output for a weight of ones minus that for zeros."""
    with torch.no_grad():
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        one, zero = (
            torch.func.functional_call(module, {"weight": torch.full_like(module.weight, value)}, (x,))  # type: ignore[arg-type]
            for value in (1.0, 0.0)
        )
        return one - zero  # type: ignore[no-any-return]


def uncancelled(pairs: Sequence[Pair]) -> float:
    """The mean over samples of the squared norm that the gradient would have if the tokens' parts were orthogonal."""
    total = 0.0
    for pair in pairs:
        if pair.kind == "vector":
            parts = pair.left.double() if pair.right is None else pair.left.double() * pair.right
        else:
            parts = torch.linalg.vector_norm(pair.left, dim=-1, dtype=torch.float64)
            if pair.kind == "matrix":
                assert pair.right is not None
                parts = parts * torch.linalg.vector_norm(pair.right, dim=-1, dtype=torch.float64)
        total += float(torch.linalg.vector_norm(parts, dtype=torch.float64)) ** 2 / len(pair.left)
    return total


def add_squares_(
    pairs: Sequence[Pair], shape: torch.Size, total: Tensor | None, norms: Tensor | None, index: Index | None
) -> None:
    """Square the per-sample gradients of one parameter of this shape; several uses are concatenated along tokens."""
    first = pairs[0]
    if len({pair.kind for pair in pairs}) > 1:
        _tied(pairs, shape[0], total, norms, index)
        return
    left = first.left if len(pairs) == 1 else torch.cat([pair.left for pair in pairs], 1)
    rights = [pair.right for pair in pairs if pair.right is not None]
    right = torch.cat(rights, 1) if len(rights) > 1 else first.right
    if first.kind == "vector":
        fisher_vector_(left, right, total, norms, index)
    elif first.kind == "lookup":
        assert right is not None
        fisher_embedding_(left, right, total, norms, index, padding_idx=first.padding_idx)
    else:
        assert right is not None
        fisher_linear_(left, right, total, norms, index)


def _tied(pairs: Sequence[Pair], table: int, total: Tensor | None, norms: Tensor | None, index: Index | None) -> None:
    """A matrix that is both looked up and multiplied, as one product: a lookup is a product with one-hot rows.

    One sample at a time, since one-hot rows are as long as the table.
    """
    for b in range(len(pairs[0].left)):
        lefts, rights = [], []
        for pair in pairs:
            assert pair.right is not None
            left, right = pair.left[b], pair.right[b]
            if pair.kind == "lookup":
                left, right = F.one_hot(right.long(), table).to(left.dtype), left
                if pair.padding_idx is not None:
                    left[pair.right[b] == pair.padding_idx] = 0
            lefts.append(left)
            rights.append(right)
        norm = None if norms is None else norms[b : b + 1]
        fisher_linear_(torch.cat(lefts)[None], torch.cat(rights)[None], total, norm, index)
