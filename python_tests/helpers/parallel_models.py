"""A model to divide by tensor parallelism, with each kind of layer that torch divides."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCABULARY, ids
from sharded_models import BATCH, loss_of, selection
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparsekernels as sk


class Net(nn.Module):
    """Each kind of layer that is parallelised, and one that is not.

    Of four ranks the last one has fewer rows of a table than others, fewer features of the other, and no output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 10, padding_idx=3)
        self.vectors = nn.Embedding(VOCABULARY, 10)
        self.up = nn.Linear(10, 16)
        self.down = nn.Linear(16, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.vectors(x)
        return self.head(self.norm(y + self.down(self.up(y).relu())))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(3)
    return Net()


PLAN: dict[str, Any] = {
    "words": RowwiseParallel(input_layouts=Replicate()),
    "vectors": ColwiseParallel(output_layouts=Replicate()),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def parallelised(mesh: Any) -> Net:
    return parallelize_module(net(), mesh, PLAN)  # type: ignore[return-value]


def parallel(mesh: Any, units: str = "element", dtype: torch.dtype = torch.float32) -> tuple[Net, sk.SparseModel]:
    model = parallelised(mesh).to(dtype)
    return model, sk.train_only(model, selection(net(), units))


def step(model: nn.Module, optimizer: Any, seed: int = 0) -> None:
    loss_of(model, ids(BATCH, 7, seed=seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def sharded_part(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[no-any-return]
