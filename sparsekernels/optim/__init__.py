"""Optimizers that touch only what is selected, and what is done to their gradients."""

from .adamw import SparseAdamW
from .clip import clip_grad_norm_, clip_grad_value_

__all__ = ["SparseAdamW", "clip_grad_norm_", "clip_grad_value_"]
