"""Tensors cut along dimension 0, as fully_shard and distribute_tensor do it, and what ranks tell each other of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .supported import refuse_sharded

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.12


def all_gather(mine: Tensor, group: dist.ProcessGroup, device: str) -> Tensor:
    """What each rank gives, as many entries [n] on all of them: [ranks, n]. A collective call, on `device`."""
    sent = _placed(mine, device)
    everything = sent.new_empty(group.size() * len(sent))
    _all_gather(everything, sent, group=group)
    return everything.view(group.size(), len(sent)).to(mine.device)


def _placed(x: Tensor, device: str) -> Tensor:
    """On a device of this type: where it is, if that is one; not on the current device, which may be another."""
    return x if x.device.type == device else x.to(device)


def of_everyone(mine: Any, groups: Iterable[dist.ProcessGroup]) -> dict[int, Any]:
    """Rank -> what each process gives, of all that are reached through these groups one after the other; sorted."""
    found = {dist.get_rank(): mine}
    for group in groups:
        others: list[Any] = [None] * group.size()
        dist.all_gather_object(others, found, group=group)
        found = {rank: each for other in others for rank, each in other.items()}
    return dict(sorted(found.items()))


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
    def of(cls, tensor: Any, name: str, local_length: int | None = None) -> Cut:
        """How FSDP2 cut a DTensor.

        local_length: of dimension 0 on this rank before FSDP2, where the last dimension of the mesh is that of tensor
            parallelism.

        Raises:
            ValueError: it is not cut as FSDP2 does it.
        """
        mesh, placements = tensor.device_mesh, tensor.placements
        kinds = ("Shard",) if local_length is None else ("Shard", "_StridedShard")
        outer = placements if local_length is None else placements[:-1]
        dims = [i for i, placement in enumerate(outer) if not placement.is_replicate()]
        if len(dims) != 1 or type(placements[dims[0]]).__name__ not in kinds or placements[dims[0]].dim:
            refuse_sharded(name, f"as {placements}")
        length = tensor.shape[0] if local_length is None else local_length
        ranks, rank = mesh.size(dims[0]), mesh.get_local_rank(dims[0])
        first, last = cls.bounds(length, ranks, rank)
        if tensor._local_tensor.shape[0] != last - first:
            refuse_sharded(name, f"with {tensor._local_tensor.shape[0]} rows here, where chunks have {last - first}")
        return cls(mesh.device_type, mesh.get_group(dims[0]), ranks, -(-length // ranks), first, last)

    @staticmethod
    def bounds(length: int, ranks: int, rank: int) -> tuple[int, int]:
        """First and last entry of a rank, as torch.chunk cuts."""
        chunk = -(-length // ranks)
        return min(rank * chunk, length), min((rank + 1) * chunk, length)

    def gather(self, mine: Tensor) -> Tensor:
        """What each rank gives, as many entries [n] on all of them: [ranks, n]. A collective call."""
        return all_gather(mine, self.group, self.device)

    def sum(self, mine: Tensor) -> Tensor:
        """The sum of what each rank gives. A collective call."""
        total = _placed(mine.clone(), self.device)
        dist.all_reduce(total, group=self.group)
        return total.to(mine.device)
