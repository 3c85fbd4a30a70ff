"""A model, a selection of several kinds, and the delta of a few steps on it."""

from __future__ import annotations

import copy

import torch
from models import Zoo, ids
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Delta, Index, Selection

State = dict[str, Tensor]


def zoo(dtype: torch.dtype = torch.float32) -> Zoo:
    torch.manual_seed(11)
    return Zoo().to(dtype)


def mixed(model: nn.Module, seed: int = 0) -> Selection:
    """Elements, rows, columns and blocks."""
    rows = Selection({"embed.weight": Index(torch.tensor([2, 3, 40]), (61, 16), granularity="row")})
    return (
        Selection.random(model, 0.1, seed=seed, names=["up.weight", "conv.weight", "experts.weight", "norm.bias"])
        | Selection.random(model, 0.1, seed=seed, names=["down.weight"], granularity="column")
        | Selection.random(model, 0.1, seed=seed, names=["head.weight"], granularity="block", block=(3, 5))
        | rows
    )


def trained(
    selection: Selection, dtype: torch.dtype = torch.float32, optimizer: type = sk.SparseAdamW
) -> tuple[Delta, State]:
    """The delta of a few steps on `zoo(dtype)`, and the state_dict after them."""
    model = zoo(dtype)
    tuned = sk.train_only(model, selection)
    stepper = optimizer(tuned.parameters(), lr=0.1)
    for seed in range(3):
        model(ids(4, 7, seed=seed)).square().sum().backward()
        stepper.step()
        stepper.zero_grad()
    delta = tuned.delta()
    state = copy.deepcopy(model.state_dict())
    tuned.restore()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), zoo(dtype).state_dict().values(), strict=True)
    )
    return delta, state
