"""Blocks in bands: those with the same rows, or with the same columns, make one product with the other dimension."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.units import places_of
from ...index import Index


def bands(index: Index, *, across: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each band of a matrix that has blocks: its rows, the columns of its blocks, and which blocks these are.

    across: bands of rows, as above; if not, bands of columns, with the rows of their blocks. Waits for a GPU.
    """
    _, *places = places_of(index.positions, index.shape, index.tile)
    own, other = (0, 1) if across else (1, 0)
    for band in places[own].unique().tolist():
        mine = (places[own] == band).nonzero().reshape(-1)
        size = index.tile[other]
        offsets = (places[other][mine, None] * size + torch.arange(size, device=mine.device)).reshape(-1)
        begin = band * index.tile[own]
        end = min(begin + index.tile[own], index.shape[own])
        yield slice(begin, end), offsets[offsets < index.shape[other]], mine


def as_blocks(found: Tensor, index: Index, *, across: bool) -> Tensor:
    """What was found for the rows and columns of a band, [rows, columns], as [blocks, height, width], zero beyond."""
    height, width = index.tile
    rows, columns = -found.shape[0] % height, -found.shape[1] % width  # one of the two ends at an edge of the matrix
    full = F.pad(found, (0, columns, 0, rows))
    return full.view(height, -1, width).transpose(0, 1) if across else full.view(-1, height, width)
