"""Conv1D of transformers, which GPT-2 has in place of Linear, with a sparse backward.

A file of its own, imported where a model has such a layer: importing transformers takes seconds.
"""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .layers import sparse_linear


class SparseConv1D(Conv1D):
    """A Conv1D whose weight, bias or both have slots. Made by `train_only` from an existing module."""

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(self, x, transposed=True)
