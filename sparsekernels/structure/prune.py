"""Remove rows and columns from the modules of a model, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.pruned import PrunedLinear
from .layers import weight_size

WeightOf = Callable[[str], tuple[Tensor, "Tensor | None"]]


@dataclass(frozen=True, eq=False)
class Cut:
    """What remains of a Linear or Conv1D; positions (int64, sorted, on the CPU) in the original module, None: all.

    Attributes:
        inputs: those that the module still gets, after the modules before it were narrowed.
        columns: those of `inputs` that it reads; None: all of them.
        outputs: those that it still returns.
        rows: those of `outputs` that it computes; the others are 0. None: all of them.
        shape: (M, N) of the original module.

    Raises:
        ValueError: positions that are not int64, sorted, unique and in range, or not among those that remain.
    """

    inputs: Tensor | None
    columns: Tensor | None
    outputs: Tensor | None
    rows: Tensor | None
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for size, left, used in ((self.shape[1], "inputs", "columns"), (self.shape[0], "outputs", "rows")):
            for side in (left, used):
                _check_positions(side, getattr(self, side), size)
            outer, inner = getattr(self, left), getattr(self, used)
            if outer is not None and inner is not None and not bool(torch.isin(inner, outer).all()):
                raise ValueError(f"{used} must be among {left}")


@dataclass(frozen=True, eq=False)
class Cuts:
    """The result of `Planner.plan`.

    Attributes:
        modules: by name, for every module that can be cut, even if it loses nothing.
        attributes: by name of a module that splits heads or applies the activation of an MLP, the new values of its
            attributes; a dot leads into an object that other modules share, of which the module gets its own view.
        total: parameters of the named modules, weights and biases, shared ones once.
        removed: how many of them are no longer stored.
    """

    modules: dict[str, Cut]
    attributes: dict[str, dict[str, int]]
    total: int
    removed: int


def cut(model: nn.Module, cuts: Cuts, weight_of: WeightOf | None = None) -> None:
    """Remove from the model everything that `cuts` leaves out, in place; nothing is changed if anything raises.

    A module that reads all remaining inputs and computes all remaining outputs stays the same object, with narrower
    Parameters; any other is replaced by a PrunedLinear. Attributes of attentions and MLPs are updated. dtype, device,
    mode and requires_grad are kept, gradients are dropped; a module that loses nothing is not touched.

    Args:
        model: the planner's, or a copy of it.
        cuts: the result of `Planner.plan`.
        weight_of: returns (weight [M, N], bias [M] or None) to use for the module of that name instead of its own,
            outputs by inputs for a Conv1D too; called for every module in `cuts.modules`. If nothing is removed, the
            tensors themselves are used if dtype and device allow.

    Cost: a copy of the remaining weights of all modules that lose something, while the originals are still there.

    Raises:
        ValueError: a module is missing, has another size than when planned, or lacks an attribute to update; weight_of
            returned another shape.
    """
    prepare_cut(model, cuts, weight_of).install()


@dataclass(frozen=True, eq=False)
class PreparedCut:
    """The modules and attributes that `cut` will install into the still uncut model.

    Attributes:
        values: by name of a module, the new values of its attributes. made: by name, replacements of modules.
    """

    model: nn.Module
    values: dict[str, dict[str, Any]]
    made: dict[str, nn.Module]

    def install(self) -> None:
        """Cut the model. Never raises."""
        for name, changed in self.values.items():
            for key, value in changed.items():
                setattr(self.model.get_submodule(name), key, value)
        for name, module in self.made.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state_dict after the cut; in another order."""
        state: dict[str, Tensor] = self.model.state_dict()
        for name, changed in self.values.items():
            state.update({f"{name}.{key}": x for key, x in changed.items() if isinstance(x, nn.Parameter)})
        for name, module in self.made.items():
            for key in [key for key in state if key.startswith(f"{name}.")]:
                del state[key]
            state.update(module.state_dict(prefix=f"{name}."))
        return state


