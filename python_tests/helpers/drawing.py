"""Strategies of hypothesis: an Index of any granularity."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sparsekernels import Index


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Index:
    """Any units of a tensor of this shape, and any of them."""
    granularity = draw(st.sampled_from(("element", "row", "column", "block")[: (1, 2, 4)[min(len(shape), 2)]]))
    block = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) if granularity == "block" else None
    units = Index(torch.empty(0, dtype=torch.int64), shape, granularity, block)
    chosen = sorted(draw(st.sets(st.integers(0, units.num_positions - 1))))
    return Index(torch.tensor(chosen, dtype=torch.int64), shape, granularity, block)
