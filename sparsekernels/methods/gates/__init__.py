"""Stochastic gates on rows, columns, heads and neurons of frozen weights: trained, then cut out for good.

FineGates (Svirsky et al., arXiv 2412.12951) on STG (Yamada et al., arXiv 1810.04247), or hard concrete gates (Louizos
et al., arXiv 1712.01312). Ours: what decides which gates close, and when (`schedule`), and that they really go.
"""

from .attaching import attach
from .saving import load
from .training import Gates

__all__ = ["Gates", "attach", "load"]
