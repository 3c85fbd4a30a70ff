"""The methods: each reads like its paper's pseudo-code. Most end in a Selection, which is then trained or moved."""

from . import gates, laser
from .fish import fish
from .ird import ird
from .ks_lottery import (
    Certificate,
    by_frequency,
    by_shift,
    certificate,
    embed_tune,
    ks_lottery,
    partial_transfer,
    partial_tune,
    predictions,
)
from .sift import sift

__all__ = [
    "Certificate",
    "by_frequency",
    "by_shift",
    "certificate",
    "embed_tune",
    "fish",
    "gates",
    "ird",
    "ks_lottery",
    "laser",
    "partial_transfer",
    "partial_tune",
    "predictions",
    "sift",
]
