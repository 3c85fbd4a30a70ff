"""The layout of the outputs of fused projections, by the class that splits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .layers import weight_size

Rows = slice | Tensor  # which outputs: a stretch, or positions (int64, on the CPU)


def stretches(**sizes: int) -> dict[str, Rows]:
    """Parts that are contiguous, one after another."""
    parts: dict[str, Rows] = {}
    start = 0
    for part, size in sizes.items():
        parts[part] = slice(start, start + size)
        start += size
    return parts


def _by_head(projection: Any, width: int) -> dict[str, Rows]:
    """Query, key and value of the first head, those of the second, and so on."""
    heads = weight_size(projection)[0] // (3 * width)
    places = torch.arange(heads * 3 * width).view(heads, 3, width)
    return {part: places[:, i].flatten() for i, part in enumerate("qkv")}


def _phi3(attention: Any) -> dict[str, Rows]:
    config, width = attention.config, attention.head_dim
    shared = config.num_key_value_heads * width
    return stretches(q=config.num_attention_heads * width, k=shared, v=shared)


# By the class that splits the output of the projection, and the parameter's name in it.
LAYOUTS: dict[tuple[str, str], Callable[[Any], Mapping[str, Rows]]] = {
    ("torch", "in_proj_weight"): lambda a: stretches(q=a.embed_dim, k=a.embed_dim, v=a.embed_dim),
    ("GPT2Attention", "c_attn.weight"): lambda a: stretches(q=a.split_size, k=a.split_size, v=a.split_size),
    ("GPTNeoXAttention", "query_key_value.weight"): lambda a: _by_head(a.query_key_value, a.head_size),
    ("BloomAttention", "query_key_value.weight"): lambda a: _by_head(a.query_key_value, a.head_dim),
    ("Phi3Attention", "qkv_proj.weight"): _phi3,
    ("Phi3MLP", "gate_up_proj.weight"): lambda m: stretches(
        gate=m.config.intermediate_size, up=m.config.intermediate_size
    ),
}
