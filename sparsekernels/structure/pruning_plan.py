"""What closed rows and columns make redundant in a model: whole heads and neurons, and single rows and columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .architectures import Attention, Mlp, OutputSlice, structures
from .layers import kind_of
from .prune import Cut, Cuts, PreparedCut, cut, prepare_cut

__all__ = ["Cut", "Cuts", "Planner", "PreparedCut", "cut", "prepare_cut"]

Mask = npt.NDArray[np.bool_]  # not torch: a torch call takes a microsecond, and every module needs a dozen


class Planner:
    """Determines what closed rows and columns make redundant; inspects the model once, in the constructor.

    A model cut by `plan` computes the same as the original with these rows, their biases and these columns zeroed:

    - a closed row gives 0, and so does every row of a module without bias and without an open column;
    - a neuron of an MLP is alive if its row is open in up, and in gate if there is one, and its column in down; the
      others are removed from all of them, except that at least one stays;
    - a dimension of a value is alive if its row is open, and one of the columns that read it; a head whose values are
      all dead is removed with its keys and all its queries, except that at least one head stays. In other heads, dead
      dimensions are not computed or not read;
    - where queries and keys are multiplied directly, without rotary embedding or norm, a row of one is computed only if
      the matching row of the other is;
    - elsewhere, closed rows and columns are not computed and not read, and no shape changes.

    The structures of `structures(model)` are cut as a whole if all their modules are named and can be cut. A module
    cannot be cut if it shares a weight, has hooks or its own forward, or if its weights are also used outside its
    forward, as in nn.MultiheadAttention and nn.TransformerEncoderLayer; it is left unchanged, whatever is closed in it.

    Args:
        model: not changed, no reference is kept. Make the planner before hooks are registered.
        names: of Linear and Conv1D modules.

    Attributes:
        names: as given, each once.
        uncut: those of them that cannot be cut.
        attentions, mlps: the structures that are cut as a whole.
        total: parameters of all, shared ones once.

    Raises:
        ValueError: a name that is not a Linear or Conv1D.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))
        owners = Counter(id(p) for m in _all_modules(model).values() for p in m._parameters.values() if p is not None)
        self._sizes: dict[str, tuple[int, int, bool]] = {}
        self._cuttable: list[str] = []
        parameters: dict[int, int] = {}
        for name in self.names:
            module = _linear(model, name)
            linear = isinstance(module, nn.Linear)
            sizes = (module.out_features, module.in_features) if linear else (module.nf, module.nx)
            self._sizes[name] = *sizes, module.bias is not None
            parameters.update((id(p), p.numel()) for p in module.parameters())
            if _can_be_cut(model, name, module) and all(owners[id(p)] == 1 for p in module.parameters()):
                self._cuttable.append(name)
        self.total = sum(parameters.values())
        self.uncut = [name for name in self.names if name not in set(self._cuttable)]
        attentions, mlps = structures(model)
        self.attentions = [a for a in attentions if self._has(a.query, a.key, a.value, OutputSlice(a.output))]
        self.mlps = [mlp for mlp in mlps if self._has(*mlp.inputs, OutputSlice(mlp.output))]

    def only_cuttable(self) -> None:
        """From now on, drop and do not count modules that cannot be cut."""
        self.names, self.uncut = list(self._cuttable), []
        self.total = sum(
            outputs * (inputs + bias) for outputs, inputs, bias in map(self._sizes.__getitem__, self.names)
        )

    def leave_out(self, names: Iterable[str]) -> None:
        """From now on, neither cut nor count these, nor cut as a whole the structures they belong to."""
        gone = set(names) & set(self._cuttable)
        for outputs, inputs, bias in (self._sizes[name] for name in gone):
            self.total -= outputs * (inputs + bias)
        self._cuttable = [name for name in self._cuttable if name not in gone]
        self.uncut = [name for name in self.names if name not in set(self._cuttable)]
        self.attentions = [a for a in self.attentions if self._has(a.query, a.key, a.value, OutputSlice(a.output))]
        self.mlps = [mlp for mlp in self.mlps if self._has(*mlp.inputs, OutputSlice(mlp.output))]

    def _has(self, *parts: OutputSlice) -> bool:
        return {part.module for part in parts} <= set(self._cuttable)

    def plan(self, open_rows: Mapping[str, Tensor], open_columns: Mapping[str, Tensor]) -> Cuts:
        """What to remove from the model, and how many parameters that saves.

        Args:
            open_rows: by name, [M] bool on any device: False for outputs that are 0. Absent: all open.
            open_columns: likewise [N], for inputs that are not read.

        Cost: one transfer of the masks of each side, if they are on another device, and about ten passes over them.

        Raises:
            ValueError: a name that the planner does not have, or a mask that does not fit.
        """
        alive = self._alive(open_rows, open_columns)
        modules = {}
        for name in self._cuttable:
            outputs, inputs, _ = self._sizes[name]
            modules[name] = Cut(
                *_positions(alive.inputs.get(name), alive.columns[name]),
                *_positions(alive.outputs.get(name), alive.rows[name]),
                (outputs, inputs),
            )
        return Cuts(modules, alive.attributes, self.total, self._removed(alive))

    def count(self, open_rows: Mapping[str, Tensor], open_columns: Mapping[str, Tensor]) -> int:
        """`plan(open_rows, open_columns).removed`, without the rest of the plan."""
        return self._removed(self._alive(open_rows, open_columns))

    def _removed(self, alive: _Alive) -> int:
        removed = 0
        for name in self._cuttable:
            outputs, inputs, bias = self._sizes[name]
            rows = int(np.count_nonzero(alive.rows[name]))
            stored = rows * (int(np.count_nonzero(alive.columns[name])) + bias)
            removed += outputs * (inputs + bias) - stored
        return removed

    def _alive(self, open_rows: Mapping[str, Tensor], open_columns: Mapping[str, Tensor]) -> _Alive:
        alive = _Alive(self._masks("open_rows", open_rows, 0), self._masks("open_columns", open_columns, 1))
        self._drop_empty(alive)
        for attention in self.attentions:
            alive.attend(attention)
        for mlp in self.mlps:
            alive.think(mlp)
        self._drop_empty(alive)
        return alive

    def _drop_empty(self, alive: _Alive) -> None:
        """Without columns nothing is computed, unless there is a bias; without rows nothing is read."""
        for name in self._cuttable:
            rows, columns = alive.rows[name], alive.columns[name]
            if not self._sizes[name][2] and not columns.any():
                rows[:] = False
            if not rows.any():
                columns[:] = False

    def _masks(self, argument: str, given: Mapping[str, Tensor], side: int) -> dict[str, Mask]:
        """Writable masks of all modules that can be cut."""
        for name, mask in given.items():
            if name not in self._sizes:
                raise ValueError(f"{argument}: {name!r} is not one of the planner's {len(self.names)} modules")
            size = self._sizes[name][side]
            if mask.dtype != torch.bool or mask.shape != (size,):
                raise ValueError(
                    f"{argument}[{name!r}] must be bool of shape [{size}], got {mask.dtype} of {list(mask.shape)}"
                )
        if any(mask.device.type != "cpu" for mask in given.values()):
            device = next(iter(given.values())).device
            whole = torch.cat([mask.to(device) for mask in given.values()]).cpu()
            given = dict(zip(given, whole.split([len(mask) for mask in given.values()]), strict=True))
        return {
            name: given[name].numpy().copy() if name in given else np.ones(self._sizes[name][side], np.bool_)
            for name in self._cuttable
        }


