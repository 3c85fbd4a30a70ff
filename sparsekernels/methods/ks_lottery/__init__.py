"""KS-Lottery: embedding rows selected by exact Kolmogorov-Smirnov tests, and how they are tuned and certified."""

from .certifying import Certificate, certificate, predictions
from .selecting import by_frequency, by_shift, select
from .tuning import embed_tune, partial_transfer, partial_tune

__all__ = [
    "Certificate",
    "by_frequency",
    "by_shift",
    "certificate",
    "embed_tune",
    "partial_transfer",
    "partial_tune",
    "predictions",
    "select",
]
