"""The methods; each reads like its paper's pseudo-code. Most return a Selection, to train or to transfer."""

from . import gates, ks_lottery, laser
from .fish import fish
from .ird import ird
from .random_mask import random_mask
from .sift import sift

__all__ = [
    "fish",
    "gates",
    "ird",
    "ks_lottery",
    "laser",
    "random_mask",
    "sift",
]
