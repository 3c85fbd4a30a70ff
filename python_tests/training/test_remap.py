"""Remap and joined against sets of positions written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.drawing import indices
from hypothesis import given
from hypothesis import strategies as st
from samples.case import put, take

from sparsekernels import Index
from sparsekernels.training.remap import Remap, joined

SHAPES = [(5, 3), (6,), (2, 3, 2), (1, 6), (6, 1), ()]


@st.composite
def two(draw: st.DrawFn) -> tuple[Index, Index]:
    shape = draw(st.sampled_from(SHAPES))
    return draw(indices(shape)), draw(indices(shape))


def mask(index: Index) -> torch.Tensor:
    return put(torch.zeros(index.shape), index, torch.ones(index.compact_shape)).bool()


def dense(index: Index, part: torch.Tensor) -> torch.Tensor:
    """The compact tensor in its places; -1 elsewhere."""
    return put(torch.full(index.shape, -1.0), index, part)


def spread(numbers: torch.Tensor, index: Index) -> torch.Tensor:
    """One number for each unit, as a compact tensor."""
    if index.granularity == "column":
        return numbers.expand(index.compact_shape)
    return numbers.reshape(-1, *[1] * (len(index.compact_shape) - 1)).expand(index.compact_shape)


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
    assert Index(index.positions, index.shape, index.granularity, index.block) == index, "sorted, unique and in range"
    assert values.shape == index.compact_shape
    gone = mask(old) & ~mask(new)
    assert torch.equal(dense(index, values), torch.where(gone, table, -1.0))

    kept = Remap(old, index)  # what is dropped, and what is kept, make the whole again
    rest = kept.dropped(take(table, old))
    whole, values = joined((index, take(table, index)), rest)
    assert Index(whole.positions, whole.shape, whole.granularity, whole.block) == whole
    assert values.shape == whole.compact_shape
    assert torch.equal(dense(whole, values), torch.where(mask(old), table, -1.0))


@given(two(), st.integers(0, 3))
def test_step_counts(pair: tuple[Index, Index], seed: int) -> None:
    old, new = pair
    single = torch.tensor(3.0)
    several = torch.randint(1, 4, (len(old),), generator=torch.Generator().manual_seed(seed)).float()
    for step in (single, several):
        written: Any = spread(step.expand(len(old)), old)
        expected = torch.where(mask(new), put(torch.zeros(old.shape), old, written), 0.0)
        of_new = [expected[box].unique() for box in (mask(new.with_positions(p)) for p in new.positions[:, None])]
        mixed = [int(p) for p, found in zip(new.positions, of_new, strict=True) if len(found) > 1]
        if not mixed:
            assert torch.equal(Remap(old, new).step_counts(step, "w"), torch.cat([torch.zeros(0), *of_new]))
            continue
        assert new.granularity != "element"
        assert not old.same_units(new)
        with pytest.raises(ValueError, match=f"{new.granularity} {mixed[0]} of 'w' is new in part"):
            Remap(old, new).step_counts(step, "w")