def prepare_cut(model: nn.Module, cuts: Cuts, weight_of: WeightOf | None = None) -> PreparedCut:
    """The part of `cut` that can raise; the model is unchanged until `install`."""
    made: dict[str, nn.Module] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, each in cuts.modules.items():
        if weight_of is None and each.inputs is each.columns is each.outputs is each.rows is None:
            continue
        module = _checked(model, name, each)
        weight, bias = _own(module) if weight_of is None else weight_of(name)
        _check_values(name, module, each, weight, bias)
        rows = each.outputs if each.rows is None else each.rows
        columns = each.inputs if each.columns is None else each.columns
        weight, bias = _parameters(module, weight, bias, rows, columns)
        outputs, inputs = (
            n if left is None else len(left) for n, left in zip(each.shape, (each.outputs, each.inputs), strict=True)
        )
        if each.rows is None and each.columns is None:
            values[name] = _narrower(module, weight, bias, outputs, inputs)
        else:
            made[name] = PrunedLinear(
                weight,
                bias,
                _places(each.outputs, each.rows),
                _places(each.inputs, each.columns),
                in_features=inputs,
                out_features=outputs,
            ).train(module.training)
    for name, numbers in cuts.attributes.items():
        values.setdefault(name, {}).update(_attributes(name, _module(model, name), numbers))
    return PreparedCut(model, values, made)


def _check_positions(side: str, positions: Tensor | None, size: int) -> None:
    if positions is None:
        return
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"{side} must be int64 [any], got {positions.dtype} of {list(positions.shape)}")
    if len(positions) and (
        int(positions[0]) < 0 or int(positions[-1]) >= size or not bool((positions[1:] > positions[:-1]).all())
    ):
        raise ValueError(f"{side} must be sorted, unique and lie in [0, {size})")


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        raise ValueError(f"cuts: the model has no module {name!r}; they were planned for another model") from e


def _checked(model: nn.Module, name: str, each: Cut) -> Any:
    module = _module(model, name)
    try:
        size = weight_size(module)
    except AttributeError as e:
        raise ValueError(f"cuts: {name!r} is a {type(module).__name__}; expected a Linear or Conv1D") from e
    if size != each.shape:
        raise ValueError(f"cuts: {name!r} was {list(each.shape)} when they were planned, and is {list(size)}")
    return module


def _check_values(name: str, module: Any, each: Cut, weight: Tensor, bias: Tensor | None) -> None:
    if weight.shape != each.shape or (bias is None) != (module.bias is None):
        raise ValueError(
            f"weight_of({name!r}) must return a weight {list(each.shape)} and "
            f"{'no bias' if module.bias is None else 'a bias'}, got {list(weight.shape)} and "
            f"{'none' if bias is None else list(bias.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"weight_of({name!r}) must return a bias [{each.shape[0]}], got {list(bias.shape)}")


def _is_transposed(module: Any) -> bool:
    return not isinstance(module, nn.Linear)


def _own(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight.T if _is_transposed(module) else module.weight, module.bias


def _parameters(
    module: Any, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """What remains of the weight and the bias, with dtype, device and requires_grad of the module's own."""
    weight = weight.detach().to(module.weight)
    bias = None if bias is None else bias.detach().to(module.bias)
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns.to(weight.device))
    left = nn.Parameter(weight.contiguous(), module.weight.requires_grad)
    return left, None if bias is None else nn.Parameter(bias, module.bias.requires_grad)


def _narrower(
    module: Any, weight: nn.Parameter, bias: nn.Parameter | None, outputs: int, inputs: int
) -> dict[str, Any]:
    """The new attributes of a module that needs no gather or scatter."""
    if _is_transposed(module):
        weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
        return {"weight": weight, "bias": bias, "nf": outputs, "nx": inputs}
    return {"weight": weight, "bias": bias, "out_features": outputs, "in_features": inputs}


def _places(left: Tensor | None, used: Tensor | None) -> Tensor | None:
    """Positions among the remaining ones."""
    return used if left is None or used is None else torch.searchsorted(left, used)


class _View:
    """A configuration as seen by a module that lost some heads: other numbers, all else from the original."""

    def __init__(self, config: Any, numbers: Mapping[str, int]) -> None:
        vars(self).update(numbers, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # copy and pickle look these up on an empty object
            raise AttributeError(name)
        return getattr(self._config, name)


def _attributes(name: str, module: Any, numbers: Mapping[str, int]) -> dict[str, Any]:
    """The module's own numbers, and views of the objects that it shares with others."""
    for key, number in numbers.items():
        try:
            now = attrgetter(key)(module)
        except AttributeError:
            now = None
        if type(now) is not int or not 0 < number <= now:
            raise ValueError(f"cuts: {name!r} has {now} as its {key}, which cannot become {number}")
    values: dict[str, Any] = {key: number for key, number in numbers.items() if "." not in key}
    for key in {key.partition(".")[0] for key in numbers} - set(values):
        seen = {name.partition(".")[2]: number for name, number in numbers.items() if name.startswith(f"{key}.")}
        values[key] = _View(getattr(module, key), seen)
    return values
