"""Put low-rank approximations in the place of weights, factored where that is smaller, and take them out again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...autograd import is_sparsified
from ...files import load_tensors, reading, save_tensors
from ...low_rank import Block, LowRankLinear
from ...matrices import Matrix, matrices
from ...pairs import kind_of
from .decompositions import Decompositions, Split, rank_for
from .ranking import Reduction


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a matrix as up [M', r] @ down [r, N], in fp32 (fp64 for fp64); rows None: all of them."""

    up: Tensor
    down: Tensor
    rows: Tensor | None


Prepared = list[tuple[Reduction, Matrix, list[Piece]]]


class Reduced:
    """A model with reduced weights, and the way back. As a context manager it reverts on leaving.

    Attributes:
        model: the model. plan: what was reduced. report: of `adapt` and `search`, how it was found; else empty.
    """

    def __init__(self, model: nn.Module, prepared: Prepared, changes: list[_Change]) -> None:
        self.model = model
        self.plan = [reduction for reduction, _, _ in prepared]
        self.report: dict[str, Any] = {}
        self._prepared = prepared
        self._changes = changes

    @property
    def saved(self) -> int:
        """Elements that the replaced weights had, less those of their factors."""
        return sum(change.saved for change in self._changes)

    def revert(self) -> nn.Module:
        """Put the original weights and modules back, bit for bit; nothing happens the second time. Returns the model.

        A module that was factored comes back on the device and in the dtype that its factors have by then.
        """
        for change in reversed(self._changes):
            change.revert()
        self._changes = []
        return self.model

    def merge(self) -> nn.Module:
        """Keep the reduced weights, with factors multiplied out into the original modules. Returns the model.

        What was trained since counts. The originals are overwritten, so there is no way back.
        """
        for change in self._changes:
            change.merge()
        self._changes = []
        return self.model

    def commit(self) -> nn.Module:
        """Keep the model as it is, factors and all, and free the originals: no way back. Returns the model."""
        self._changes = []
        return self.model

    def save(self, path: str | Path) -> None:
        """Write the approximations to a safetensors file, atomically, for `load`: as they were made, before training.

        The file holds fp32 factors, whatever the dtype of the model, so that loading gives the same bits.
        """
        tensors: dict[str, Tensor] = {}
        names = []
        for i, (reduction, _, pieces) in enumerate(self._prepared):
            names.append({**asdict(reduction), "pieces": len(pieces)})
            for k, piece in enumerate(pieces):
                tensors |= {f"{i}.{k}.up": piece.up, f"{i}.{k}.down": piece.down}
                if piece.rows is not None:
                    tensors[f"{i}.{k}.rows"] = piece.rows
        save_tensors(path, tensors, {"sparsekernels": "reductions", "reductions": json.dumps(names)})

    def __enter__(self) -> Reduced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


def reduce(
    model: nn.Module,
    plan: Iterable[Reduction],
    *,
    factored: bool = True,
    decompositions: Decompositions | None = None,
) -> Reduced:
    """Replace matrices of a model by their best approximations of lower rank.

    Args:
        model: any torch model; changed in place, undone by `Reduced.revert()`.
        plan: reductions, as `rank` returns them or made by hand; a matrix may occur once.
        factored: replace a Linear or Conv1D by a `LowRankLinear` where that stores less. Parts of a fused projection
            are factored beside dense rows. Everything else is written dense, in place: experts, tables, modules with
            hooks, of a subclass, that share their weight with another kind of module, or whose weight is read by the
            forward of their parent (`wo` of T5).
        decompositions: of a ranking of this model.

    Returns:
        Reduced.

    Numerics: decomposed and multiplied in fp32 (fp64 for fp64), rounded once to the dtype of the weight.
    Memory: the originals stay, until `commit()` or `merge()`.

    Raises:
        ValueError: an unknown matrix, one that occurs twice, numbers out of range, a weight that is not finite, a
            sparsified model. The model is unchanged then.

    Source: LASER (Sharma et al., arXiv 2312.13558); by rows, Sreeram et al. (arXiv 2510.20800).
    """
    plan = list(plan)
    cache = Decompositions() if decompositions is None else decompositions
    prepared: Prepared = []
    for reduction, matrix in zip(plan, _resolved(model, plan), strict=True):
        prepared.append((reduction, matrix, pieces(model, reduction, matrix, cache)))
    return _put(model, prepared, factored)


