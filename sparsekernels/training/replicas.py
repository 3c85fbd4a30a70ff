"""Replicas of a model in DistributedDataParallel, and its shards: they must train the same positions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary, ref

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..common.shards import of_everyone
from ..index import Index
from .narrow import Narrow


class Replicated(Protocol):
    """The part of a Slot that is compared."""

    label: str
    replicas: Replicas
    narrow: Narrow | None

    @property
    def selected(self) -> Index: ...

    @property
    def values(self) -> Any: ...

    def is_managed(self) -> bool: ...

    def is_shard(self, tensor: Any) -> bool: ...

    def check_compiled(self) -> None: ...


KNOWN: WeakValueDictionary[str, Replicas] = WeakValueDictionary()  # by key: torch.compile treats a string as a constant

REPLICAS = "_sparse_replicas"  # where a model under train_only keeps its own


class Replicas:
    """The slots of one model, and whether all its replicas are known to train the same positions.

    Gradients are averaged entry by entry, so entry i must be the same weight in every process.
    """

    def __init__(self, slots: Sequence[Replicated], model: nn.Module | None = None) -> None:
        self.slots, self.model = slots, None if model is None else ref(model)
        self.compared = False
        self.key = str(id(self))
        KNOWN[self.key] = self

    def __reduce__(self) -> Any:
        return Replicas, (self.slots,)

    def compare(self) -> None:
        """Compare with the other processes, once, in a training forward: every process takes part in that one.

        Raises:
            ValueError: in all processes, if any of them trains other positions; the message names the parameter.
        """
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None or self.compared or not torch.is_grad_enabled():
            return
        self._compare([ddp.process_group])

    def compare_over(self, meshes: Iterable[Any]) -> None:
        """As `compare`, once, with the other processes of device meshes."""
        if not self.compared:
            self._compare([mesh.get_group(dim) for mesh in dict.fromkeys(meshes) for dim in range(mesh.ndim)])

    def _compare(self, groups: Sequence[Any]) -> None:
        """With all processes that are reached through these groups, one after the other."""
        found = of_everyone({slot.label: fingerprint(slot.selected) for slot in self.slots}, groups)
        first, mine = next(iter(found.items()))
        for rank, other in found.items():
            names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
            if names:
                raise ValueError(
                    f"{names[0]!r}: rank {rank} trains other positions than rank {first}, and gradients of different "
                    "weights would be averaged; select once and share it: "
                    "train_only(model, selection.broadcast(src=0))"
                )
        self.compared = True


def before_forward(model: nn.Module, *_: Any) -> None:
    """A hook of the whole model: in the first batch, some processes may skip a selected layer that others run."""
    if torch.compiler.is_compiling():
        return
    replicas: Replicas = model.__dict__[REPLICAS]
    if replicas.model is None or replicas.model() is not model:  # a copy, in which each slot has its own
        replicas.model = ref(model)
        for slot in replicas.slots:
            slot.replicas = replicas
    if DistributedDataParallel._active_ddp_module is None:
        if not replicas.compared and replicas.slots and replicas.slots[0].is_managed():
            sharded = [slot.values for slot in replicas.slots if slot.is_shard(slot.values)]
            if sharded:  # else FSDP2 has gathered all of them by now: they are compared in the first step
                replicas.compare_over(values.device_mesh for values in sharded)
        return
    for slot in () if replicas.compared else replicas.slots:
        slot.replicas = replicas  # in a copy of the model each slot has its own
    replicas.compare()


def check_while_tracing(key: str) -> bool:
    """The checks of a forward, done once, when torch.compile traces it."""
    replicas = KNOWN[key]
    for slot in replicas.slots:
        slot.check_compiled()
    replicas.compare()
    return True


# As torch.compiler.assume_constant_result, without its slow import of torch._dynamo.
check_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fingerprint(index: Index) -> str:
    """A 128-bit hash of an Index."""
    head = f"{list(index.shape)} {index.granularity} {index.tile} {index.positions.dtype}".encode()
    raw = index.positions.cpu().numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=16, key=hashlib.sha256(head).digest()).hexdigest()
