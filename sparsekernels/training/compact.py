"""Compact Parameters: how they are made, recognised, and seen to change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.messages import listed, warn
from ..index import Index
from ..ops import gather

VALUES = "_values"  # a module keeps those of its weight as weight_values
SLOT = "_sparse_slot"  # where a compact Parameter keeps its Slot


class CompactParameter(nn.Parameter):
    """The values of a Slot. Pickled as a plain Parameter; its unpickled Slot finds it and restores the class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())


def warn_untrained(states: Mapping[Tensor, Any], parameters: Iterable[Tensor]) -> None:
    """Warn, once per parameter, of compact Parameters that were not stepped because they never had a gradient.

    Raises:
        ValueError: the model now has another Parameter in place of one of them, so this one gets no gradient again.
    """
    found = []
    for p in parameters:
        slot = p.__dict__.get(SLOT)
        if slot is None:
            continue
        if slot.stepped is not p:
            raise ValueError(
                f"{slot.label!r}: the optimizer steps a Parameter that the model no longer holds, for example after "
                "fully_shard or load_state_dict(assign=True); make a new optimizer of SparseModel.parameters()"
            )
        slot.trained |= p.grad is not None
        if slot.warned or p.grad is not None or ((slot.trained or states.get(p)) and p.requires_grad):
            continue
        slot.warned = True
        found.append(slot.label + ("" if p.requires_grad else " (requires_grad is False)"))
    if found:
        warn(
            f"sparsekernels: selected, but without a gradient in this step, so not trained: {listed(found)}. Either "
            "the loss does not depend on them; or a module other than their own reads them, as in Mamba: leave them "
            "out of the selection; or something froze their compact parameters, as peft.get_peft_model does: call "
            "requires_grad_(True) on SparseModel.parameters()."
        )


@dataclass(frozen=True)
class Seen:
    """The version of a DTensor and that of its local tensor, which count different changes."""

    version: int
    local: Tensor
    local_version: int

    @classmethod
    def of(cls, shard: Any) -> Seen:
        return cls(shard._version, shard._local_tensor, shard._local_tensor._version)

    def is_outdated(self, shard: Any) -> bool:
        """Whether the values changed; not known of another local tensor, such as `Module.to` makes on some ranks."""
        return shard._local_tensor is self.local and not self.is_of(shard)

    def is_of(self, shard: Any) -> bool:
        """Whether nothing has changed since."""
        same = shard._local_tensor is self.local
        return same and (shard._version, self.local._version) == (self.version, self.local_version)


def is_private(values: Tensor) -> bool:
    """Whether no other tensor uses the memory of the values, so that each change of them increments their version."""
    storage = values.untyped_storage()
    shared = torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor, and `storage` itself
    return storage.nbytes() == values.nbytes and not shared


def compact_copy(weight: Tensor, index: Index) -> tuple[CompactParameter, Tensor]:
    """Values to train, in fp32 (fp64 for fp64), and the originals in the dtype of the weight."""
    originals = gather(weight.detach(), index.to(weight.device))
    compute_dtype = torch.promote_types(originals.dtype, torch.float32)
    return CompactParameter(originals.to(compute_dtype, copy=True)), originals
