"""Models under fully_shard (FSDP2): what a rank holds of the selected weights, and how values reach them.

FSDP2 shards, gathers and reduces the compact Parameters like any other: they become DTensors, cut along dimension 0.
Gradients, optimizer state, clipping and checkpoints need nothing from here. A rank holds other rows of the weights than
of their values, though: after a step all values are gathered once, many tensors in one collective, and each rank writes
what lies in its rows. Shards are current at any time, so that state_dict needs no communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.shards import Cut
from ..common.supported import as_integers, is_dtensor, local_of, refuse_sharded
from ..index import Index
from ..ops import gather, scatter_
from .compact import SLOT
from .parts import Source, part_of_index, put, taken
from .replicas import KNOWN, Replicas, before_forward
from .slot import Slot

BUCKET = 2**26  # bytes that one collective gathers


@dataclass(frozen=True)
class Part:
    """What this rank holds of one selected tensor.

    Attributes:
        values: how the compact values are cut.
        index: the selected positions within this rank's rows of the weight.
        source: where their values are in the compact tensor.
        aligned: whether every rank holds the values of its own rows already.
    """

    values: Cut
    index: Index
    source: Source
    aligned: bool


def held(slot: Slot) -> Index:
    """The selected positions in what this process holds of the weight."""
    return part_of(slot).index if slot.is_shard(slot.weight) else slot.index


def held_of(weight: Any, index: Index) -> Index:
    """The part of a selection that lies in what this process holds of a weight."""
    if not is_dtensor(weight):
        return index
    cut = Cut.of(weight, f"a weight of shape {list(index.shape)}")
    return part_of_index(index, 0, [(cut.first, cut.last)])[0]


def shards_of(slot: Slot) -> tuple[Any, Any]:
    """Values and weight as FSDP2 keeps them; the module itself holds gathered ones during a forward, and after some."""
    now = slot.values, slot.weight
    if not slot.is_managed():  # by tensor parallelism alone
        return now
    if slot.shards is None or slot.is_shard(now[0]):
        if not (slot.is_shard(now[0]) and slot.is_shard(now[1])):
            slot.check_supported()
            raise ValueError(
                f"{slot.label!r} holds no shard at the moment: FSDP2 keeps it gathered after an evaluation; call "
                "reshard() on the model that fully_shard was given"
            )
        slot.shards = now
    return slot.shards


def part_of(slot: Slot, loaded: Any = None) -> Part:
    """What this rank holds of a slot, worked out once for the device of its weight, or of one about to be loaded."""
    values, weight = shards_of(slot)
    device = (weight if loaded is None else loaded).device
    if slot.part is None or slot.part.index.positions.device != device:
        index = slot.index_on(device)
        cut = Cut.of(weight, repr(slot.label), None if slot.parallel is None else index.shape[0])
        part, source = part_of_index(index, 0, [(cut.first, cut.last)])
        whole_rows = index.granularity == "row" and index.compact_shape == index.shape
        aligned = whole_rows or (index.granularity == "column" and len(index.shape) == 2)
        room = None if slot.parallel is None else slot.parallel.room
        slot.part = Part(Cut.of(values, repr(slot.label), room), part, source, aligned and slot.parallel is None)
    return slot.part


def link_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer find the slots of its Parameters, which accelerate, too, may have replaced; see `link`."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    unknown = {id(p) for p in params if is_dtensor(p) and SLOT not in p.__dict__}
    for replicas in list(KNOWN.values()) if unknown else []:
        _resharded(replicas)
        if any(id(slot.values) in unknown for slot in replicas.slots):
            link(replicas)


def link(replicas: Replicas) -> None:
    """Let optimizers find the slots: fully_shard replaced the compact Parameters by new ones.

    Raises:
        ValueError: sharded in a way that is not supported.
    """
    slots: Sequence[Any] = replicas.slots
    for slot in slots:
        if slot.parallel is not None and not slot.is_managed() and SLOT not in slot.values.__dict__:
            slot.link(slot.values)
    managed = _managed(replicas)
    if all(SLOT in slot.stepped.__dict__ for slot in managed):
        return
    for slot in _resharded(replicas):
        if slot.weight.is_meta:
            raise ValueError(
                f"{slot.label!r} is on the meta device: make the optimizer after to_empty() and loading the weights"
            )
        part_of(slot)
    _compare_before_gathering(replicas)
    for slot in managed:
        shards_of(slot)[0].__dict__[SLOT] = slot
        slot.remember_shard()
        if slot.parallel is None:  # else in the first step, because this is collective then
            slot.forget_originals()


def _compare_before_gathering(replicas: Replicas) -> None:
    """Put our hook before that of FSDP2, which fails where ranks have other numbers of positions."""
    model = None if replicas.model is None else replicas.model()
    hooks: Any = {} if model is None else model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is before_forward]:
        hooks.move_to_end(key, last=False)


def _managed(replicas: Replicas) -> list[Slot]:
    slots: Sequence[Any] = replicas.slots
    return [slot for slot in slots if slot.is_managed()]


def _resharded(replicas: Replicas) -> list[Slot]:
    """The slots that FSDP manages, once their modules hold shards again."""
    managed, model = _managed(replicas), replicas.model() if replicas.model is not None else None
    if model is not None:
        reshard(model, managed)
    return managed


def reshard(model: nn.Module, slots: Iterable[Slot]) -> None:
    """Let modules hold shards again: the outermost ones do not after a forward without a backward."""
    if all(slot.is_shard(slot.values) for slot in slots):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def compare(slots: Iterable[Slot]) -> None:
    """Raise ValueError, in all processes, if another one trains other positions. A collective call, the first time."""
    slots = [slot for slot in slots if not slot.replicas.compared]
    meshes = [shards_of(slot)[0].device_mesh for slot in slots]
    for slot in slots:
        slot.replicas.compare_over(meshes)


def of_first(slots: Iterable[Slot], work: Callable[[Slot], Any]) -> list[Any]:
    """What `work` returns for each slot in the first process of the device mesh; small things. A collective call.

    Raises:
        ValueError: `work` raised it in the first process.
    """
    slots = list(slots)
    if not slots:
        return []
    mesh = shards_of(slots[0])[0].device_mesh
    shared: list[Any] = [None]
    if mesh.get_rank() == mesh.mesh.flatten()[0]:
        try:
            shared = [[work(slot) for slot in slots]]
        except ValueError as error:  # the others wait: they raise it, too
            shared = [error]
    for dim in range(mesh.ndim):
        dist.broadcast_object_list(shared, group=mesh.get_group(dim), group_src=0)
    if isinstance(shared[0], ValueError):
        raise shared[0]
    return list(shared[0])


def gathered(slots: Iterable[Slot]) -> Iterator[tuple[Slot, Tensor]]:
    """The values of each slot, in the compact shape of its Index and in the dtype of the weight.

    A collective call: every rank passes the same slots, in the same order.
    """
    kinds: dict[Any, list[Slot]] = {}
    for slot in slots:
        if not slot.is_managed():
            assert slot.parallel is not None
            yield slot, slot.parallel.compact(local_of(slot.values)).to(slot.weight.dtype)
            continue
        weight = shards_of(slot)[1]
        kinds.setdefault((part_of(slot).values.group, weight.dtype, weight.device), []).append(slot)
    for (_, dtype, _), members in kinds.items():
        bucket: list[Slot] = []
        for slot in members:
            bucket.append(slot)
            if sum(shards_of(each)[0].numel() for each in bucket) * dtype.itemsize >= BUCKET:
                yield from _gather(bucket, dtype)
                bucket = []
        if bucket:
            yield from _gather(bucket, dtype)


def _gather(slots: list[Slot], dtype: torch.dtype) -> Iterator[tuple[Slot, Tensor]]:
    shards = [shards_of(slot)[0] for slot in slots]
    cuts = [part_of(slot).values for slot in slots]
    lengths = [cut.chunk * math.prod(shard.shape[1:]) for cut, shard in zip(cuts, shards, strict=True)]
    mine = torch.zeros(sum(lengths), dtype=dtype, device=shards[0].device)
    for shard, room in zip(shards, mine.split(lengths), strict=True):
        local = local_of(shard).reshape(-1)
        room[: len(local)] = local
    for slot, found in zip(slots, cuts[0].gather(mine).split(lengths, 1), strict=True):
        shape = slot.index.compact_shape
        yield slot, found.reshape(-1)[: math.prod(shape)].view(shape)


@torch.no_grad()
def write_(slots: Iterable[Slot]) -> None:
    """Write values into the weights: each rank into its own rows. A collective call with the same slots on each rank.

    A module may hold its weight gathered, after a forward without a backward: that copy is written too.

    Raises:
        ValueError: the ranks train other positions.
    """
    slots = list(slots)
    compare(slots)
    apart = []
    for slot in slots:
        values, weight = shards_of(slot)
        if slot.is_managed() and part_of(slot).aligned and slot.is_shard(slot.weight):
            _write(local_of(weight), part_of(slot).index, local_of(values))
        else:
            apart.append(slot)
    for slot, values in gathered(apart):
        if slot.is_managed():
            part = part_of(slot)
            _write(local_of(shards_of(slot)[1]), part.index, taken(values, part.source))
        if not slot.is_shard(slot.weight):
            slot.write_(values)
    for slot in slots:
        slot.remember_shard()
        if slot.is_managed():
            slot.forget_originals()


def _write(weight: Tensor, index: Index, values: Tensor) -> None:
    if len(index) and values.numel():
        scatter_(weight, index, values.contiguous())


@torch.no_grad()
def loaded(slot: Slot, weight: Any) -> Tensor:
    """As `Slot.loaded`, of a DTensor cut as the weight is. A collective call."""
    from torch.distributed.tensor import DTensor

    values, own = shards_of(slot)
    if weight.placements != own.placements:
        refuse_sharded(repr(slot.label), f"as {own.placements}, its state as {weight.placements}")
    local = local_of(weight).contiguous()
    if slot.is_managed():
        part = part_of(slot, weight)
        whole = torch.zeros(slot.index.compact_shape, dtype=values.dtype, device=local.device)
        put(whole, part.source, gather(local, part.index).to(values.dtype))
        bits = part.values.sum(as_integers(whole))  # each entry has one owner, so the sum of all keeps its bits
        mine = bits.view(values.dtype)
        mine = (mine if slot.parallel is None else slot.parallel.flat(mine))[part.values.first : part.values.last]
    else:
        assert slot.parallel is not None
        mine = slot.parallel.flat(gather(local, slot.index_on(local.device)).to(values.dtype))
    kept = mine if values.is_meta else slot.unrounded(local_of(values), mine)
    return DTensor.from_local(
        kept, values.device_mesh, values.placements, run_check=False, shape=values.shape, stride=values.stride()
    )


def summed(shards: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of what each process found in its shard, added up over the processes that share a DTensor."""
    kinds: dict[Any, list[str]] = {}
    for name, shard in shards.items():
        kinds.setdefault((shard.device_mesh, shard.placements), []).append(name)
    found: dict[str, int] = {}
    for (mesh, placements), names in kinds.items():
        shard = shards[names[0]].device
        device = shard if shard.type == mesh.device_type else mesh.device_type
        total = torch.tensor([counts[name] for name in names], device=device)
        for dim in sorted(range(mesh.ndim), key=lambda dim: placements[dim].is_replicate()):
            how = dist.ReduceOp.MAX if placements[dim].is_replicate() else dist.ReduceOp.SUM
            dist.all_reduce(total, how, group=mesh.get_group(dim))
        found |= dict(zip(names, total.tolist(), strict=True))
    return found
