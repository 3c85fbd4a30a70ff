"""Kernels and methods for training a sparse part of a model's weights."""

from . import methods, ops
from .index import Index
from .nn.low_rank import LowRankLinear
from .nn.pruned import CompactLinear
from .optim import SparseAdamW, clip_grad_norm_, clip_grad_value_
from .scoring.fisher import fisher_diagonal, squared_gradient_norms
from .scoring.singular_values import singular_value_gradients
from .selection import Selection
from .structure.matrices import Matrix, matrices
from .structure.svd import Factors, cluster_rows, factorize
from .training.delta import Delta
from .training.sparsify import SparseModel, sparsify

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
