"""KS-Lottery: embedding rows chosen by exact Kolmogorov-Smirnov tests, and how they are tuned and certified."""

from .certificate import Certificate, certificate, predictions
from .select import by_frequency, by_shift, ks_lottery
from .tune import embed_tune, partial_transfer, partial_tune

__all__ = [
    "Certificate",
    "by_frequency",
    "by_shift",
    "certificate",
    "embed_tune",
    "ks_lottery",
    "partial_transfer",
    "partial_tune",
    "predictions",
]
