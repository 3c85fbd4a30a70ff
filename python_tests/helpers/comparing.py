"""What a model holds: all of it, compared bit for bit, and its matrices as dense ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sparsekernels.nn.low_rank import LowRankLinear


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, x in before.items():
        assert torch.equal(x, after[name]), name


def best(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Every matrix of the model, dense, wherever it is stored."""
    dense = copy.deepcopy(model)
    for parent in list(dense.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LowRankLinear):
                parent._modules[name] = child.to_linear()
    return {name: p.detach() for name, p in dense.named_parameters()}
