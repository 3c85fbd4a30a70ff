"""LASER: weights of lower rank, found by gradients of their singular values, or by exhaustive search."""

from .adapting import adapt, search
from .decompositions import Decompositions
from .grid import Grid, grid
from .ranking import RHOS, Ranking, Reduction, rank
from .reducing import Reduced, load, reduce

__all__ = [
    "RHOS",
    "Decompositions",
    "Grid",
    "Ranking",
    "Reduced",
    "Reduction",
    "adapt",
    "grid",
    "load",
    "rank",
    "reduce",
    "search",
]
