"""What one process does: contenders under fully_shard, what each communicates and holds, and how long a step takes."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekernels as sk

from .. import step_cost
from ..finetuning.memory import PeakMemory
from ..gpu_training.llama import Shape, make_model
from ..step_cost import DENSE, FROZEN
from ..study import MIB, Content
from ..timing import interleaved, median
from .counting import Collectives

WARM_UP = 2  # rounds
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt


class Run:
    """A contender under fully_shard: each block by itself, then the rest."""

    def __init__(self, name: str, shape: Shape) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model: nn.Module = step_cost.CONTENDERS[name](make_model(shape, torch.float32).cpu())[0]
        for block in [module for module in self.model.modules() if isinstance(module, LlamaDecoderLayer)]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.added = [] if name == DENSE else self.trained  # beside the weights of the model
        self.slots = [s for module in self.model.modules() for s in module.__dict__.get("_sparse_slots", {}).values()]
        self.optimizer: torch.optim.Optimizer | None = None
        if self.slots:
            self.optimizer = sk.SparseAdamW(self.trained, lr=1e-4)
        elif self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def step(self, ids: Tensor) -> None:
        self.loss(ids).backward()
        self.update()

    def counted_step(self, ids: Tensor) -> Content:
        """A step, the bytes it communicates, and the bytes that this rank holds between backward and optimizer."""
        with Collectives() as counter:
            loss = self.loss(ids)
            counter.phase = "backward"
            loss.backward()
            held = self.held_bytes()
            counter.phase = "step"
            self.update()
        return {"communicated": counter.table(), "held": held}

    def held_bytes(self) -> dict[str, int]:
        """Bytes at rest, every storage once. Positions are whole on every rank, all else is sharded."""
        added = set(self.added)
        positions = []
        for slot in self.slots:
            positions += [slot.positions, slot.part.index.positions, slot.part.source]
            if slot.narrow is not None:
                positions += [slot.narrow.index.positions, slot.narrow.features.numbers]
        states = self.optimizer.state.values() if self.optimizer else ()
        return {
            "weights": storage_bytes(p for p in self.model.parameters() if p not in added),
            "values": storage_bytes(self.added),
            "moments": storage_bytes(value for state in states for value in state.values()),
            "gradients": storage_bytes(p.grad for p in self.trained),
            "positions": storage_bytes(positions),
        }


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of memory behind tensors and the local shards of DTensors; other entries count for nothing."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            local: Any = getattr(tensor, "_local_tensor", tensor)
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def keep_freed_memory(keep: bool) -> None:
    """Let malloc keep what is freed, as it does after a while, or give all but small pieces back, for exact peaks."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * MIB if keep else MIB // 16)
        mallopt(M_TRIM_THRESHOLD, 64 * MIB if keep else MIB // 16)


def batch(shape: Shape, samples: int, length: int, number: int) -> Tensor:
    """Random tokens, others on each rank and in each round."""
    generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
    return torch.randint(shape.vocab, (samples, length), generator=generator)


def step_seconds(run: Run, number: int, shape: Shape, samples: int, length: int) -> float:
    """From the moment when all ranks are ready until the last one is done."""
    ids = batch(shape, samples, length, number)
    dist.barrier()
    start = time.perf_counter()
    run.step(ids)
    dist.barrier()
    return time.perf_counter() - start


def measure(shape: Shape, names: Sequence[str], rounds: int, samples: int, length: int) -> Content:
    """Contender -> its costs on this rank. One after the other, then rounds of interleaved steps of all."""
    ids = batch(shape, samples, length, 0)
    keep_freed_memory(False)
    Run(FROZEN, shape).step(ids)  # what libraries load and allocate once is there before a peak is measured
    runs, found = {}, {}
    for name in names:
        run = runs[name] = Run(name, shape)
        gc.collect()
        peak = PeakMemory("cpu")
        peak.start()
        run.step(ids)  # compares positions over the ranks, once, and makes the moments
        run.step(ids)
        costs = {"peak_bytes": peak.read(), **run.counted_step(ids)}
        found[name] = {"trained": sum(p.numel() for p in run.trained), **costs}
    keep_freed_memory(True)
    samplers = {
        name: partial(step_seconds, run, shape=shape, samples=samples, length=length) for name, run in runs.items()
    }
    for name, times in interleaved(samplers, least=WARM_UP + rounds).items():
        found[name]["step_seconds"] = median(times[WARM_UP:])
    return found
