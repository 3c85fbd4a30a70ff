"""Weight gradients at selected positions, in plain PyTorch: the oracle, and the fallback on every device."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ...common.units import Tile, offsets_of
from ..common.arguments import accumulation_dtype
from ..gather_scatter import reference as gather_scatter

ROWS_AT_ONCE = 256  # rows of the dense gradient that exist at a time


def masked_grad_linear(grad_output: Tensor, input: Tensor, positions: Tensor, tile: Tile) -> Tensor:
    m, across = grad_output.shape[1], -(-input.shape[1] // tile[1])
    dtype = accumulation_dtype(input.dtype)
    compute = input.to(dtype)
    height = max(1, ROWS_AT_ONCE // tile[0]) * tile[0]  # rows of whole units
    starts = torch.arange(0, m + height, height, device=positions.device) // tile[0] * across
    starts.clamp_(max=-(-m // tile[0]) * across)  # all of them fit the dtype of positions
    bounds = torch.searchsorted(positions, starts.to(positions.dtype)).tolist()
    parts = []
    for band, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            dense = grad_output[:, band * height : (band + 1) * height].to(dtype).T @ compute
            # Offsets in the whole weight: to a band of one unit's height, narrow blocks would be columns.
            offsets, exists = offsets_of(positions[begin:end], torch.Size((m, input.shape[1])), tile)
            found = dense.reshape(-1)[offsets - band * height * input.shape[1]]
            parts.append(found if exists is None else found.masked_fill_(~exists, 0))
    return torch.cat(parts) if parts else input.new_zeros(0, dtype=dtype)


def masked_grad_embedding(grad_output: Tensor, ids: Tensor, positions: Tensor, tile: Tile, padding_idx: int) -> Tensor:
    """Sums of the rows that occur, or of the rows of blocks, as a table of their own, of which the units are taken."""
    (height, width), dim = tile, grad_output.shape[1]
    dtype = accumulation_dtype(grad_output.dtype)
    across = -(-dim // width) if width else 1
    down, place = positions.long() // across, positions.long() % across
    hit = torch.isin(ids // height, down) & (ids != padding_idx) & (ids >= 0)
    bands, slot = torch.unique(ids[hit].long() // height, return_inverse=True)
    # One more than needed: in a table of one unit's height, narrow blocks would be columns.
    sums = grad_output.new_zeros(((len(bands) + 1) * height, dim), dtype=dtype)
    sums.index_add_(0, slot * height + ids[hit] % height, grad_output[hit].to(dtype))
    chosen = torch.isin(down, bands)
    units = torch.searchsorted(bands, down[chosen]) * across + place[chosen]
    out = sums.new_zeros(positions.shape[0], height * width)
    out[chosen] = gather_scatter.gather(sums, units, tile).view(len(units), height * width)
    return out.reshape(-1)


def masked_grad_linear_fake(grad_output: Tensor, input: Tensor, positions: Tensor, tile: Tile) -> Tensor:
    return input.new_empty(positions.shape[0] * math.prod(tile), dtype=accumulation_dtype(input.dtype))


def masked_grad_embedding_fake(
    grad_output: Tensor, ids: Tensor, positions: Tensor, tile: Tile, padding_idx: int
) -> Tensor:
    return grad_output.new_empty(positions.shape[0] * math.prod(tile), dtype=accumulation_dtype(grad_output.dtype))
