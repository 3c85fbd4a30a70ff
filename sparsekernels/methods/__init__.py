"""The methods: each reads like its paper's pseudo-code. Most end in a Selection, which is then trained or moved."""

from . import gates, ks_lottery, laser
from .fish import fish
from .ird import ird
from .sift import sift

__all__ = [
    "fish",
    "gates",
    "ird",
    "ks_lottery",
    "laser",
    "sift",
]
