"""Optimizers that touch only what is selected."""

from .adamw import SparseAdamW

__all__ = ["SparseAdamW"]
