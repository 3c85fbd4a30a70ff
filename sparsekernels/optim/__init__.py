"""An optimizer that updates selected weights only, and gradient clipping for sparse gradients."""

from .adamw import SparseAdamW
from .clip import clip_grad_norm_, clip_grad_value_

__all__ = ["SparseAdamW", "clip_grad_norm_", "clip_grad_value_"]
