"""torch's gradient clipping, extended to sparse (COO) gradients, on which torch's own raises."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
    """Scale all gradients in place so that their total norm is at most `max_norm`; the Parameters do not change.

    As `torch.nn.utils.clip_grad_norm_`. A sparse gradient contributes the norm of its coalesced values: duplicate rows
    are added first, and `.grad` is left coalesced.

    Args:
        parameters: one or more Parameters of any shape and dtype; those without `.grad` are skipped.
        max_norm: upper limit of the norm.
        *args, **kwargs: as torch's: norm_type, error_if_nonfinite, foreach.

    Returns:
        The total norm before clipping, a 0-d tensor.

    Raises:
        RuntimeError: as torch's, for a norm that is not finite with error_if_nonfinite.

    Source: torch's function does the arithmetic; adding duplicates first is ours.

    Examples:
        >>> table = torch.nn.Embedding(5, 2, sparse=True)
        >>> table(torch.tensor([1, 1])).sum().backward()
        >>> sk.clip_grad_norm_(table.parameters(), max_norm=1.0)
        tensor(2.8284)
    """
    return torch.nn.utils.clip_grad_norm_(_stand_ins(parameters), max_norm, *args, **kwargs)


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, *args: Any, **kwargs: Any) -> None:
    """Clamp every entry of every gradient to [-clip_value, clip_value] in place; the Parameters do not change.

    As `torch.nn.utils.clip_grad_value_`. Duplicate rows of a sparse gradient are added first; `.grad` is left
    coalesced.

    Args:
        parameters: one or more Parameters of any shape and dtype; those without `.grad` are skipped.
        clip_value: upper limit of the magnitude.
        *args, **kwargs: as torch's: foreach.

    Source: torch's function does the arithmetic; adding duplicates first is ours.

    Examples:
        >>> table = torch.nn.Embedding(5, 2, sparse=True)
        >>> table(torch.tensor([1, 1])).sum().backward()
        >>> sk.clip_grad_value_(table.parameters(), clip_value=0.5)
        >>> table.weight.grad.coalesce().values()
        tensor([[0.5000, 0.5000]])
    """
    torch.nn.utils.clip_grad_value_(_stand_ins(parameters), clip_value, *args, **kwargs)


@torch.no_grad()
def _stand_ins(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters; for one with a sparse gradient, a tensor whose .grad is the gradient's values."""
    found = []
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if p.grad is not None and p.grad.layout == torch.sparse_coo:
            p.grad = p.grad.coalesce()
            values = p.grad._values()
            p = values.detach()
            p.grad = values
        found.append(p)
    return found
