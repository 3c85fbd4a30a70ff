"""Random masks over the weights that SIFT selects from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TRANSFORMERS, batch, transformer

import sparsekernels as sk
from sparsekernels import Index
from sparsekernels.common.names import default_head, default_targets
from sparsekernels.methods import random_mask


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_targets_and_head_are_those_of_sift(kind: str) -> None:
    model = transformer(kind)
    found = random_mask(model, 0.25)
    head = default_head(model)
    assert list(found) == [*default_targets(model), *head]
    for name, index in found.items():
        shape = model.get_parameter(name).shape
        if name in head:
            assert index == Index.full(shape)
        else:
            assert index.granularity == "column"
            assert len(index) == -(-shape[1] // 4)


def test_layers_that_read_one_input_keep_the_same_columns() -> None:
    model = transformer("llama")
    found = random_mask(model, 0.25)
    apart = random_mask(model, 0.25, share_inputs=False)
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    assert torch.equal(found[q].positions, found[k].positions)
    assert torch.equal(found[q].positions, found[v].positions)
    assert not torch.equal(apart[q].positions, apart[k].positions)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
def test_the_seed_decides(granularity: Any) -> None:
    model, block = transformer("llama"), (4, 4) if granularity == "block" else None

    def drawn(seed: int) -> list[torch.Tensor]:
        found = random_mask(model, 0.2, granularity=granularity, block=block, seed=seed)
        return [index.positions for index in found.values()]

    assert all(map(torch.equal, drawn(0), drawn(0)))
    assert not all(map(torch.equal, drawn(0), drawn(1)))


def test_only_what_is_selected_trains() -> None:
    model = transformer("bert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    selection = random_mask(model, 0.1)
    tuned = sk.train_only(model, selection)
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=1e-2)
    model(**batch("bert")).loss.backward()
    optimizer.step()
    for name, was in before.items():
        changed = model.get_parameter(name) != was
        selected = torch.zeros(was.shape)
        if name in selection:
            sk.ops.scatter_(selected, selection[name], torch.ones(selection[name].compact_shape))
            assert changed.any(), name
        assert not changed[selected == 0].any(), name


def test_patterns_and_errors() -> None:
    model = transformer("llama")
    assert set(random_mask(model, 0.1, targets="*.q_proj.weight")) == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }
    with pytest.raises(ValueError, match="density"):
        random_mask(model, 0)
    with pytest.raises(ValueError, match="targets: no parameter matches"):
        random_mask(model, targets="*.query.weight")
    with pytest.raises(ValueError, match="no weights in numbered blocks; pass targets"):
        random_mask(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="block is the shape"):
        random_mask(model, granularity="block")
