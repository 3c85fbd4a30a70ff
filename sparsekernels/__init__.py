"""Kernels and methods for training a sparse part of a model's weights."""

from . import methods, ops
from .compact_linear import CompactLinear
from .delta import Delta
from .factors import Factors, cluster_rows, factorize
from .fisher import fisher_diagonal, squared_gradient_norms
from .low_rank import LowRankLinear
from .matrices import Matrix, matrices
from .optim import SparseAdamW, clip_grad_norm_, clip_grad_value_
from .selection import Index, Selection
from .singular_values import singular_value_gradients
from .sparsify import SparseModel, sparsify

__all__ = [
    "CompactLinear",
    "Delta",
    "Factors",
    "Index",
    "LowRankLinear",
    "Matrix",
    "Selection",
    "SparseAdamW",
    "SparseModel",
    "clip_grad_norm_",
    "clip_grad_value_",
    "cluster_rows",
    "factorize",
    "fisher_diagonal",
    "matrices",
    "methods",
    "ops",
    "singular_value_gradients",
    "sparsify",
    "squared_gradient_norms",
]
__version__ = "0.1.0"
