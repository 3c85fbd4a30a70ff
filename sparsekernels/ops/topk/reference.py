"""Top-k over a list of tensors, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def topk(scores: Sequence[Tensor], k: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    for i, score in enumerate(scores):
        if score.isnan().any():
            raise ValueError(f"scores[{i}] holds NaN")
    flat = torch.cat([s.reshape(-1) for s in scores])
    flat = flat.abs() if magnitude else flat
    # A stable sort is what sends ties to the lowest position; torch.topk promises nothing there.
    chosen = flat.argsort(descending=True, stable=True)[:k].sort().values
    ends = torch.tensor([s.numel() for s in scores], device=flat.device).cumsum(0)
    owner = torch.searchsorted(ends, chosen, right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return chosen - starts[owner], torch.bincount(owner, minlength=len(scores))


def topk_fake(scores: Sequence[Tensor], k: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    return (
        scores[0].new_empty((k,), dtype=torch.int64),
        scores[0].new_empty((len(scores),), dtype=torch.int64),
    )
