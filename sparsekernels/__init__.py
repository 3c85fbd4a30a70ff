"""Kernels and methods for training a sparse part of a model's weights."""

from . import methods, ops
from .delta import Delta
from .optim import SparseAdamW
from .selection import Index, Selection
from .sparsify import SparseModel, sparsify

__all__ = ["Delta", "Index", "Selection", "SparseAdamW", "SparseModel", "methods", "ops", "sparsify"]
__version__ = "0.1.0"
