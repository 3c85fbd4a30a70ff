"""Projections of a model's blocks: their names and sizes, and what the model gives."""

import torch
from models import ids
from torch import Tensor, nn


def linears(model: nn.Module) -> list[str]:
    """Names of the projections in the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    ]


def size(module: nn.Module) -> tuple[int, int]:
    """(M, N)"""
    return tuple(module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1])


def outputs(model: nn.Module) -> Tensor:
    """Of some tokens, of which a few are masked."""
    tokens = ids(3, 7)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    extra = {"labels": tokens} if "T5" in type(model).__name__ else {}
    out = model(input_ids=tokens, attention_mask=mask, **extra)
    return (out.logits if "logits" in out else out.last_hidden_state)[mask.bool()]