def load(model: nn.Module, path: str | Path, *, factored: bool = True) -> Reduced:
    """Reduce a model as a file of `Reduced.save` says; nothing is decomposed.

    Raises:
        FileNotFoundError; ValueError for a file that is damaged or something else, or made for another model. The model
        is unchanged then.
    """
    tensors, metadata = load_tensors(path, "reductions")
    with reading(path):
        found = json.loads(metadata["reductions"])
        counts = [entry.pop("pieces") for entry in found]
        plan = [Reduction(**entry) for entry in found]
        loaded = [
            [
                Piece(tensors[f"{i}.{k}.up"], tensors[f"{i}.{k}.down"], tensors.get(f"{i}.{k}.rows"))
                for k in range(count)
            ]
            for i, count in enumerate(counts)
        ]
    prepared: Prepared = []
    for reduction, matrix, mine in zip(plan, _resolved(model, plan), loaded, strict=True):
        device = model.get_parameter(matrix.parameter).device
        shape = sum(len(piece.up) for piece in mine), *{piece.down.shape[1] for piece in mine}
        if shape != matrix.shape:
            raise ValueError(f"{path} holds {list(shape)} for {matrix.label!r}, which is {list(matrix.shape)}")
        moved = [Piece(piece.up.to(device), piece.down.to(device), piece.rows) for piece in mine]
        prepared.append((reduction, matrix, moved))
    return _put(model, prepared, factored)


def pieces(model: nn.Module, reduction: Reduction, matrix: Matrix, cache: Decompositions) -> list[Piece]:
    """The approximation that a reduction stands for."""
    if reduction.blocks > matrix.shape[0]:
        raise ValueError(f"blocks: {reduction.matrix!r} has {matrix.shape[0]} rows, got {reduction.blocks}")
    split = Split(reduction.blocks, reduction.clustered, reduction.rho if reduction.clustered else None)
    parts = cache.of(model, [(matrix, split)], reduction.rho)[matrix, split]
    return [Piece(*part.truncated(rank_for(reduction.rho, part)), part.rows) for part in parts]


def product(matrix: Matrix, mine: Sequence[Piece]) -> Tensor:
    """The approximation, dense, [M, N]."""
    if mine[0].rows is None:
        return mine[0].up @ mine[0].down
    out = mine[0].up.new_empty(matrix.shape)
    for piece in mine:
        assert piece.rows is not None
        out[piece.rows.to(out.device)] = piece.up @ piece.down
    return out


def _resolved(model: nn.Module, plan: Sequence[Reduction]) -> list[Matrix]:
    if any(is_sparsified(module) for module in model.modules()):
        raise ValueError("the model is sparsified; call restore() or merge() on its SparseModel first")
    labels = [reduction.matrix for reduction in plan]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"plan reduces {label!r} twice; a matrix may occur once")
    found: dict[str, Matrix] = {}
    for label in labels:
        found |= matrices(model, [label])
        if label not in found:
            raise ValueError(f"plan: {label!r} is no matrix of the model, but stands for several; name one")
    return [found[label] for label in labels]


# ---- changes


class _Dense:
    """A matrix written in place."""

    saved = 0

    def __init__(self, parameter: nn.Parameter, matrix: Matrix, value: Tensor) -> None:
        self.parameter, self.matrix = parameter, matrix
        self.original = matrix.read(parameter).clone()
        matrix.write_(parameter, value)

    def revert(self) -> None:
        self.matrix.write_(self.parameter, self.original)

    def merge(self) -> None:
        pass


