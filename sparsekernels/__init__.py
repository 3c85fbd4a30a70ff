"""Kernels and methods for training a sparse part of a model's weights."""

from . import methods, ops
from .index import Index
from .nn.low_rank import LowRankLinear
from .nn.pruned import PrunedLinear
from .optim import SparseAdamW, clip_grad_norm_, clip_grad_value_
from .scoring.fisher import fisher_diagonal, squared_gradient_norms
from .scoring.singular_values import singular_value_gradients
from .selection import Selection
from .structure.matrices import Matrix, matrices
from .structure.svd import Factors, cluster_rows, factorize
from .training.delta import Delta
from .training.train_only import SparseModel, train_only

__all__ = [
    "Delta",
    "Factors",
    "Index",
    "LowRankLinear",
    "Matrix",
    "PrunedLinear",
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
    "squared_gradient_norms",
    "train_only",
]
__version__ = "0.1.0"
