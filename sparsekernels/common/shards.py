"""How a DTensor is cut along dimension 0, as fully_shard and distribute_tensor do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .supported import refuse_sharded

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.12


@dataclass(frozen=True)
class Cut:
    """How dimension 0 of a tensor is cut into chunks of equal length, of which the last ones may be short or empty.

    `device` is where its collectives run: those of NCCL on a GPU, also for shards that CPUOffloadPolicy keeps.
    """

    device: str
    group: dist.ProcessGroup
    ranks: int
    chunk: int
    first: int
    last: int

    @classmethod
    def of(cls, tensor: Any, name: str) -> Cut:
        """How a DTensor is cut. Raises ValueError if it is not as FSDP2 does it."""
        dims = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        if len(dims) != 1 or type(tensor.placements[dims[0]]).__name__ != "Shard" or tensor.placements[dims[0]].dim:
            refuse_sharded(name, f"as {tensor.placements}")
        mesh, length = tensor.device_mesh, tensor.shape[0]
        ranks, rank = mesh.size(dims[0]), mesh.get_local_rank(dims[0])
        chunk = -(-length // ranks)
        first, last = min(rank * chunk, length), min((rank + 1) * chunk, length)
        if tensor._local_tensor.shape[0] != last - first:
            refuse_sharded(name, f"with {tensor._local_tensor.shape[0]} rows here, where chunks have {last - first}")
        return cls(mesh.device_type, mesh.get_group(dims[0]), ranks, chunk, first, last)

    def gather(self, mine: Tensor) -> Tensor:
        """What each rank gives, as many entries [n] on all of them: [ranks, n]. A collective call."""
        sent = mine.to(self.device)
        everything = sent.new_empty(self.ranks * len(sent))
        _all_gather(everything, sent, group=self.group)
        return everything.view(self.ranks, len(sent)).to(mine.device)

    def sum(self, mine: Tensor) -> Tensor:
        """The sum of what each rank gives. A collective call."""
        total = mine.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(mine.device)
