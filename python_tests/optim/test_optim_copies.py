"""Optimizers that were pickled, copied, saved whole or loaded go on bit for bit, with sparse gradients, too."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsekernels as sk
from sparsekernels import Index, Selection

V, D = 40, 3


def saved(optimizer: Any, path: Path) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def mapped(optimizer: Any, path: Path) -> Any:
    torch.save(optimizer, path)
    return torch.load(path, weights_only=False, mmap=True)


def loaded(optimizer: Any, path: Path) -> Any:
    """Of a state_dict from a file that is mapped into memory."""
    p = nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())
    group = {**optimizer.param_groups[0], "params": [p]}
    new = sk.SparseAdamW([group])
    torch.save(optimizer.state_dict(), path)
    new.load_state_dict(torch.load(path, mmap=True))
    return new


WAYS = {
    "pickle": lambda optimizer, _: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": lambda optimizer, _: copy.deepcopy(optimizer),
    "save": saved,
    "mmap": mapped,
    "state_dict": loaded,
}


def step(optimizer: Any, ids: list[int], kind: str) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    values = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(sum(ids)))
    grad = torch.sparse_coo_tensor(torch.tensor([ids]), values, (V, D), check_invariants=True)
    if kind == "elements":
        grad = grad.to_dense().to_sparse()
    p.grad = grad if kind in ("rows", "elements") else grad.to_dense()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "sparse_bias_correction": "row", "sparse_decay": "catch_up"}]
)
@pytest.mark.parametrize("kind", ["rows", "elements", "dense", "indices"])
@pytest.mark.parametrize("way", WAYS)
def test_goes_on_bit_for_bit(way: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    group: dict[str, Any] = {"params": [nn.Parameter(torch.randn(V, D))]}
    if kind == "indices":
        group["indices"] = [Index(torch.arange(0, V, 3), (V, D), granularity="row")]
    optimizer = sk.SparseAdamW([group], lr=0.1, **options)
    for ids in ([1, 2], [2, 5, 7]):
        step(optimizer, ids, kind)
    other = WAYS[way](optimizer, tmp_path / "optimizer.pt")
    for ids in (
        [7, 8, 9],
        [30, 31, 2],
        list(range(40)),
    ):  # new rows each time: within the room that there is, and past it
        step(optimizer, ids, kind)
        step(other, ids, kind)
    (p,), (q,) = (each.param_groups[0]["params"] for each in (optimizer, other))
    assert p is not q
    assert torch.equal(p, q)
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, other.state[q][name]), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_model_and_its_optimizer_go_on_bit_for_bit(copied: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Embedding(V, D, sparse=True), nn.LayerNorm(D), nn.Linear(D, 4))
    tuned = sk.train_only(model, Selection.random(model, 0.5, names=["1.weight", "2.weight"]))
    model[0].weight.requires_grad_(True)
    optimizer = sk.SparseAdamW([*tuned.parameters(), model[0].weight], lr=0.1)

    def train(model: nn.Module, optimizer: Any, first: int) -> None:
        for i in range(first, first + 3):
            model(torch.arange(5 * i, 5 * i + 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer, 0)
    other, its_optimizer = copied((model, optimizer))
    train(model, optimizer, 3)
    train(other, its_optimizer, 3)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_lines_to_come_are_not_taken_from_a_storage_of_somebody_else() -> None:
    """State that is a part of a larger tensor: what lies behind it stays."""
    p = nn.Parameter(torch.zeros(V, D))
    optimizer = sk.SparseAdamW([p], lr=0.1)
    step(optimizer, [1, 2], "rows")
    flat = torch.full((V, D), 7.0)
    flat[:2] = optimizer.state[p]["exp_avg"]
    optimizer.state[p]["exp_avg"] = flat[:2]
    step(optimizer, [3, 4, 5], "rows")
    assert flat[2:].eq(7).all()
    assert len(optimizer.state[p]["exp_avg"]) == 5
