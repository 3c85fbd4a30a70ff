"""The kernels: public functions, with one signature for every backend. `table.py` is the overview."""

from . import backend as _backend
from .adamw import adamw_
from .adamw_rows import adamw_rows_
from .columns import put_columns, take_columns
from .fisher import fisher_embedding_, fisher_linear_, fisher_squares_, fisher_vector_
from .gates import gate_gradient, gate_probabilities, gate_values, gated_weight
from .gather_scatter import gather, scatter_
from .ks import ks_2samp
from .masked_grad import masked_grad_embedding, masked_grad_linear
from .singular_values import singular_value_grad, singular_value_grad_linear
from .table import OPS
from .topk import topk

_backend.register(OPS)

__all__ = [
    "OPS",
    "adamw_",
    "adamw_rows_",
    "fisher_embedding_",
    "fisher_linear_",
    "fisher_squares_",
    "fisher_vector_",
    "gate_gradient",
    "gate_probabilities",
    "gate_values",
    "gated_weight",
    "gather",
    "ks_2samp",
    "masked_grad_embedding",
    "masked_grad_linear",
    "put_columns",
    "scatter_",
    "singular_value_grad",
    "singular_value_grad_linear",
    "take_columns",
    "topk",
]
