"""The file to ship: what training changed, applied to the model it was trained from, and reverted exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from ..common.files import check_names, described, load_tensors, reading, save_tensors
from ..common.names import plain_names
from ..index import KIND, OLD_KIND, Index, index_of, kind_of
from ..ops import gather, scatter_
from ..selection import Selection
from . import sharding
from .fingerprint import base_of, fingerprint_of, is_whole
from .layers import refuse_train_only
from .left import Left
from .remap import joined
from .slot import Slot


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """The change that a delta makes to one tensor.

    values (index.compact_shape, dtype of the weight) replace the current ones. `base` is the fingerprint of the values
    that are replaced; it is empty if the whole tensor is replaced, so that it fits any base (a fresh task head).
    """

    index: Index
    values: Tensor
    base: str

    @classmethod
    def of(cls, index: Index, values: Tensor, originals: Tensor) -> TensorDelta:
        """The change from originals to values, on the CPU."""
        return cls(index.to("cpu"), values.cpu(), base_of(index, originals))


class Delta:
    """Trained values, their positions, and a fingerprint of the values they replace: the file to ship.

    The fingerprint covers the selected positions only. Two deltas of one base that do not overlap can be applied
    together, in any order; a base that differs at any selected position is refused. A tensor that is replaced as a
    whole has no fingerprint and fits any base, as a fresh task head must.

    Names are those of the plain model: a delta fits the model itself and the model inside PEFT, torch.compile or
    DistributedDataParallel. Parameters that PEFT adds, such as LoRA's A and B, keep their names.

    The file is safetensors: `<name>.indices` (int32, or int64 past 2^31 elements), `<name>.values`, and metadata.

    Args:
        changes: parameter name -> TensorDelta; usually made by `SparseModel.delta` or `load`.

    Source: ours.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> tuned = sk.train_only(model, sk.Selection({"bias": sk.Index(torch.tensor([0, 2]), (3,))}))
        >>> _ = next(tuned.parameters()).data.fill_(7.0)
        >>> delta = tuned.delta()
        >>> delta, delta.selection, delta.nbytes
        (Delta(2 values in 1 tensors, 16 bytes), Selection(2 elements of 1 tensors), 16)
    """

    def __init__(self, changes: Mapping[str, TensorDelta]) -> None:
        self.changes = dict(changes)

    @property
    def selection(self) -> Selection:
        """The positions that the delta writes."""
        return Selection({name: change.index for name, change in self.changes.items()})

    @property
    def nbytes(self) -> int:
        """Size of positions and values in bytes."""
        return sum(c.index.positions.nbytes + c.values.nbytes for c in self.changes.values())

    def __repr__(self) -> str:
        return f"Delta({self.selection.numel:,} values in {len(self.changes)} tensors, {self.nbytes:,} bytes)"

    @classmethod
    def from_slots(cls, model: nn.Module, slots: Mapping[str, Slot], left: Mapping[str, Left]) -> Delta:
        """The trained state of a model under train_only; see `SparseModel.delta`."""
        if any(slot.is_sharded() for slot in slots.values()):
            return cls._from_shards(model, slots, left)
        found = {name: (slot.weight, (slot.index, slot.originals)) for name, slot in slots.items()}
        for name, entry in left.items():
            part = joined(found[name][1], entry.part) if name in found else entry.part
            found[name] = (entry.weight, part)
        changes, plain = {}, plain_names(model)
        for name, (weight, (index, originals)) in found.items():
            changes[plain.get(name, name)] = TensorDelta.of(index, gather(weight.detach(), index), originals)
        return cls(changes)

    @classmethod
    @torch.no_grad()
    def _from_shards(cls, model: nn.Module, slots: Mapping[str, Slot], left: Mapping[str, Left]) -> Delta:
        """Of weights that are sharded: each value is gathered, in the dtype of the weight.

        The fingerprints are those of the first rank: others need not have loaded their weights before fully_shard.
        """
        if left:
            raise ValueError(
                f"delta() under fully_shard cannot read the positions of {next(iter(left))!r} that "
                "reselect(restore=False) left; take delta() before fully_shard"
            )
        plain = plain_names(model)
        cut = [slot for slot in slots.values() if slot.is_sharded()]
        bases = {id(slot): slot.base() for slot in cut if slot.parallel is not None}
        managed = [slot for slot in cut if slot.parallel is None]
        bases |= zip(map(id, managed), sharding.of_first(managed, lambda slot: slot.base()), strict=True)
        found = {}
        for slot, values in sharding.gathered(cut):
            found[id(slot)] = (values if slot.parallel is None else slot.parallel.whole(values)).cpu()
        changes = {}
        for name, slot in slots.items():
            if id(slot) in found:
                change = TensorDelta(slot.selected.to("cpu"), found[id(slot)], bases[id(slot)])
            else:  # outside of what fully_shard was given
                change = TensorDelta.of(slot.index, gather(slot.weight.detach(), slot.index), slot.originals)
            changes[plain.get(name, name)] = change
        return cls(changes)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically: `path` never contains a partial file.

        Examples:
            >>> model = torch.nn.Linear(4, 3)
            >>> with sk.train_only(model, sk.Selection.random(model, density=0.5)) as tuned:
            ...     tuned.delta().save("delta.safetensors")
            >>> with sk.Delta.load("delta.safetensors").apply(model):
            ...     y = model(torch.ones(1, 4))
        """
        tensors: dict[str, Tensor] = {}
        kinds = {}
        for name, change in self.changes.items():
            tensors[f"{name}.indices"] = change.index.positions
            tensors[f"{name}.values"] = change.values
            kinds[name] = {**kind_of(change.index), "base": change.base}
        save_tensors(path, tensors, {"sparsekernels": "delta", "tensors": json.dumps(kinds)})

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file. ValueError: the file is truncated, damaged, or of another kind.
        """
        tensors, metadata = load_tensors(path, "delta")
        kinds = described(
            path, metadata.get("tensors"), {str: tuple({**kind, "base": str} for kind in (OLD_KIND, KIND))}
        )
        check_names(path, tensors, (f"{name}.{part}" for name in kinds for part in ("indices", "values")))
        changes = {}
        with reading(path):
            for name, kind in kinds.items():
                index = index_of(tensors[f"{name}.indices"], kind)
                values = tensors[f"{name}.values"]
                if "rows" in kind and len(index.shape) > 2 and values.shape[1:] == index.shape[1:]:
                    values = values.reshape(-1, index.shape[-1])
                if values.shape != index.compact_shape or not values.is_floating_point():
                    raise ValueError(f"{name!r} has {values.dtype} {list(values.shape)} for the values of {index}")
                if not re.fullmatch("" if is_whole(index) else "[0-9a-f]{32}", kind["base"]):
                    raise ValueError(f"{name!r} has {kind['base'][:40]!r} for the fingerprint of its base")
                changes[name] = TensorDelta(index, values, kind["base"])
        return cls(changes)

    def apply(self, model: nn.Module) -> Applied:
        """Write the values into `model`, in place, and return a handle that reverts them exactly.

        Args:
            model: changed in place at `selection`; all other weights keep their bits.

        Returns:
            Applied: `revert()` restores the replaced values bit for bit, `swap(other)` exchanges deltas; as a context
            manager it reverts on exit.

        Raises:
            ValueError: a parameter is missing or has another shape or dtype; its weights at the selected positions are
                not those the delta was made from; the model is under train_only. The model is unchanged then.

        Examples:
            >>> model = torch.nn.Linear(4, 3)
            >>> with sk.train_only(model, sk.Selection.random(model, density=0.5)) as tuned:
            ...     delta = tuned.delta()
            >>> model = delta.apply(model).revert()
        """
        weights = self._checked(model)
        originals = {name: gather(w.detach(), self._index(name, w)) for name, w in weights.items()}
        for name, held in originals.items():
            change = self.changes[name]
            if change.base and fingerprint_of(change.index, held) != change.base:
                raise ValueError(
                    f"this delta was made for another base: {name!r} has other weights at the selected positions "
                    "(or an overlapping delta is already applied)"
                )
        _write(weights, self.changes, {name: change.values for name, change in self.changes.items()})
        return Applied(self, model, originals)

    def overlap(self, other: Delta) -> Selection:
        """The positions that both deltas write."""
        return self.selection & other.selection

    def merge(self, other: Delta) -> Delta:
        """Combine two deltas into one. Raises ValueError if both change the same tensor.

        Examples:
            >>> model = torch.nn.Linear(4, 3)
            >>> tuned = sk.train_only(model, sk.Selection({"weight": sk.Index.full((3, 4))}))
            >>> a, _ = tuned.delta(), tuned.restore()
            >>> b = sk.train_only(model, sk.Selection({"bias": sk.Index.full((3,))})).delta()
            >>> a.overlap(b).numel, a.merge(b)
            (0, Delta(15 values in 2 tensors, 84 bytes))
        """
        shared = self.overlap(other)
        if shared.numel:
            raise ValueError(f"the deltas overlap in {shared.numel} positions, first in {next(iter(shared))!r}")
        both = [name for name in self.changes if name in other.changes]
        if both:
            raise ValueError(f"both deltas change {both[0]!r}; apply them one after the other instead")
        return Delta({**self.changes, **other.changes})

    def _index(self, name: str, weight: Tensor) -> Index:
        return self.changes[name].index.to(weight.device)

    def _checked(self, model: nn.Module) -> dict[str, nn.Parameter]:
        refuse_train_only(model)
        weights = self.selection.check(model)
        for name, weight in weights.items():
            if weight.dtype != self.changes[name].values.dtype:
                raise ValueError(
                    f"{name!r} is {weight.dtype}, the delta was made for {self.changes[name].values.dtype}"
                )
        return weights


class Applied:
    """A delta that is applied to a model. As a context manager it reverts on exit."""

    def __init__(self, delta: Delta, model: nn.Module, originals: dict[str, Tensor]) -> None:
        self.delta = delta
        self.model = model
        self._originals: dict[str, Tensor] | None = originals

    def revert(self) -> nn.Module:
        """Restore the original values, bit for bit; a second call does nothing. Returns the model."""
        if self._originals is not None:
            weights = self.delta._checked(self.model)
            _write(weights, self.delta.changes, self._originals)
            self._originals = None
        return self.model

    def swap(self, other: Delta) -> Applied:
        """Revert this delta and apply `other`; if `other` does not fit, this one stays applied."""
        self.revert()
        try:
            return other.apply(self.model)
        except BaseException:
            self._originals = self.delta.apply(self.model)._originals
            raise

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


def _write(
    weights: Mapping[str, nn.Parameter], changes: Mapping[str, TensorDelta], values: Mapping[str, Tensor]
) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            scatter_(weight.detach(), changes[name].index.to(weight.device), values[name].to(weight.device))
