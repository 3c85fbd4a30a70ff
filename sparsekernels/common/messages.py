"""Warnings and lists of names in messages."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def listed(names: Iterable[str]) -> str:
    """The first five names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def warn(message: str) -> None:
    """Warn, at the line of user code that called into this package, possibly through torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
