"""Which weights are touched: `Index` for one tensor, `Selection` for a model.

An Index is validated when it is made and never changes, so nothing that receives one checks positions again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import check_names, described, load_tensors, reading, save_tensors
from .names import own_names
from .supported import refuse_unsupported_of


class Index:
    """Sorted unique positions in one tensor.

    Args:
        positions ([K], int32 or int64): strictly ascending; row numbers of dimension 0 where `rows` is true, else flat
            row-major offsets. Stored as int32 where every offset of the tensor fits.
        shape: shape of the tensor that is indexed.
        rows: whole rows (True) or single elements (False).

    Raises:
        TypeError: positions are not an integer tensor. ValueError: not one-dimensional, out of range, unsorted or
            duplicated; the first offending entry is named.
    """

    __slots__ = ("positions", "rows", "shape")

    def __init__(self, positions: Tensor, shape: Iterable[int], rows: bool = False) -> None:
        self.shape = torch.Size(shape)
        if any(size < 0 for size in self.shape) or math.prod(max(size, 1) for size in self.shape) >= 2**63:
            raise ValueError(f"shape must be that of a tensor, with fewer than 2^63 elements, got {list(self.shape)}")
        self.rows = bool(rows)
        self.positions = _validated(positions, self.limit, self.rows)

    @property
    def limit(self) -> int:
        """Positions are below this: rows, or elements, of the tensor."""
        if not self.rows:
            return self.shape.numel()
        if not self.shape:
            raise ValueError("rows=True needs a tensor with at least one dimension; shape is ()")
        return self.shape[0]

    @property
    def width(self) -> int:
        """Elements that one position stands for."""
        return self.shape[1:].numel() if self.rows else 1

    @property
    def numel(self) -> int:
        """Selected elements."""
        return len(self) * self.width

    @property
    def compact_shape(self) -> torch.Size:
        """Shape of the compact tensor that holds the selected values: [K], or [R, *shape[1:]] for rows."""
        return torch.Size((len(self), *self.shape[1:])) if self.rows else torch.Size((len(self),))

    @classmethod
    def full(cls, shape: Iterable[int]) -> Index:
        """Every row of a tensor: how a dense head is written."""
        shape = torch.Size(shape)
        return cls(torch.arange(shape[0] if shape else 1), shape, rows=bool(shape))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Index:
        """The elements where a boolean mask of the tensor's shape is true."""
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        return cls(mask.reshape(-1).nonzero().reshape(-1), mask.shape)

    def to(self, device: torch.device | str) -> Index:
        """The same Index with its positions on `device`."""
        return Index.trusted(self.positions.to(device), self.shape, self.rows)

    def to_elements(self) -> Index:
        """The same set, written element by element."""
        if not self.rows:
            return self
        starts = self.positions.long()[:, None] * self.width
        flat = (starts + torch.arange(self.width, device=starts.device)).reshape(-1)
        return Index.trusted(flat.to(_dtype_for(self.shape.numel())), self.shape, False)

    @staticmethod
    def trusted(positions: Tensor, shape: torch.Size, rows: bool) -> Index:
        """An Index around positions that come out of one: nothing is checked."""
        index = object.__new__(Index)
        index.positions, index.shape, index.rows = positions, shape, rows
        return index

    def __len__(self) -> int:
        return self.positions.shape[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Index):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.rows == other.rows
            and torch.equal(self.positions, other.positions.to(self.positions.device))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = "rows" if self.rows else "elements"
        return f"Index({len(self)} {kind} of {list(self.shape)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["positions"], state["shape"], state["rows"])  # type: ignore[misc]


def _dtype_for(limit: int) -> torch.dtype:
    return torch.int32 if limit <= 2**31 - 1 else torch.int64


def _validated(positions: Tensor, limit: int, rows: bool) -> Tensor:
    what = "row" if rows else "element"
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be an int32 or int64 tensor, got {got}")
    if positions.dim() != 1:
        raise ValueError(f"positions must have one dimension, got shape {list(positions.shape)}")
    if positions.numel():
        wrong = positions[1:] <= positions[:-1]
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            problem = "duplicated" if positions[at] == positions[at + 1] else "not sorted"
            raise ValueError(
                f"positions must be sorted and unique: {what} {int(positions[at + 1])} at entry {at + 1} is {problem}; "
                "pass positions.unique()"
            )
        first, last = int(positions[0]), int(positions[-1])
        if first < 0 or last >= limit:
            raise ValueError(f"positions must lie in [0, {limit}), got {what} {first if first < 0 else last}")
    return positions.to(_dtype_for(limit), copy=True).contiguous()


