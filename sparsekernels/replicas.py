"""Replicas of a sparsified model under DistributedDataParallel: they must train the same positions."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from .slot import Slot


KNOWN: WeakValueDictionary[str, Replicas] = WeakValueDictionary()  # by key: torch.compile takes a string as constant


class Replicas:
    """The slots of one model, and whether all replicas of it are known to train the same positions.

    Gradients are averaged entry by entry, so entry i must be the same weight everywhere.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self.compared = False
        self.key = str(id(self))
        KNOWN[self.key] = self

    def compare(self, ddp: DistributedDataParallel) -> None:
        """Compare with the other processes, once: every one of them is in its forward now.

        Raises:
            ValueError: in all processes, if any of them trains other positions; the message names where.
        """
        mine = {slot.label: fingerprint(slot) for slot in self.slots}
        found: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(ddp.process_group))]
        dist.all_gather_object(found, mine, group=ddp.process_group)
        for rank, other in enumerate(found):
            names = [name for name in {**found[0], **other} if found[0].get(name) != other.get(name)]
            if names:
                raise ValueError(
                    f"{names[0]!r}: rank {rank} trains other positions than rank 0, and gradients of different weights "
                    "would be averaged; select once and share it: sparsify(model, selection.broadcast(src=0))"
                )
        self.compared = True


@torch.compiler.assume_constant_result
def compare_while_tracing(key: str) -> bool:
    """As `Replicas.compare`, under DistributedDataParallel: once, when torch.compile traces a forward."""
    replicas, ddp = KNOWN[key], DistributedDataParallel._active_ddp_module
    if ddp is not None and not replicas.compared:
        replicas.compare(ddp)
    return True


def fingerprint(slot: Slot) -> str:
    """128 bits of what a slot trains."""
    index = slot.index
    head = f"{list(index.shape)} {index.rows} {index.positions.dtype}".encode()
    raw = index.positions.cpu().numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=16, key=hashlib.sha256(head).digest()).hexdigest()
