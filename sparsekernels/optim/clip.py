"""torch's gradient clipping, for sparse (COO) gradients too: torch's own raises on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
    """Scale all gradients so that their norm, taken together, is at most `max_norm`; return the norm before.

    As `torch.nn.utils.clip_grad_norm_`, whose other arguments it takes. A sparse gradient counts with the norm of its
    sum: duplicate rows are added first, and `.grad` is left coalesced.

    Args:
        parameters: one or more Parameters of any shape; those without `.grad` are passed over.
        max_norm: upper limit of the norm.

    Raises:
        RuntimeError: as torch's, for norms that are not finite with error_if_nonfinite.

    Source: torch's function does the arithmetic; that duplicates are added first is ours.
    """
    return torch.nn.utils.clip_grad_norm_(_stand_ins(parameters), max_norm, *args, **kwargs)


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, *args: Any, **kwargs: Any) -> None:
    """Clamp every entry of every gradient to [-clip_value, clip_value]; sparse ones after adding duplicate rows.

    As `torch.nn.utils.clip_grad_value_`, whose other arguments it takes; `.grad` is left coalesced.

    Args:
        parameters: one or more Parameters of any shape; those without `.grad` are passed over.
        clip_value: upper limit of the magnitude.

    Source: torch's function does the arithmetic; that duplicates are added first is ours.
    """
    torch.nn.utils.clip_grad_value_(_stand_ins(parameters), clip_value, *args, **kwargs)


@torch.no_grad()
def _stand_ins(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters; where a gradient is sparse, a tensor whose .grad is what it stores."""
    found = []
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if p.grad is not None and p.grad.layout == torch.sparse_coo:
            p.grad = p.grad.coalesce()
            values = p.grad._values()
            p = values.detach()
            p.grad = values
        found.append(p)
    return found
