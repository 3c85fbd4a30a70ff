"""Fingerprints of the weights that a Delta replaces: 128 bits for each tensor."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..index import Index


def is_whole(index: Index) -> bool:
    """Whether every element is selected."""
    return index.numel == index.shape.numel()


def base_of(index: Index, originals: Tensor) -> str:
    """As TensorDelta.base."""
    return "" if is_whole(index) else fingerprint_of(index, originals)


def fingerprint_of(index: Index, originals: Tensor) -> str:
    """The fingerprint of selected weights; rows of experts count as slices of the first dimension, as in old files."""
    if index.granularity == "row" and len(index.shape) > 2 and len(index) % max(1, index.shape[1:-1].numel()) == 0:
        originals = originals.reshape(-1, *index.shape[1:])
    return fingerprint(originals)


def fingerprint(values: Tensor) -> str:
    """128-bit BLAKE2 of dtype, shape and bits."""
    head = f"{values.dtype} {list(values.shape)}".encode()
    raw = values.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16, key=hashlib.sha256(head).digest()).hexdigest()