class _Alive:
    """Masks by module: rows computed and columns read, and for narrowed modules the remaining outputs and inputs."""

    def __init__(self, rows: dict[str, Mask], columns: dict[str, Mask]) -> None:
        self.rows, self.columns = rows, columns
        self.outputs: dict[str, Mask] = {}
        self.inputs: dict[str, Mask] = {}
        self.attributes: dict[str, dict[str, int]] = {}

    def attend(self, a: Attention) -> None:
        width = a.kv_rows
        query = self._read(a.query).reshape(a.groups, -1, width)
        key = self._read(a.key).reshape(a.groups, width)
        value = self._read(a.value).reshape(a.groups, width)
        columns = self.columns[a.output].reshape(a.groups, -1, width)
        value = value & columns.any(1)
        columns &= value[:, None]
        heads: Mask = np.asarray(value.any(1))
        if not a.rotary:
            key, query = key & query.any(1), query & key[:, None]
        self._write(a.query, query & heads[:, None, None])
        self._write(a.key, key & heads[:, None])
        self._write(a.value, value)
        if not heads.all():
            _keep_one(heads)
            for part, each in ((a.query, a.query_rows), (a.key, width), (a.value, width)):
                self._narrow(part, heads.repeat(each))
            self.inputs[a.output] = heads.repeat(a.query_rows)
            self._follow(a.name, a.attributes, heads)

    def think(self, mlp: Mlp) -> None:
        neurons: Mask = self.columns[mlp.output]
        for part in mlp.inputs:
            neurons &= self._read(part)
        for part in mlp.inputs:
            self._write(part, neurons)
        if not neurons.all():
            left = _keep_one(neurons.copy())
            for part in mlp.inputs:
                self._narrow(part, left)
            self.inputs[mlp.output] = left
            self._follow(mlp.name, mlp.attributes, left)

    def _read(self, part: OutputSlice) -> Any:
        return self.rows[part.module][_index(part)]

    def _write(self, part: OutputSlice, mask: Mask) -> None:
        self.rows[part.module][_index(part)] = mask.reshape(-1)

    def _narrow(self, part: OutputSlice, left: Mask) -> None:
        if part.module not in self.outputs:
            self.outputs[part.module] = np.ones_like(self.rows[part.module])
        self.outputs[part.module][_index(part)] = left

    def _follow(self, name: str, units: Mapping[str, int], left: Mask) -> None:
        if units:
            kept = int(np.count_nonzero(left))
            self.attributes.setdefault(name, {}).update((key, unit * kept) for key, unit in units.items())


