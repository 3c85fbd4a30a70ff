"""Kernels and methods for training a sparse part of a model's weights."""

from . import methods, ops
from .delta import Delta
from .fisher import fisher_diagonal, squared_gradient_norms
from .low_rank import LowRankLinear
from .optim import SparseAdamW, clip_grad_norm_, clip_grad_value_
from .selection import Index, Selection
from .sparsify import SparseModel, sparsify

__all__ = [
    "Delta",
    "Index",
    "LowRankLinear",
    "Selection",
    "SparseAdamW",
    "SparseModel",
    "clip_grad_norm_",
    "clip_grad_value_",
    "fisher_diagonal",
    "methods",
    "ops",
    "sparsify",
    "squared_gradient_norms",
]
__version__ = "0.1.0"
