"""Tensor parallelism (parallelize_module): each rank trains the selected positions of the part of a weight it holds.

Input and output of a layer are DTensors already, so the gradient of these positions is complete on their rank: nothing
of it is communicated. The compact values are a flat DTensor, so that clipping and checkpoints see all of them; each
rank has room for as many as the one that has most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.shards import Cut, all_gather
from ..common.supported import is_dtensor, refuse_sharded
from ..index import Index
from .parts import Source, part_of_index, put


@dataclass(frozen=True)
class Parallel:
    """How one selected weight is divided over the ranks of a device mesh.

    Attributes:
        mesh, placement: of the weight: one dimension; a dimension of the weight is sharded, or it is replicated.
        selected: the positions in the whole weight.
        parts: for each rank, the positions in what it holds, and where their values are in the whole compact tensor.
        rank: this one. room: values that each rank has room for.
    """

    mesh: Any
    placement: Any
    selected: Index
    parts: list[tuple[Index, Source]]
    rank: int
    room: int

    @classmethod
    def of(cls, weight: Any, index: Index, name: str) -> Parallel:
        """Raises ValueError for a weight that is not divided as parallelize_module does it."""
        if weight.device_mesh.ndim != 1 or type(weight.placements[0]).__name__ not in ("Shard", "Replicate"):
            refuse_sharded(name, f"as {weight.placements}")
        mesh, (placement,) = weight.device_mesh, weight.placements
        if placement.is_replicate():
            parts: list[tuple[Index, Source]] = [(index, ())]
        else:
            dim = placement.dim % weight.dim()
            bounds = [Cut.bounds(weight.shape[dim], mesh.size(), rank) for rank in range(mesh.size())]
            parts = [part_of_index(index, dim, first, last) for first, last in bounds]
        rank = 0 if placement.is_replicate() else mesh.get_local_rank()
        room = max(math.prod(part.compact_shape) for part, _ in parts)
        return cls(mesh, placement, index, parts, rank, room)

    @property
    def index(self) -> Index:
        """The selected positions in what this rank holds."""
        return self.parts[self.rank][0]

    def flat(self, compact: Tensor) -> Tensor:
        """The values of this rank [room], with zeros behind them."""
        return torch.nn.functional.pad(compact.reshape(-1), (0, self.room - compact.numel()))

    def compact(self, flat: Tensor) -> Tensor:
        """The opposite of `flat`, in the compact shape of `index`."""
        shape = self.index.compact_shape
        return flat[: math.prod(shape)].view(shape)

    def distributed(self, compact: Tensor) -> Any:
        """The DTensor [ranks * room] of which this rank holds these values."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placement = Replicate() if self.placement.is_replicate() else Shard(0)
        return DTensor.from_local(self.flat(compact), self.mesh, [placement], run_check=False)

    def parameter(self, compact: Tensor) -> nn.Parameter:
        """The Parameter to train, of the values of this rank."""
        return nn.Parameter(self.distributed(compact.detach()))

    def whole(self, compact: Tensor) -> Tensor:
        """The compact tensor of the whole weight, on every rank. A collective call."""
        if self.placement.is_replicate():
            return compact
        found = compact.new_zeros(self.selected.compact_shape)
        everything = all_gather(self.flat(compact), self.mesh.get_group(), self.mesh.device_type)
        for flat, (index, source) in zip(everything, self.parts, strict=True):
            put(found, source, flat[: math.prod(index.compact_shape)])
        return found

    def features(self, x: Any, dim: int) -> Tensor:
        """What this rank holds of a tensor [..., F] whose last dimension is dimension `dim` of the weight."""
        return self._local(x, self._is_shard_of(dim))

    def like_weight(self, x: Any) -> Tensor:
        """What this rank holds of a tensor of the weight's shape, such as its dense gradient."""
        return x.redistribute(placements=[self.placement]).to_local() if is_dtensor(x) else x  # type: ignore[no-any-return]

    def rows_of(self, ids: Any, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        """Rows of this rank's table that ids name, [n], and a mask of those that are padding or rows of other ranks."""
        ids = self._local(ids, False).reshape(-1)
        foreign = torch.zeros_like(ids, dtype=torch.bool) if padding_idx is None else ids == padding_idx
        if self._is_shard_of(0):
            first, last = Cut.bounds(self.selected.shape[0], self.mesh.size(), self.rank)
            foreign |= (ids < first) | (ids >= last)
            ids = ids - first
        return ids.masked_fill(foreign, 0), foreign

    def _is_shard_of(self, dim: int) -> bool:
        return not self.placement.is_replicate() and self.placement.dim % len(self.selected.shape) == dim

    def _local(self, x: Any, sharded: bool) -> Tensor:
        from torch.distributed.tensor import Replicate, Shard

        if not is_dtensor(x):
            return x  # type: ignore[no-any-return]
        wanted = Shard(x.dim() - 1) if sharded else Replicate()
        return x.redistribute(placements=[wanted]).to_local()  # type: ignore[no-any-return]
