"""Models to shard, how tests train them, and how their weights are compared with those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Zoo, ids, moe, transformer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import sparsekernels as sk
from sparsekernels import Selection

STEPS, BATCH, ACCUMULATED = 5, 8, 2
UNITS: dict[str, dict[str, Any]] = {
    "element": {},
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "block": {"granularity": "block", "block": (5, 4)},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "zoo": Zoo,
    "llama": lambda: transformer("llama"),  # its embedding and head are tied
    "gpt2": lambda: transformer("gpt2"),
    "moe": moe,
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[kind]()


def selection(model: nn.Module, units: str = "element", seed: int = 1) -> Selection:
    return Selection.random(model, 0.3, seed=seed, **UNITS[units])


def loss_of(run: nn.Module, batch: Tensor) -> Tensor:
    out = run(batch)
    return getattr(out, "logits", out).float().square().mean()


def train(
    run: nn.Module,
    tuned: sk.SparseModel,
    optimizer: Any,
    rank: int,
    world: int,
    steps: int = STEPS,
    clip: Any = torch.nn.utils.clip_grad_norm_,
) -> None:
    """Each rank has its rows of every micro-batch; two of them make a step, whose gradient is clipped."""
    for step in range(steps):
        for micro in range(ACCUMULATED):
            if hasattr(run, "set_requires_gradient_sync"):
                run.set_requires_gradient_sync(micro == ACCUMULATED - 1)
            batch = ids(BATCH, 7, seed=10 * step + micro).chunk(world)[rank]
            (loss_of(run, batch) / ACCUMULATED).backward()
        clip(list(tuned.parameters()), 0.01)
        optimizer.step()
        optimizer.zero_grad()


# The gradient of a key's bias is zero but for rounding, which Adam would blow up with a smaller eps.
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5}


def optimizer_of(tuned: sk.SparseModel, **options: Any) -> sk.SparseAdamW:
    return sk.SparseAdamW(tuned.parameters(), **ADAMW, **options)


def sharded(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Each block by itself, and the rest; of the Zoo also single layers."""
    inner = getattr(model, "model", getattr(model, "transformer", model))
    blocks = [model.up, model.conv, model.experts] if isinstance(model, Zoo) else getattr(inner, "layers", None)
    for block in inner.h if blocks is None else blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(x, "full_tensor", lambda x=x: x)().clone() for name, x in model.state_dict().items()}


def fresh(
    kind: str, mesh: Any, units: str = "element", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, sk.SparseModel]:
    """The sharded model, and what is trained of it."""
    model = made(kind).to(dtype)
    tuned = sk.train_only(model, selection(model, units))
    return sharded(model, mesh, **options), tuned


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        apart = float((found[name] - weight).abs().max())
        assert apart <= limit * float(weight.abs().max()), (name, apart)