def _keep_one(mask: Mask) -> Mask:
    """In place, and returned."""
    mask[0] |= not mask.any()
    return mask


def _index(part: OutputSlice) -> Any:
    return slice(None) if part.rows is None else part.rows if isinstance(part.rows, slice) else part.rows.numpy()


def _positions(left: Mask | None, used: Mask) -> tuple[Tensor | None, Tensor | None]:
    """Positions that remain, and those of them that are used; None for all."""
    all_used = used.all() if left is None else np.array_equal(left, used)
    return (
        None if left is None else torch.from_numpy(np.flatnonzero(left)),
        None if all_used else torch.from_numpy(np.flatnonzero(used)),
    )


def _all_modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _linear(model: nn.Module, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError as e:
        raise ValueError(f"names: the model has no module {name!r}") from e
    if not isinstance(module, nn.Linear) and kind_of(module) != "conv1d":
        raise ValueError(f"names: {name!r} is a {type(module).__name__}; expected a Linear or Conv1D")
    return module


def _can_be_cut(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether only its own forward reads it, and that is its class's."""
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # of their children's weights
    parents = ["", *(name[:i] for i, letter in enumerate(name) if letter == ".")] if name else []
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    weight = module._parameters.get("weight")
    return (
        bool(name)
        and kind_of(module) in ("linear", "conv1d")
        and "forward" not in vars(module)
        and not any(hooks)
        and set(module._parameters) == {"weight", "bias"}
        and not module._modules
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
        and not any(isinstance(model.get_submodule(parent), readers) for parent in parents)
    )
