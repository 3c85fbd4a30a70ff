"""Tensor parallelism (parallelize_module): each rank trains the selected positions of the part of a weight it holds.

The layers of a divided model communicate their inputs and outputs, so the gradient of these positions is complete on
their rank: nothing of it is communicated. The compact values are a flat DTensor, so that clipping and checkpoints see
all of them; each rank has room for as many as the one that has most.
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
from .parts import Ranges, Source, part_of_index, put, within_ranges

ROUNDED = 64  # rooms are multiples of this, so that fully_shard cuts them into equal chunks, as some of torch needs


@dataclass(frozen=True)
class Parallel:
    """How one selected weight is divided over the ranks of a device mesh.

    Attributes:
        mesh: of one dimension. dim: the dimension of the weight that is sharded, None if all ranks hold all of it.
        groups: equal parts of that dimension, of each of which every rank holds a slice: 2 where transformers divides
            a fused weight (gate and up projections in one tensor).
        selected: the positions in the whole weight. index: those in what this rank holds.
        room: values that each rank has room for.
    """

    mesh: Any
    dim: int | None
    groups: int
    selected: Index
    index: Index
    room: int

    @classmethod
    def of(cls, weight: Any, index: Index, name: str) -> Parallel:
        """Raises ValueError for a weight that is not a Shard, _StridedShard or Replicate of a one-dimensional mesh."""
        mesh, placement = weight.device_mesh, weight.placements[0]
        if mesh.ndim != 1 or type(placement).__name__ not in ("Shard", "_StridedShard", "Replicate"):
            refuse_sharded(name, f"as {weight.placements}")
        if placement.is_replicate():
            return cls(mesh, None, 1, index, index, math.prod(index.compact_shape))
        dim, groups = placement.dim % weight.dim(), getattr(placement, "split_factor", 1)
        parts = [_part(index, dim, mesh.size(), groups, rank)[0] for rank in range(mesh.size())]
        most = max(math.prod(part.compact_shape) for part in parts)
        return cls(mesh, dim, groups, index, parts[mesh.get_local_rank()], max(1, -(-most // ROUNDED)) * ROUNDED)

    @property
    def layout(self) -> Tensor:
        """What the order of the values in the flat DTensor depends on, besides `selected`."""
        grouped = [self.groups] if self.groups > 1 else []
        return torch.tensor([-1 if self.dim is None else self.dim, self.mesh.size(), self.room, *grouped])

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

        placement = Replicate() if self.dim is None else Shard(0)
        return DTensor.from_local(self.flat(compact), self.mesh, [placement], run_check=False)

    def parameter(self, compact: Tensor) -> nn.Parameter:
        """The Parameter to train, of the values of this rank."""
        return nn.Parameter(self.distributed(compact.detach()))

    def whole(self, compact: Tensor) -> Tensor:
        """The compact tensor of the whole weight, on every rank. A collective call."""
        if self.dim is None:
            return compact
        found = compact.new_zeros(self.selected.compact_shape)
        for rank, flat in enumerate(all_gather(self.flat(compact), self.mesh.get_group(), self.mesh.device_type)):
            index, source = _part(self.selected, self.dim, self.mesh.size(), self.groups, rank)
            put(found, source, flat[: math.prod(index.compact_shape)])
        return found

    def fits(self, x: Any, dim: int) -> bool:
        """Whether `features` needs no communication."""
        return not is_dtensor(x) or x.placements == (self._features(x, dim),)

    def features(self, x: Any, dim: int) -> Tensor:
        """What this rank holds of a tensor [..., F] whose last dimension is dimension `dim` of the weight."""
        return x.redistribute(placements=[self._features(x, dim)]).to_local() if is_dtensor(x) else x  # type: ignore[no-any-return]

    def like_weight(self, x: Any) -> Tensor:
        """What this rank holds of a tensor of the weight's shape, such as its dense gradient."""
        return x.redistribute(placements=[self._placement(self.dim)]).to_local() if is_dtensor(x) else x  # type: ignore[no-any-return]

    def rows_of(self, ids: Any, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        """Rows of this rank's table that ids name, [n], and a mask of those that are padding or rows of other ranks."""
        ids = (ids.full_tensor() if is_dtensor(ids) else ids).reshape(-1)
        foreign = torch.zeros_like(ids, dtype=torch.bool) if padding_idx is None else ids == padding_idx
        if self.dim == 0:
            ids = within_ranges(
                ids, _ranges(self.selected.shape[0], self.mesh.size(), self.groups, self.mesh.get_local_rank())
            )
            foreign |= ids < 0
        return ids.masked_fill(foreign, 0), foreign

    def _features(self, x: Any, dim: int) -> Any:
        return self._placement(x.dim() - 1 if self.dim == dim else None)

    def _placement(self, dim: int | None) -> Any:
        """That of a tensor whose dimension `dim` is divided as that of the weight."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        if dim is None:
            return Replicate()
        return Shard(dim) if self.groups == 1 else _StridedShard(dim, split_factor=self.groups)


def _part(index: Index, dim: int, ranks: int, groups: int, rank: int) -> tuple[Index, Source]:
    return part_of_index(index, dim, _ranges(index.shape[dim], ranks, groups, rank))


def _ranges(length: int, ranks: int, groups: int, rank: int) -> Ranges:
    """First and last entry of what a rank holds of each group."""
    found = []
    for group in range(groups):
        begin, end = Cut.bounds(length, groups, group)
        first, last = Cut.bounds(end - begin, ranks, rank)
        found.append((begin + first, begin + last))
    return found
