"""torch's gradient clipping, extended to what torch's own raises on: sparse gradients, several device meshes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..common.supported import is_dtensor


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
    """Scale all gradients in place so that their total norm is at most `max_norm`; the Parameters do not change.

    As `torch.nn.utils.clip_grad_norm_`. A sparse gradient contributes the norm of its coalesced values: duplicate rows
    are added first, and `.grad` is left coalesced. Gradients may be DTensors of several device meshes, and plain ones;
    the latter count once: tensor parallelism leaves them alike on every rank.

    Args:
        parameters: one or more Parameters of any shape and dtype; those without `.grad` are skipped.
        max_norm: upper limit of the norm.
        *args, **kwargs: as torch's: norm_type, error_if_nonfinite, foreach.

    Returns:
        The total norm before clipping, a 0-d tensor. With DTensors, a collective call.

    Raises:
        RuntimeError: as torch's, for a norm that is not finite with error_if_nonfinite.

    Source: torch's functions do the arithmetic; adding duplicates first is ours.

    Examples:
        >>> table = torch.nn.Embedding(5, 2, sparse=True)
        >>> table(torch.tensor([1, 1])).sum().backward()
        >>> sk.clip_grad_norm_(table.parameters(), max_norm=1.0)
        tensor(2.8284)
    """
    params = _stand_ins(parameters)
    meshes: dict[Any, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            meshes.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    if len(meshes) > 1:
        return _clip_over_meshes(list(meshes.values()), max_norm, *args, **kwargs)
    return torch.nn.utils.clip_grad_norm_(params, max_norm, *args, **kwargs)


def _clip_over_meshes(
    kinds: list[list[Tensor]],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As `clip_grad_norm_`, of lists of Parameters each of which torch can clip."""
    norms = []
    for params in kinds:
        norm: Any = get_total_norm([p.grad for p in params], norm_type, error_if_nonfinite, foreach)  # type: ignore[misc]
        norms.append(norm.full_tensor() if is_dtensor(norm) else norm)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    for params in kinds:
        clip_grads_with_norm_(params, max_norm, total, foreach)
    return total


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
