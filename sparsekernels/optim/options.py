"""The options of a group that torch.optim.AdamW does not have."""

from __future__ import annotations

from typing import Any

import torch

ALLOWED: dict[str, tuple[Any, ...] | None] = {  # the first is the default; None: any int, 0 by default
    "sparse_state": ("seen", "all"),
    "sparse_decay": ("touched", "catch_up"),
    "sparse_bias_correction": ("global", "row"),
    "state_dtype": (None, torch.float32, torch.bfloat16),
    "stochastic_rounding": (False, True),
    "seed": None,
}
DEFAULTS = {name: 0 if allowed is None else allowed[0] for name, allowed in ALLOWED.items()}


def check(group: dict[str, Any]) -> None:
    """Raise ValueError for an invalid value of an option."""
    for name, allowed in ALLOWED.items():
        value = group.get(name, DEFAULTS[name])
        if allowed is None and not isinstance(value, int):
            raise ValueError(f"{name} must be an int, got {value!r}")
        if allowed is not None and not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
