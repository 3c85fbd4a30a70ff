"""Selection: which weights of a model are trained, as one Index per parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .choosing import choose_units, count_for, unit_scores, units_for
from .common.files import check_names, described, load_tensors, reading, save_tensors
from .common.names import own_names
from .common.supported import holds_nan, refuse_unsupported_of
from .common.units import Granularity, Tile, tile_of
from .index import KIND, OLD_KIND, Index, index_of, kind_of


class Selection(Mapping[str, Index]):
    """A read-only mapping from parameter name to `Index`: the weights to train.

    `a | b`, `a & b` and `a - b` are set operations. Where the two have different units of one parameter, such as rows
    and columns, the result has elements. A parameter whose set becomes empty is dropped.

    Args:
        indices: parameter name -> Index. Not changed.

    Attributes:
        report: diagnostics of the method that made the selection. Not saved, and not kept by set operations.

    Raises:
        TypeError: a value is not an Index. ValueError: in a set operation, the two shapes of a parameter differ.

    Source: ours.

    Examples:
        >>> a = sk.Selection({"weight": sk.Index(torch.tensor([0, 5]), (2, 3))})
        >>> b = sk.Selection({"weight": sk.Index(torch.tensor([1]), (2, 3), "row")})
        >>> a, (a | b).numel, (a & b)["weight"].positions, list(a - a)
        (Selection(2 elements of 1 tensors), 4, tensor([5], dtype=torch.int32), [])
        >>> a.to("cpu")["weight"] == a["weight"], b.to_elements()["weight"]
        (True, Index(3 elements of [2, 3]))
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
        """Number of selected elements over all tensors."""
        return sum(index.numel for index in self.values())

    def to(self, device: torch.device | str) -> Selection:
        """Copy all positions to `device`; returns a new Selection."""
        return Selection({name: index.to(device) for name, index in self.items()})

    def to_elements(self) -> Selection:
        """Return the same set with one position per element."""
        return Selection({name: index.to_elements() for name, index in self.items()})

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
            if not a.same_units(b):
                a, b = a.to_elements(), b.to_elements()
            index = a.with_positions(rule(a.positions, b.positions.to(a.positions.device)))
            if len(index):
                out[name] = index
        return Selection(out)

    @classmethod
    def from_masks(
        cls, masks: Mapping[str, Tensor], *, granularity: Granularity = "element", block: Tile | None = None
    ) -> Selection:
        """Select the true entries of boolean masks; masks without any are dropped.

        Args:
            masks: parameter name -> bool tensor of the parameter's shape.
            granularity, block: as for `Index`; of vectors, rows.

        Raises:
            TypeError: a mask is not a bool tensor. ValueError: it is true in only a part of a unit.

        Examples:
            >>> sk.Selection.from_masks({"weight": torch.eye(3) > 0, "bias": torch.zeros(3) > 0})
            Selection(3 elements of 1 tensors)
        """
        indices: dict[str, Index] = {}
        for name, mask in masks.items():
            try:
                indices[name] = Index.from_mask(mask, *units_for(mask.shape, (granularity, block)))
            except ValueError as error:
                raise ValueError(f"masks[{name!r}]: {error}") from None
        return cls({name: index for name, index in indices.items() if len(index)})

    @classmethod
    def topk(
        cls,
        scores: Mapping[str, Tensor],
        k: int | None = None,
        *,
        density: float | None = None,
        per_tensor: bool = False,
        magnitude: bool = False,
        granularity: Granularity = "element",
        block: Tile | None = None,
        share_inputs: bool = False,
    ) -> Selection:
        """Select the largest scores, exactly; ties go to the earlier tensor, then to the lower position.

        The score of a row, column or block is the sum of squares of the scores in it; those with the largest score for
        each element they cost are selected.

        Args:
            scores: name -> scores of the parameter's shape, any floating dtype. Not changed.
            k: number of elements; or
            density: share of all scores, in (0, 1]: k = min(int(density * n) + 1, n).
            per_tensor: apply k or density to each tensor separately instead of globally.
            magnitude: rank elements by absolute value.
            granularity, block: as for `Index`; of vectors, rows.
            share_inputs: of columns: choose the same ones, by the sum of their scores, in weights that read one input
                (query, key and value; gate and up), so that training keeps one copy of these columns for all of them.

        Returns:
            Selection of k elements. Of larger units, as many of the best as it takes to have k elements, with k =
            int(density * n) for a density. Deterministic.

        Raises:
            ValueError: neither or both of k and density, either out of range, or NaN in the scores; a granularity or
                block that `Index` refuses; share_inputs for other units than columns.

        Source: ours; the rule for a density is that of SIFT's code, units and their scores are those of S2FT (Yang et
        al., arXiv 2412.06289) and SMT (He et al., arXiv 2405.15525) but for the sum of squares, which is ours.

        Examples:
            >>> scores = {"weight": torch.tensor([[0.1, -3.0], [2.0, 0.5]])}
            >>> sk.Selection.topk(scores, k=2)["weight"].positions
            tensor([2, 3], dtype=torch.int32)
            >>> sk.Selection.topk(scores, k=2, granularity="column")["weight"]
            Index(1 columns of [2, 2])
        """
        from .ops import topk

        if share_inputs and granularity != "column":
            raise ValueError(f'share_inputs is for granularity="column", got {granularity!r}')
        tile_of(torch.Size((1, 1)), granularity, block)
        if granularity != "element":
            _refuse_nan(scores)
            if not scores:
                raise ValueError("scores must hold at least one tensor")
            each = {n: unit_scores(x, (granularity, block), square=True) for n, x in scores.items() if x.numel()}
            shapes = {name: x.shape for name, x in scores.items()}
            units, sharing = (granularity, block), share_inputs
            return cls(
                choose_units(shapes, each, units, k=k, density=density, per_tensor=per_tensor, share_inputs=sharing)
            )
        out: dict[str, Index] = {}
        for names in [[name] for name in scores] if per_tensor else [list(scores)]:
            count = count_for(sum(scores[name].numel() for name in names), k, density)
            try:
                positions = topk([scores[name] for name in names], count, magnitude=magnitude)
            except ValueError:
                _refuse_nan({name: scores[name] for name in names})
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
        granularity: Granularity = "element",
        block: Tile | None = None,
        share_inputs: bool = True,
    ) -> Selection:
        """Select uniformly at random, the same share of every tensor: the baseline for any method.

        Args:
            like: a model, or a mapping from name to tensor or shape.
            density: share of each tensor, in (0, 1].
            seed: of a CPU generator, so the result does not depend on the device.
            names: restrict to these parameters.
            granularity, block: as for `Index`; of vectors, rows.
            share_inputs: of columns: choose the same ones in weights that read one input (query, key and value; gate
                and up), so that training keeps one copy of these columns for all of them.

        Returns:
            Selection on the CPU. Deterministic for a given seed.

        Raises:
            ValueError: density out of range, a name that `like` does not have, or a granularity or block that `Index`
                refuses.

        Source: random masks, Xu and Zhang, arXiv 2405.02596; units as in `topk`.

        Examples:
            >>> sk.Selection.random(torch.nn.Linear(10, 10), density=0.09, names=["weight"])
            Selection(10 elements of 1 tensors)
            >>> sk.Selection.random(torch.nn.Linear(10, 10), 0.09, names="weight", granularity="column")["weight"]
            Index(1 columns of [10, 10])
        """
        shapes: dict[str, torch.Size] = (
            {name: p.shape for name, p in like.named_parameters()}
            if isinstance(like, nn.Module)
            else {name: x.shape if isinstance(x, Tensor) else torch.Size(x) for name, x in like.items()}
        )
        chosen = list(shapes) if names is None else [names] if isinstance(names, str) else list(names)
        for name in chosen:
            if name not in shapes:
                raise ValueError(f"names: {name!r} is not among the {len(shapes)} tensors of `like`")
        shapes = {name: shapes[name] for name in chosen if shapes[name].numel()}
        tile_of(torch.Size((1, 1)), granularity, block)
        generator = torch.Generator().manual_seed(seed)
        if granularity != "element":
            shared = share_inputs and granularity == "column"
            return cls(choose_units(shapes, generator, (granularity, block), density=density, share_inputs=shared))
        out: dict[str, Index] = {}
        for name, shape in shapes.items():
            out.update(cls.topk({name: torch.rand(shape, generator=generator)}, density=density))
        return cls(out)

    def broadcast(self, src: int = 0, group: torch.distributed.ProcessGroup | None = None) -> Selection:
        """Send the selection of process `src` to all processes of a group: replicas must train the same positions.

        A collective call of torch.distributed. Returns a new Selection on the CPU, without a report; this one, which
        may differ between processes, is not changed.

        Args:
            src: global rank of the process whose selection is used.
            group: the participating processes; None for all.

        Raises:
            ValueError: torch.distributed is not initialised.

        Examples:
            >>> store = torch.distributed.HashStore()
            >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> sk.Selection.random(torch.nn.Linear(10, 10), density=0.1).broadcast(src=0)
            Selection(13 elements of 2 tensors)
            >>> torch.distributed.destroy_process_group()
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("broadcast needs torch.distributed; call init_process_group first")
        shared: list[Any] = [dict(self.to("cpu")) if dist.get_rank() == src else None]
        dist.broadcast_object_list(shared, src=src, group=group)
        return Selection(shared[0])

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, atomically: `path` never contains a partial file.

        Examples:
            >>> selection = sk.Selection.random(torch.nn.Linear(10, 10), density=0.1)
            >>> selection.save("selection.safetensors")
            >>> sk.Selection.load("selection.safetensors") == selection
            True
        """
        kinds = {name: kind_of(index) for name, index in self.items()}
        save_tensors(
            path,
            {name: index.positions for name, index in self.items()},
            {"sparsekernels": "selection", "tensors": json.dumps(kinds)},
        )

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError if the file is damaged or of another kind."""
        tensors, metadata = load_tensors(path, "selection")
        kinds = described(path, metadata.get("tensors"), {str: (OLD_KIND, KIND)})
        check_names(path, tensors, kinds)
        with reading(path):
            return cls({name: index_of(tensors[name], kind) for name, kind in kinds.items()})

    def summary(self) -> str:
        """Return a table with one line per tensor: number and kind of units, shape, share of the tensor.

        Examples:
            >>> print(sk.Selection({"w": sk.Index.full((2, 3))}).summary().split())
            ['w', '2', 'rows', 'of', '[2,', '3]', '100.000%', 'total', '6', 'elements', 'of', '6', '100.000%']
        """
        lines = []
        for name, index in self.items():
            share = index.numel / max(index.shape.numel(), 1)
            lines.append(
                f"{name:<60} {len(index):>12,} {index.unit_name():<8} of {list(index.shape)!s:<16} {share:8.3%}"
            )
        total = sum(index.shape.numel() for index in self.values())
        lines.append(f"{'total':<60} {self.numel:>12,} elements of {total:,} {self.numel / max(total, 1):.3%}")
        return "\n".join(lines)

    def check(self, model: nn.Module, *, tensor_parallel: bool = False) -> dict[str, nn.Parameter]:
        """Return the selected parameters of `model`, by the names of the selection; nothing is changed.

        For a model wrapped by PEFT, torch.compile or DistributedDataParallel, the names of the plain model work too.

        Args:
            model: any module.
            tensor_parallel: whether parameters may be DTensors, as parallelize_module makes them.

        Raises:
            ValueError: the model lacks a parameter, has it in another shape, or has it sharded or quantised; the
                message names it.

        Examples:
            >>> list(sk.Selection({"bias": sk.Index.full((2,))}).check(torch.nn.Linear(3, 2)))
            ['bias']
        """
        parameters, own = dict(model.named_parameters(remove_duplicate=False)), own_names(model, self)
        missing = [name for name in self if name not in own]
        if missing:
            raise ValueError(f"the selection names parameters that the model lacks: {', '.join(missing[:5])}")
        refuse_unsupported_of(model, own.values(), tensor_parallel=tensor_parallel)
        found = {name: parameters[own[name]] for name in self}
        for name, index in self.items():
            if index.shape != found[name].shape:
                raise ValueError(
                    f"selection[{name!r}] was made for shape {list(index.shape)}, "
                    f"the model's parameter has {list(found[name].shape)}"
                )
        return found

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Make parameter groups for `SparseAdamW`: the selected dense parameters with their indices. Raises as `check`.

        Examples:
            >>> model = torch.nn.Linear(3, 2)
            >>> selection = sk.Selection.random(model, density=0.5)
            >>> optimizer = sk.SparseAdamW(selection.param_groups(model), lr=1e-3)
        """
        params = self.check(model)
        return [{"params": list(params.values()), "indices": [self[n].to(p.device) for n, p in params.items()]}]


def _refuse_nan(scores: Mapping[str, Tensor]) -> None:
    for name, x in scores.items():
        if holds_nan(x):
            raise ValueError(f"scores[{name!r}] holds NaN")
