"""What closed rows and columns make needless in a model: whole heads and neurons, and single rows and columns."""

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

Mask = npt.NDArray[np.bool_]  # and not of torch: a call takes a microsecond, and every module a dozen


class Planner:
    """Works out what closed rows and columns make needless; looks through the model once, when it is made.

    A model cut by `plan` computes what it would with these rows, their biases and these columns zeroed:

    - a closed row gives 0, and so does every row of a module that has no bias and no open column;
    - a neuron of an MLP is alive if its row is open in up, and in gate if there is one, and its column in down; the
      others are taken out of all of them, one staying at least;
    - a dimension of a value is alive if its row is open, and one of the columns that read it; a head of values without
      one is taken out with its keys and all its queries, one staying at least. Others are not computed or not read;
    - where queries and keys are multiplied as they are, without rotary embedding or norm, a row of one is computed only
      if the row that it meets is;
    - elsewhere, closed rows and columns are not computed and not read, and no shape changes.

    A structure is taken as one, by `structures(model)`, if all its modules are named and can be cut. Those cannot be
    cut that share a weight, have hooks or a forward of their own, or whose weights are also used outside it, as in
    nn.MultiheadAttention and nn.TransformerEncoderLayer; they are left as they are, whatever is closed in them.

    Args:
        model: not changed, not kept. Make the planner before hooks are put on it.
        names: of Linear and Conv1D modules.

    Attributes:
        names: as given, each once.
        uncut: those of them that cannot be cut.
        attentions, mlps: the structures that are taken as one.
        total: parameters of all, shared ones once.

    Raises:
        ValueError: a name of no Linear or Conv1D.
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
        """Neither name nor count from now on what cannot be cut."""
        self.names, self.uncut = list(self._cuttable), []
        self.total = sum(
            outputs * (inputs + bias) for outputs, inputs, bias in map(self._sizes.__getitem__, self.names)
        )

    def leave_out(self, names: Iterable[str]) -> None:
        """Neither cut nor count these from now on, nor take as one the structures that they are part of."""
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
        """What to take out of the model, and how many parameters that saves.

        Args:
            open_rows: by name, [M] bool on any device: False for outputs that are 0. Absent: all open.
            open_columns: likewise [N], for inputs that are not read.

        Cost: one transfer of the masks of each side, if they lie on another device, and some ten passes over them.

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
        """`plan(open_rows, open_columns).removed`, without the rest of it."""
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
        """Nothing is computed without columns, unless there is a bias; and nothing is read without rows."""
        for name in self._cuttable:
            rows, columns = alive.rows[name], alive.columns[name]
            if not self._sizes[name][2] and not columns.any():
                rows[:] = False
            if not rows.any():
                columns[:] = False

    def _masks(self, argument: str, given: Mapping[str, Tensor], side: int) -> dict[str, Mask]:
        """Masks of all modules that can be cut, to be written in."""
        for name, mask in given.items():
            if name not in self._sizes:
                raise ValueError(f"{argument}: {name!r} is none of the planner's {len(self.names)} modules")
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
    """Masks by module: rows and columns that are computed and read, and where some went, outputs and inputs left."""

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
    """What is left, and what of it is used; None for all."""
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
    """Whether its forward is all that reads it, and is that of its class."""
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
