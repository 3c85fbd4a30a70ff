"""Matrix products within ops."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, both of one dtype, accumulated and returned in `dtype`; CUDA needs no fp32 copy of half precision."""
    if a.is_cuda and a.dtype != dtype and torch.version.cuda is not None:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
