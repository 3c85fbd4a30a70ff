"""The file to ship: what training changed, to be applied to the model it was trained from, and taken back exactly."""

from __future__ import annotations

import hashlib
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
from ..index import Index
from ..ops import gather, scatter_
from ..selection import Selection
from .layers import refuse_train_only
from .remap import joined
from .slot import Left, Slot


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """What a delta does to one tensor.

    values (index.compact_shape, dtype of the weight) replace what is there; `base` is the fingerprint of what must be
    there, or empty where the whole tensor is replaced and it does not matter (a fresh task head).
    """

    index: Index
    values: Tensor
    base: str

    @classmethod
    def of(cls, index: Index, values: Tensor, originals: Tensor) -> TensorDelta:
        """The change from originals to values, on the CPU."""
        base = "" if _is_whole(index) else fingerprint(originals)
        return cls(index.to("cpu"), values.cpu(), base)


class Delta:
    """Positions, the absolute values that belong there, and a fingerprint of the values they replace.

    The fingerprint covers the selected positions only: two deltas of one base that do not overlap can be applied one on
    the other, in any order; a base with other weights at any selected position is refused. A tensor that is replaced as
    a whole has no fingerprint: it fits any base, as a fresh task head must.

    Names are those of the plain model, wherever it was trained: a delta fits the model by itself and inside PEFT,
    torch.compile or DistributedDataParallel alike. What PEFT adds, LoRA's A and B say, keeps its name.

    The file is safetensors: `<name>.indices` (int32, or int64 past 2^31 elements), `<name>.values`, and metadata.
    """

    def __init__(self, changes: Mapping[str, TensorDelta]) -> None:
        self.changes = dict(changes)

    @property
    def selection(self) -> Selection:
        """The positions that the delta writes."""
        return Selection({name: change.index for name, change in self.changes.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values."""
        return sum(c.index.positions.nbytes + c.values.nbytes for c in self.changes.values())

    def __repr__(self) -> str:
        return f"Delta({self.selection.numel:,} values in {len(self.changes)} tensors, {self.nbytes:,} bytes)"

    @classmethod
    def from_slots(cls, model: nn.Module, slots: Mapping[str, Slot], left: Mapping[str, Left]) -> Delta:
        """The trained state of a model under train_only; see `SparseModel.delta`."""
        found = {name: (slot.weight, (slot.index, slot.originals)) for name, slot in slots.items()}
        for name, entry in left.items():
            part = joined(found[name][1], entry.part) if name in found else entry.part
            found[name] = (entry.weight, part)
        changes, plain = {}, plain_names(model)
        for name, (weight, (index, originals)) in found.items():
            changes[plain.get(name, name)] = TensorDelta.of(index, gather(weight.detach(), index), originals)
        return cls(changes)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically: at no time does `path` hold half a file."""
        tensors: dict[str, Tensor] = {}
        kinds = {}
        for name, change in self.changes.items():
            tensors[f"{name}.indices"] = change.index.positions
            tensors[f"{name}.values"] = change.values
            kinds[name] = {"shape": list(change.index.shape), "rows": change.index.rows, "base": change.base}
        save_tensors(path, tensors, {"sparsekernels": "delta", "tensors": json.dumps(kinds)})

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError; ValueError for a file that is truncated, damaged, or something else.
        """
        tensors, metadata = load_tensors(path, "delta")
        kinds = described(path, metadata.get("tensors"), {str: {"shape": [int], "rows": bool, "base": str}})
        check_names(path, tensors, (f"{name}.{part}" for name in kinds for part in ("indices", "values")))
        changes = {}
        with reading(path):
            for name, kind in kinds.items():
                index = Index(tensors[f"{name}.indices"], kind["shape"], kind["rows"])
                values = tensors[f"{name}.values"]
                if values.shape != index.compact_shape or not values.is_floating_point():
                    raise ValueError(f"{name!r} has {values.dtype} {list(values.shape)} for the values of {index}")
                if not re.fullmatch("" if _is_whole(index) else "[0-9a-f]{32}", kind["base"]):
                    raise ValueError(f"{name!r} has {kind['base'][:40]!r} for the fingerprint of its base")
                changes[name] = TensorDelta(index, values, kind["base"])
        return cls(changes)

    def apply(self, model: nn.Module) -> Applied:
        """Write the values into `model`, in place, and return the handle that takes them back exactly.

        Raises:
            ValueError: a parameter is missing or has another shape or dtype, the weights at the selected positions are
                not those the delta was made from, or the model trains a selection. The model is unchanged then.
        """
        weights = self._checked(model)
        originals = {name: gather(w.detach(), self._index(name, w)) for name, w in weights.items()}
        for name, held in originals.items():
            if self.changes[name].base and fingerprint(held) != self.changes[name].base:
                raise ValueError(
                    f"this delta was made for another base: {name!r} holds other weights at the selected positions "
                    "(or another delta that overlaps is applied already)"
                )
        _write(weights, self.changes, {name: change.values for name, change in self.changes.items()})
        return Applied(self, model, originals)

    def overlap(self, other: Delta) -> Selection:
        """The positions that both deltas write."""
        return self.selection & other.selection

    def merge(self, other: Delta) -> Delta:
        """One delta that does what both do. Raises ValueError where they change one tensor both."""
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
    """A delta in place. As a context manager it reverts on leaving."""

    def __init__(self, delta: Delta, model: nn.Module, originals: dict[str, Tensor]) -> None:
        self.delta = delta
        self.model = model
        self._originals: dict[str, Tensor] | None = originals

    def revert(self) -> nn.Module:
        """Put the original values back, bit for bit; nothing happens the second time. Returns the model."""
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


def _is_whole(index: Index) -> bool:
    return index.numel == index.shape.numel()


def fingerprint(values: Tensor) -> str:
    """128-bit BLAKE2 of dtype, shape and bits."""
    head = f"{values.dtype} {list(values.shape)}".encode()
    raw = values.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16, key=hashlib.sha256(head).digest()).hexdigest()