class Selection(Mapping[str, Index]):
    """A mapping from parameter name to `Index`, with set algebra, and ways to make, save and read one.

    `a | b`, `a & b` and `a - b` work position by position; rows meet elements as elements. A parameter whose set
    becomes empty is left out.

    Attributes:
        report: what the method that made the selection tells beside it; not saved, not carried through set algebra.
    """

    def __init__(self, indices: Mapping[str, Index]) -> None:
        for name, index in indices.items():
            if not isinstance(index, Index):
                raise TypeError(f"selection[{name!r}] must be an Index, got {type(index).__name__}")
        self._indices = dict(indices)
        self.report: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Index:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        return f"Selection({self.numel:,} elements of {len(self)} tensors)"

    @property
    def numel(self) -> int:
        """Selected elements over all tensors."""
        return sum(index.numel for index in self.values())

    def to(self, device: torch.device | str) -> Selection:
        """The same Selection with every position on `device`."""
        return Selection({name: index.to(device) for name, index in self.items()})

    def __or__(self, other: Selection) -> Selection:
        names = list(self) + [name for name in other if name not in self]
        return self._combine(other, names, lambda a, b: torch.cat([a, b]).unique())

    def __and__(self, other: Selection) -> Selection:
        return self._combine(other, [name for name in self if name in other], lambda a, b: a[torch.isin(a, b)])

    def __sub__(self, other: Selection) -> Selection:
        return self._combine(other, list(self), lambda a, b: a[~torch.isin(a, b)])

    def _combine(self, other: Selection, names: list[str], rule: Callable[[Tensor, Tensor], Tensor]) -> Selection:
        out: dict[str, Index] = {}
        for name in names:
            if name not in self or name not in other:
                out[name] = self[name] if name in self else other[name]
                continue
            a, b = self[name], other[name]
            if a.shape != b.shape:
                raise ValueError(f"{name!r} has shape {list(a.shape)} on the left, {list(b.shape)} on the right")
            if a.rows != b.rows:
                a, b = a.to_elements(), b.to_elements()
            index = Index.trusted(rule(a.positions, b.positions.to(a.positions.device)), a.shape, a.rows)
            if len(index):
                out[name] = index
        return Selection(out)

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor]) -> Selection:
        """The true entries of boolean masks; a mask without any is left out."""
        indices = {name: Index.from_mask(mask) for name, mask in masks.items()}
        return cls({name: index for name, index in indices.items() if len(index)})

    @classmethod
    def top_k(
        cls,
        scores: Mapping[str, Tensor],
        k: int | None = None,
        *,
        density: float | None = None,
        per_tensor: bool = False,
        magnitude: bool = False,
    ) -> Selection:
        """Select the largest scores, exactly; ties go to the earlier tensor, then to the lower position.

        Args:
            scores: name -> scores of the parameter's shape, any floating dtype. Not changed.
            k: how many elements; or `density`, a share of all scores in (0, 1]: k = min(int(density * n) + 1, n).
            per_tensor: apply k or density to each tensor by itself instead of to all together.
            magnitude: rank by absolute value.

        Raises:
            ValueError: neither or both of k and density, either out of range, or NaN among the scores.
        """
        from .ops import topk

        groups = [[name] for name in scores] if per_tensor else [list(scores)]
        out: dict[str, Index] = {}
        for names in groups:
            count = count_for(sum(scores[name].numel() for name in names), k, density)
            try:
                positions = topk([scores[name] for name in names], count, magnitude=magnitude)
            except ValueError:
                broken = [name for name in names if bool(scores[name].isnan().any())]
                if broken:
                    raise ValueError(f"scores[{broken[0]!r}] holds NaN") from None
                raise
            for name, found in zip(names, positions, strict=True):
                if found.numel():
                    out[name] = Index(found, scores[name].shape)
        return cls({name: out[name] for name in scores if name in out})

    @classmethod
    def random(
        cls,
        like: nn.Module | Mapping[str, Tensor | Iterable[int]],
        density: float,
        *,
        seed: int = 0,
        names: Iterable[str] | None = None,
    ) -> Selection:
        """Select elements uniformly at random, the same share of every tensor; the baseline for any method.

        Args:
            like: a model, or a mapping from name to tensor or shape. names: restrict to these.
            density: share of each tensor in (0, 1]. seed: of a CPU generator, so results do not depend on the device.
        """
        shapes: dict[str, torch.Size] = (
            {name: p.shape for name, p in like.named_parameters()}
            if isinstance(like, nn.Module)
            else {name: x.shape if isinstance(x, Tensor) else torch.Size(x) for name, x in like.items()}
        )
        generator = torch.Generator().manual_seed(seed)
        out: dict[str, Index] = {}
        for name in shapes if names is None else [names] if isinstance(names, str) else names:
            if name not in shapes:
                raise ValueError(f"names holds {name!r}, which is not among the {len(shapes)} tensors given")
            if not shapes[name].numel():
                continue
            scores = torch.rand(shapes[name], generator=generator)
            out.update(cls.top_k({name: scores}, density=density))
        return cls(out)

    def broadcast(self, src: int = 0, group: torch.distributed.ProcessGroup | None = None) -> Selection:
        """The selection of process `src`, in every process of a group: for replicas must train the same positions.

        A collective call of torch.distributed. A new Selection is returned, on the CPU and without a report; this one,
        which may differ from process to process, is not changed.

        Args:
            src: global rank of the process whose selection counts.
            group: the processes that take part; None for all.

        Raises:
            ValueError: torch.distributed is not initialised.

        Example::

            >>> selection = sk.methods.sift(model, my_batches).broadcast(src=0)
            >>> tuned = sk.sparsify(model, selection)
            >>> model = torch.nn.parallel.DistributedDataParallel(model)
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("broadcast needs torch.distributed; call init_process_group first")
        shared: list[Any] = [dict(self.to("cpu")) if dist.get_rank() == src else None]
        dist.broadcast_object_list(shared, src=src, group=group)
        return Selection(shared[0])

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically: at no time does `path` hold half a file."""
        kinds = {name: {"shape": list(index.shape), "rows": index.rows} for name, index in self.items()}
        save_tensors(
            path,
            {name: index.positions for name, index in self.items()},
            {"sparsekernels": "selection", "tensors": json.dumps(kinds)},
        )

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote. Raises ValueError for a file that is damaged or is something else."""
        tensors, metadata = load_tensors(path, "selection")
        kinds = described(path, metadata.get("tensors"), {str: {"shape": [int], "rows": bool}})
        check_names(path, tensors, kinds)
        with reading(path):
            return cls({name: Index(tensors[name], kind["shape"], kind["rows"]) for name, kind in kinds.items()})

    def summary(self) -> str:
        """A table, one line a tensor: positions, kind, shape, share of the tensor."""
        lines = []
        for name, index in self.items():
            share = index.numel / max(index.shape.numel(), 1)
            kind = "rows" if index.rows else "elements"
            lines.append(f"{name:<60} {len(index):>12,} {kind:<8} of {list(index.shape)!s:<16} {share:8.3%}")
        total = sum(index.shape.numel() for index in self.values())
        lines.append(f"{'total':<60} {self.numel:>12,} elements of {total:,} {self.numel / max(total, 1):.3%}")
        return "\n".join(lines)

    def check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The selected parameters of `model` by the names of the selection.

        In a model inside PEFT, torch.compile or DistributedDataParallel these may be the names of the plain model too.

        Raises:
            ValueError: a name the model lacks, another shape, or a parameter that is sharded or quantised; the message
                names what does not fit.
        """
        parameters, own = dict(model.named_parameters(remove_duplicate=False)), own_names(model, self)
        missing = [name for name in self if name not in own]
        if missing:
            raise ValueError(f"the selection names parameters that the model lacks: {', '.join(missing[:5])}")
        refuse_unsupported_of(model, own.values())
        found = {name: parameters[own[name]] for name in self}
        for name, index in self.items():
            if index.shape != found[name].shape:
                raise ValueError(
                    f"selection[{name!r}] was made for shape {list(index.shape)}, "
                    f"the model's parameter has {list(found[name].shape)}"
                )
        return found

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for `SparseAdamW`: the selected dense parameters with their indices."""
        params = self.check(model)
        return [{"params": list(params.values()), "indices": [self[n].to(p.device) for n, p in params.items()]}]


def count_for(numel: int, k: int | None, density: float | None) -> int:
    """How many elements `k` or `density` asks for among `numel`; SIFT's rule for a density [code]."""
    if (k is None) == (density is None):
        raise ValueError(f"give either k or density, got k={k} and density={density}")
    if k is not None:
        if not 0 < k <= numel:
            raise ValueError(f"k must lie in [1, {numel}], got {k}")
        return k
    assert density is not None
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    return min(int(density * numel) + 1, numel)


torch.serialization.add_safe_globals([Index])
