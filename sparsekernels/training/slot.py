"""The compact values of one selected tensor, and their positions in its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parallel import DistributedDataParallel

from ..common.supported import (
    SHARDED,
    as_integers,
    is_dtensor,
    is_flattened,
    local_of,
    refuse_sharded,
    refuse_unsupported,
)
from ..index import Index
from ..ops import gather, scatter_
from ..structure.layers import kind_of
from .compact import SLOT, VALUES, CompactParameter, Seen, is_private
from .fingerprint import base_of
from .narrow import Narrow, narrow_of
from .parallel import Parallel
from .replicas import Replicas, check_while_tracing

Holders = list[tuple[nn.Module, str]]


class Slot:
    """One selected tensor: the positions of its values, and the weights they replaced.

    Tied weights share one slot: `holders` are all modules that hold the weight; the first of them owns the values.
    `label` is the name it was selected by. Positions and originals are not buffers: code that broadcasts, casts or
    clears the buffers of a model must not change them.

    Attributes:
        narrow: the input features that the gradient depends on, where these are fewer than all.
        written: version of the values that the weight has. address: data pointer of the values at that time if they own
            their memory; -1 if they share it or have none.
        pending: whether a gradient arrived since. The optimizer step that follows may change values without a new
            version, as DeepSpeed's `values.data.copy_(...)` does.
        parallel: how tensor parallelism divides the weight; `index`, originals and `narrow` are then of what this rank
            holds, and `selected` is of the whole weight.
        shards: values and weight as FSDP2 keeps them, once found; part: what this rank holds (`sharding.Part`).
        seen: versions of values that are DTensors when the weight got them, None if not known.
        replicas: shared by all slots of a model. trained: whether a step saw a gradient. warned: whether a step without
            one was reported.
    """

    _index: Index
    narrow: Narrow | None
    _originals: Tensor | None
    _base: str | None

    def __init__(self, label: str, holders: Holders, replicas: Replicas) -> None:
        self.label, self.holders, self.replicas = label, holders, replicas
        self.owner, self.name = holders[0]
        self.written = self.address = -1
        self.pending = self.trained = self.warned = False
        self.parallel: Parallel | None = None
        self.shards: Any = None
        self.seen: Seen | None = None
        self.part: Any = None

    @property
    def weight(self) -> nn.Parameter:
        weight = self.owner._parameters[self.name]
        assert weight is not None
        return weight

    @property
    def values(self) -> nn.Parameter:
        values = self.owner._parameters[self.name + VALUES]
        assert values is not None
        return values

    @property
    def stepped(self) -> nn.Parameter:
        """The values that an optimizer steps; where FSDP2 has gathered those in the module, their shards."""
        values = self.values
        return values if self.shards is None or self.is_shard(values) else self.shards[0]

    @property
    def positions(self) -> Tensor:
        """The positions, on the device of the weight."""
        return self.index.positions

    @property
    def selected(self) -> Index:
        """The Index of the whole weight."""
        return self.index if self.parallel is None else self.parallel.selected

    @property
    def index(self) -> Index:
        return self.index_on(self.weight.device)

    def index_on(self, device: torch.device) -> Index:
        """The index, moved once; positions moved to the meta device would be lost."""
        if self._index.positions.device != device:
            moved = self._index.to(device)
            if device.type == "meta":
                return moved
            self._index = moved
        return self._index

    @property
    def originals(self) -> Tensor:
        """The original weights at the positions, in their original dtype, on the device of the weight."""
        if self._originals is None:
            raise ValueError(f"{self.label!r}: its original weights are not kept under fully_shard")
        if self._originals.is_meta:
            raise ValueError(
                f"{self.label!r} was on the meta device when train_only was called, so its original weights are "
                "unknown; merge() gives the model back as it is, of a sharded one save the state_dict; next time load "
                "the weights first, then call train_only"
            )
        return self._originals.to(self.weight.device)

    def base(self) -> str:
        """The fingerprint of the original weights, as `TensorDelta.base`. A collective call in tensor parallelism."""
        if self._base is not None:
            return self._base
        originals = self.originals if self.parallel is None else self.parallel.whole(self.originals)
        return base_of(self.selected, originals)

    def forget_originals(self) -> None:
        """Keep their fingerprint alone: under fully_shard every rank would hold all of them. Collective as `base`."""
        if self._originals is not None and not self._originals.is_meta:
            self._base, self._originals = self.base(), None

    def register(self, index: Index, values: nn.Parameter, originals: Tensor) -> None:
        """Put the values on the owner, replacing those that are there; keep positions and originals."""
        before = self.owner._parameters.get(self.name + VALUES)
        if before is not None:
            before.__dict__.pop(SLOT, None)  # an optimizer that still steps it no longer writes the weight
        self._index, self._originals, self._base = index, originals, None
        self.narrow = None
        kinds = {kind_of(module) for module, attribute in self.holders if attribute == "weight"} & {"linear", "conv1d"}
        if len(kinds) == 1:
            self.narrow = narrow_of(index, transposed="conv1d" in kinds)
        if self.narrow is not None:
            self.narrow.share(slot.narrow for slot in self.replicas.slots if slot is not self and slot.narrow)
        self.owner.register_parameter(self.name + VALUES, values)
        self.link(values)
        if self.parallel is not None:
            self.remember_shard()
            return
        self.written = values._version
        self._remember(values)

    def _remember(self, values: Tensor) -> None:
        """Memory that nothing else uses is checked again only after a backward, or when the values moved."""
        self.address = values.data_ptr() if values.data_ptr() != 0 and is_private(values) else -1

    def link(self, values: nn.Parameter) -> None:
        """Let SparseAdamW find the weight. A plain Parameter would pickle the slot, and the model with it."""
        if type(values) is nn.Parameter:
            values.__class__ = CompactParameter
        values.__dict__[SLOT] = self

    def unregister(self) -> None:
        """Remove the values from the owner. An optimizer that outlives this no longer writes the weight."""
        values = self.owner._parameters.pop(self.name + VALUES, None)
        if values is not None:
            values.__dict__.pop(SLOT, None)

    def sync_(self) -> tuple[nn.Parameter, Index]:
        """Write the values into the weight if they changed since the last call; return values and positions.

        Raises:
            ValueError: the model was sharded in a way that is not supported, or its replicas train other positions.
        """
        if self.is_managed():
            return self._gathered()
        if self.parallel is not None:
            return self._in_parallel()
        if torch.compiler.is_compiling():
            check_while_tracing(self.replicas.key)
            return self.values, self.index  # SparseAdamW writes; a version number is not part of a graph
        if DistributedDataParallel._active_ddp_module is not None:
            self.replicas.compare()
        values: Any = self.owner._parameters[self.name + VALUES]
        if SLOT not in values.__dict__:
            self._adopt(values)
        if values.data_ptr() != self.address:
            self.refresh_()
            self._remember(values)
            return values, self.index
        if values._version != self.written:
            self.write_(values)
            self.written, self.pending = values._version, False
        elif self.pending and torch._C._current_graph_task_id() == -1:  # not while a backward recomputes this
            self._write_pending(values.is_cpu)
        return values, self._index

    def _write_pending(self, compare: bool) -> None:
        """Write values that may have changed without a new version."""
        if compare:
            self.refresh_()
        else:
            # Comparing would wait for the device. Most likely this changes nothing, so autograd is not told.
            with _unsafe_preserve_version_counter(self.weight):
                self.write_(self._held())
        self.pending = False

    def _held(self) -> Tensor:
        """The values of `index`, where no module holds gathered ones."""
        return self.values.detach() if self.parallel is None else self.parallel.compact(local_of(self.values))

    def is_sharded(self) -> bool:
        """Whether the values are a DTensor, or gathered from one."""
        return self.parallel is not None or self.is_managed()

    def is_managed(self) -> bool:
        """Whether FSDP manages a module that holds the weight."""
        for module, _ in self.holders:  # noqa: SIM110 - a generator is slower
            if SHARDED in module.__dict__:
                return True
        return False

    def is_shard(self, tensor: Any) -> bool:
        """Whether this Parameter is one that FSDP2 has cut; not one that it has gathered, or does not manage."""
        inner = 0 if self.parallel is None else 1
        return is_dtensor(tensor) and tensor.device_mesh.ndim > inner

    def _in_parallel(self) -> tuple[nn.Parameter, Index]:
        """As `sync_`, in tensor parallelism: each rank holds the values of its part of the weight."""
        values: Any = self.values
        if torch.compiler.is_compiling():
            return values, self.index
        if self.seen is None or not self.seen.is_of(values):
            self.refresh_()
        elif self.pending and torch._C._current_graph_task_id() == -1:
            self._write_pending(values.is_cpu)
        return values, self.index

    def _gathered(self) -> tuple[nn.Parameter, Index]:
        """Values and positions under fully_shard. Nothing is written here: weights get their values after each step."""
        values, weight = (self.owner._parameters.get(self.name + tail) for tail in (VALUES, ""))
        plain = isinstance(values, nn.Parameter) and isinstance(weight, nn.Parameter)
        if values is None or weight is None or not plain or is_dtensor(values) != is_dtensor(weight):
            refuse_sharded(repr(self.label), "by FSDP1 or in part")
        if torch.compiler.is_compiling():
            return values, self.index  # version numbers would break the graph
        if is_flattened(values):
            refuse_sharded(repr(self.label), "by FSDP1")
        if self.shards is not None and self.seen is not None and self.seen.is_outdated(self.shards[0]):
            raise ValueError(
                f"{self.label!r}: its values changed outside of a step; call SparseModel.sync_() in all processes first"
            )
        return values, self.index

    def remember_shard(self) -> None:
        """The weight has the values as they are now, if they are a DTensor."""
        self.seen, self.pending = Seen.of(self.stepped) if is_dtensor(self.stepped) else None, False

    def check_supported(self) -> None:
        """Raise ValueError if the weight or its values were sharded, or replaced by an unsupported kind of tensor."""
        if self.is_managed():
            self._gathered()
            return
        for tensor in (self.values, self.weight):
            if self.parallel is None or not is_dtensor(tensor):
                refuse_unsupported(repr(self.label), tensor)

    def _adopt(self, values: nn.Parameter) -> None:
        """Another Parameter replaced the values: in a copied model, or by load_state_dict(assign=True)."""
        self.check_supported()
        self.link(values)

    def check_compiled(self) -> None:
        """Raise ValueError if the values can change without a new version: a compiled forward would not notice."""
        if self.parallel is not None or self.values.data_ptr() == self.address:
            return
        if not (self.values.is_meta or is_private(self.values)):
            raise ValueError(
                f"{self.label!r}: its compact values share memory with other tensors, as in the flat buffer of "
                "DeepSpeed ZeRO, and a compiled forward would not see them change; do not compile the model"
            )

    def refresh_(self) -> None:
        """Write the values into the weight wherever the two differ, whatever their versions are."""
        self.check_supported()
        values = self.values
        if values.is_meta:
            return
        wanted = self.index.without_padding(self._held().to(self.weight.dtype))
        if not torch.equal(as_integers(gather(local_of(self.weight), self.index)), as_integers(wanted)):
            self.write_(wanted)
        self.written, self.pending = values._version, False
        if self.parallel is not None:
            self.remember_shard()

    def write_(self, values: Tensor) -> None:
        """Write values of `index` into what this process holds of the weight."""
        scatter_(local_of(self.weight), self.index, values.detach())
        if self.parallel is not None:  # the version of its local tensor, which has changed, is not what autograd checks
            torch.autograd.graph.increment_version(self.weight)

    def loaded(self, weight: Tensor) -> Tensor:
        """The values that belong to a weight about to be loaded.

        A current value that rounds to the loaded weight is kept: it is more precise than the weight, and may just have
        been loaded from an optimizer's state.
        """
        values = self.values.detach()
        found = gather(weight.detach().contiguous(), self._index.to(weight.device)).to(values.dtype)
        if values.is_meta:
            return found
        return self.unrounded(values, found.to(values.device))

    def unrounded(self, values: Tensor, found: Tensor) -> Tensor:
        """Values of a loaded weight; those of now where they round to it."""
        if self.weight.dtype == values.dtype:
            return found
        rounded = values.to(self.weight.dtype).to(values.dtype)
        same = (rounded == found) & (rounded.signbit() == found.signbit())
        return torch.where(same, values, found)

    def __reduce__(self) -> Any:
        # The values go first, so that the copy of a model has its slots before anything runs. A copy's version
        # starts at 0. A submodule may be copied without the rest of the model.
        unknown = {"replicas": None, "shards": None, "seen": None, "part": None}
        state = {**self.__dict__, "written": -1, "address": -1, **unknown}
        return _linked, (self.owner._parameters.get(self.name + VALUES),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.replicas = Replicas([self])


def _linked(values: nn.Parameter | None) -> Slot:
    slot = object.__new__(Slot)
    if values is not None:
        slot.link(values)
    return slot
