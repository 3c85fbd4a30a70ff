"""Remap and joined against sets of positions written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples.case import put, take

from sparsekernels import Index
from sparsekernels.training.remap import Remap, joined

SHAPES = [(5, 3), (6,), (2, 3, 2), ()]


@st.composite
def two(draw: st.DrawFn) -> tuple[Index, Index]:
    shape = torch.Size(draw(st.sampled_from(SHAPES)))

    def index() -> Index:
        rows = bool(shape) and draw(st.booleans())
        limit = shape[0] if rows else shape.numel()
        return Index(torch.tensor(sorted(draw(st.sets(st.integers(0, limit - 1)))), dtype=torch.int64), shape, rows)

    return index(), index()


def mask(index: Index) -> torch.Tensor:
    return put(torch.zeros(index.shape), index, torch.ones(index.compact_shape)).bool()


def dense(index: Index, part: torch.Tensor) -> torch.Tensor:
    """The compact tensor in its places; -1 elsewhere."""
    return put(torch.full(index.shape, -1.0), index, part)


@given(two())
def test_kept_and_dropped(pair: tuple[Index, Index]) -> None:
    old, new = pair
    table = torch.arange(old.shape.numel(), dtype=torch.float32).reshape(old.shape)
    remap = Remap(old, new)
    carried = remap.onto(torch.full(new.compact_shape, -1.0), take(table, old))
    both = mask(old) & mask(new)
    assert torch.equal(dense(new, carried), torch.where(both, table, -1.0))
    assert bool(len(remap)) == bool(both.any())
    index, values = remap.dropped(take(table, old))
    assert Index(index.positions, index.shape, index.rows) == index, "sorted, unique and in range"
    assert values.shape == index.compact_shape
    gone = mask(old) & ~mask(new)
    assert torch.equal(dense(index, values), torch.where(gone, table, -1.0))

    kept = Remap(old, index)  # what is dropped, and what is kept, make the whole again
    rest = kept.dropped(take(table, old))
    whole, values = joined((index, take(table, index)), rest)
    assert Index(whole.positions, whole.shape, whole.rows) == whole
    assert values.shape == whole.compact_shape
    assert torch.equal(dense(whole, values), torch.where(mask(old), table, -1.0))


@given(two(), st.integers(0, 3))
def test_step_counts(pair: tuple[Index, Index], seed: int) -> None:
    old, new = pair
    single = torch.tensor(3.0)
    several = torch.randint(1, 4, (len(old),), generator=torch.Generator().manual_seed(seed)).float()
    for step in (single, several):
        written: Any = step.reshape(-1, *[1] * (len(old.compact_shape) - 1)).expand(old.compact_shape)
        expected = torch.where(mask(new), put(torch.zeros(old.shape), old, written), 0.0)
        of_new = take(expected, new).reshape(len(new), new.elements_per_position)
        mixed = (of_new != of_new[:, :1]).any(1)
        if not mixed.any():
            assert torch.equal(Remap(old, new).step_counts(step, "w"), of_new[:, 0])
            continue
        assert new.rows
        assert not old.rows
        with pytest.raises(ValueError, match=f"row {int(new.positions[mixed][0])} of 'w' is new in part"):
            Remap(old, new).step_counts(step, "w")
