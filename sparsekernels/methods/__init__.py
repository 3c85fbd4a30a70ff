"""The methods: each reads like its paper's pseudo-code. Most end in a Selection, which is then trained or moved."""

from . import gates, laser
from .fish import fish
from .ird import ird
from .ks_lottery.certificate import Certificate, certificate, predictions
from .ks_lottery.select import by_frequency, by_shift, ks_lottery
from .ks_lottery.tune import embed_tune, partial_transfer, partial_tune
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