class _Factored:
    """Modules that hold one weight, replaced; `places` are all (parent, name of the child) of each."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        places: Sequence[list[tuple[nn.Module, str]]],
        layers: Sequence[LowRankLinear],
    ) -> None:
        self.modules, self.places, self.layers = modules, places, layers
        self.saved = modules[0].weight.numel() - sum(block.numel for block in layers[0].blocks)  # type: ignore[operator]
        self._set(layers)

    def _set(self, modules: Sequence[nn.Module]) -> None:
        for module, places in zip(modules, self.places, strict=True):
            for parent, name in places:
                parent._modules[name] = module

    def revert(self) -> None:
        for module, layer in zip(self.modules, self.layers, strict=True):
            module.to(layer.down.device, layer.down.dtype).train(layer.training)
        self._set(self.modules)

    def merge(self) -> None:
        self.revert()
        weight = self.layers[0].weight.detach()
        own: Any = self.modules[0].weight
        with torch.no_grad():
            own.copy_(weight.T if kind_of(self.modules[0]) == "conv1d" else weight)


_Change = _Dense | _Factored


def _put(model: nn.Module, prepared: Prepared, factored: bool) -> Reduced:
    by_parameter: dict[str, list[tuple[Matrix, list[Piece]]]] = {}
    for _, matrix, mine in prepared:
        by_parameter.setdefault(matrix.parameter, []).append((matrix, mine))
    changes: list[_Change] = []
    try:
        for name, work in by_parameter.items():
            parameter = model.get_parameter(name)
            layers = _layers(model, parameter, work) if factored else None
            if layers is not None:
                changes.append(_Factored(*layers))
            else:
                changes += [_Dense(parameter, matrix, product(matrix, mine)) for matrix, mine in work]
    except BaseException:
        for change in reversed(changes):
            change.revert()
        raise
    return Reduced(model, prepared, changes)


def _layers(model: nn.Module, parameter: nn.Parameter, work: Sequence[tuple[Matrix, list[Piece]]]) -> Any:
    """Modules with this weight, their places, their replacements; None if that cannot be, or does not store less."""
    modules = []
    for module in model.modules():
        for attribute, own in module._parameters.items():
            if own is parameter:
                if attribute != "weight" or not _replaceable(module):
                    return None
                modules.append(module)
    places = [
        [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]
        for module in modules
    ]
    if not all(places) or any(_reads_weight(*place) for mine in places for place in mine):
        return None  # the model itself; or the dense weight would be multiplied out by every forward
    weight = parameter.detach().T if kind_of(modules[0]) == "conv1d" else parameter.detach()
    if len({kind_of(module) for module in modules}) > 1:
        return None
    blocks, rows = _blocks(weight, parameter, work)
    if sum(block.numel for block in blocks) >= weight.numel():
        return None
    layers = [LowRankLinear(blocks, module.bias, rows).train(module.training) for module in modules]  # type: ignore[arg-type]
    for layer in layers[1:]:
        for name in [name for name in layer._parameters if name != "bias"]:
            layer._parameters[name] = layers[0]._parameters[name]
    return modules, places, layers


def _replaceable(module: nn.Module) -> bool:
    """Whether nothing but the forward of a Linear or Conv1D depends on the module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if type(module) is not nn.Linear and kind_of(module) != "conv1d":
        return False
    bias: Any = module.bias
    alike = bias is None or (bias.dtype, bias.device) == (module.weight.dtype, module.weight.device)
    return alike and "forward" not in module.__dict__ and not any(hooks)


def _reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether the forward of the parent asks for the child's weight, as that of T5 does for its dtype."""
    try:
        return f"self.{name}.weight" in inspect.getsource(type(parent).forward)
    except (OSError, TypeError):
        return False


def _blocks(
    weight: Tensor, parameter: nn.Parameter, work: Sequence[tuple[Matrix, list[Piece]]]
) -> tuple[list[Block], Tensor | None]:
    """The rows of the weight in blocks: those that were reduced, and those that were not, in one of its own."""

    def like(x: Tensor) -> nn.Parameter:
        return nn.Parameter(x.to(parameter.dtype), parameter.requires_grad)

    every = torch.arange(len(weight))
    found: list[tuple[Tensor, Block]] = []
    for matrix, mine in work:
        own = every if matrix.rows is None else every[matrix.rows]
        for piece in mine:
            rows = own if piece.rows is None else own[piece.rows]
            found.append((rows, Block(like(piece.down), like(piece.up))))
    rest = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, torch.cat([rows for rows, _ in found]), False)
    if bool(rest.any()):
        rows = every[rest]
        found.append((rows, Block(like(weight[rows.to(weight.device)].clone()))))
    found.sort(key=lambda entry: int(entry[0][0]))
    rows = torch.cat([rows for rows, _ in found])
    return [block for _, block in found], None if torch.equal(rows, every) else rows
