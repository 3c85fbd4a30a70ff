"""Stochastic gates on rows, columns, heads and neurons of frozen weights: trained, then cut out permanently.

FineGates (Svirsky et al., arXiv 2412.12951) on STG (Yamada et al., arXiv 1810.04247), or hard concrete gates (Louizos
et al., arXiv 1712.01312). Ours: which gates close and when (`schedule`), and that the model really gets smaller.
"""

from .attaching import attach
from .saving import load
from .training import Gates

__all__ = ["Gates", "attach", "load"]
