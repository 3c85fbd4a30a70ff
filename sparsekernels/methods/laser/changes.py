"""Replacements of a weight: an approximation written in place, or modules that store its factors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.low_rank import Block, LowRankLinear
from ...structure.layers import kind_of
from ...structure.matrices import Matrix
from .decompositions import Piece, product


class Dense:
    """A matrix written in place."""

    parameters_saved = 0

    def __init__(self, parameter: nn.Parameter, matrix: Matrix, value: Tensor) -> None:
        self.parameter, self.matrix = parameter, matrix
        self.original = matrix.read(parameter).clone()
        matrix.write_(parameter, value)

    def revert(self) -> None:
        self.matrix.write_(self.parameter, self.original)

    def merge(self) -> None:
        pass


class Factored:
    """Replaces the modules that hold one weight; `places` are all (parent, name of the child) of each."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        places: Sequence[list[tuple[nn.Module, str]]],
        layers: Sequence[LowRankLinear],
    ) -> None:
        self.modules, self.places, self.layers = modules, places, layers
        self.parameters_saved = modules[0].weight.numel() - sum(block.numel for block in layers[0].blocks)  # type: ignore[operator]
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


Replacement = Dense | Factored


def put(model: nn.Module, work: Sequence[tuple[Matrix, Sequence[Piece]]], factored: bool) -> list[Replacement]:
    """Make the changes; if one fails, those before it are undone."""
    by_parameter: dict[str, list[tuple[Matrix, Sequence[Piece]]]] = {}
    for matrix, mine in work:
        by_parameter.setdefault(matrix.parameter, []).append((matrix, mine))
    changes: list[Replacement] = []
    try:
        for name, these in by_parameter.items():
            parameter = model.get_parameter(name)
            layers = _layers(model, parameter, these) if factored else None
            if layers is not None:
                changes.append(Factored(*layers))
            else:
                for matrix, mine in these:
                    changes.append(Dense(parameter, matrix, product(matrix, mine)))
    except BaseException:
        for change in reversed(changes):
            change.revert()
        raise
    return changes


def _layers(model: nn.Module, parameter: nn.Parameter, work: Sequence[tuple[Matrix, Sequence[Piece]]]) -> Any:
    """Modules with this weight, their places, their replacements; None if impossible, or if it does not store less."""
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
        return None  # the model itself; or every forward would compute the dense weight
    weight = parameter.detach().T if kind_of(modules[0]) == "conv1d" else parameter.detach()
    if len({kind_of(module) for module in modules}) > 1:
        return None
    blocks, rows = _blocks(weight, parameter, work)
    if not LowRankLinear.is_smaller(blocks):
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
    """Whether the parent's forward reads the child's weight, as T5's does for its dtype."""
    try:
        return f"self.{name}.weight" in inspect.getsource(type(parent).forward)
    except (OSError, TypeError):
        return False


def _blocks(
    weight: Tensor, parameter: nn.Parameter, work: Sequence[tuple[Matrix, Sequence[Piece]]]
) -> tuple[list[Block], Tensor | None]:
    """The rows of the weight in blocks: those that were reduced, and the rest in one of their own."""

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
