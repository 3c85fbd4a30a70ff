"""state_dict and load_state_dict of SparseAdamW: in torch's layout, and tied to the positions they were saved for.

Besides what torch saves, a Parameter with positions has, once it was stepped,

    positions   [K] or [R]  the positions its state belongs to; a state_dict without them (of torch.optim.AdamW over
                            the same compact Parameters) is assumed to fit
    master      as values   the compact values, if the weight's dtype is narrower and the model's state_dict rounds them
    layout      [3 or 4]    under tensor parallelism, what the order of the values depends on (`Parallel.layout`)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.supported import is_dtensor
from ..index import Index
from ..training import sharding
from ..training.compact import SLOT
from .group import name_of
from .state import MOMENTS, placed_step, state_dtype

POSITIONS, MASTER, LAYOUT = "positions", "master", "layout"
OF_ROWS = ("rows", "row_step", "row_decay", "decay_sum")  # of steps with sparse gradients: kept in their own dtypes
# AdamW.__setstate__ fills in those that torch's state_dict lacks.
FILLED_BY_TORCH = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay", "fused")


class _Bare(torch.optim.Optimizer):
    """Groups and state for torch to pack and unpack, without hooks: ours run before and after all of it."""

    def __init__(self, param_groups: list[dict[str, Any]], state: Any) -> None:
        self.param_groups, self.state = param_groups, state
        for hooks in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{hooks}_hooks", OrderedDict())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def packed(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state_dict: tensors, numbers, strings, lists and dicts."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    sharding.link_parameters(optimizer)
    state: dict[Any, Any] = dict(optimizer.state)
    for group, i, p in _parameters(optimizer):
        index = _index(group, i, p)
        if "rows" in state.get(p, ()):
            state[p] = {name: _without_room(value) for name, value in state[p].items()}
        if index is None or not state.get(p):
            continue
        state[p] = {**state[p], POSITIONS: index.positions}
        if _layout(p) is not None:
            state[p][LAYOUT] = _layout(p)
        if SLOT in p.__dict__ and p.__dict__[SLOT].weight.dtype != p.dtype:
            state[p][MASTER] = p.detach()
    state_dict = _Bare([_without_indices(group) for group in optimizer.param_groups], state).state_dict()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        changed = after(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


@torch.no_grad()
def load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state_dict of SparseAdamW, or of torch's AdamW or SparseAdam; nothing changes if it does not fit."""
    state_dict = state_dict.copy()
    sharding.link_parameters(optimizer)
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    saved_groups = [_without_indices(group) for group in state_dict["param_groups"]]
    bare = _Bare(optimizer.param_groups, {})
    bare.load_state_dict({**state_dict, "param_groups": saved_groups})
    keys = [key for group in saved_groups for key in group["params"]]
    loaded = list(bare.param_groups)
    for group, new in zip(optimizer.param_groups, loaded, strict=True):
        if "indices" in group:
            new["indices"] = group["indices"]
        for option in optimizer.defaults:
            if option not in FILLED_BY_TORCH and option in group:
                new.setdefault(option, group[option])
    masters: dict[Tensor, Tensor] = {}
    new_groups = [new for new in loaded for _ in new["params"]]
    for (group, i, p), key, new in zip(_parameters(optimizer), keys, new_groups, strict=True):
        entry = state_dict["state"].get(key)
        if not entry:
            continue
        index, state, name = _index(group, i, p), bare.state[p], name_of(group, p)
        _check(entry, p, index, name)
        _widen(state, entry, p, index, new)
        if index is not None and MASTER in entry and SLOT in p.__dict__:
            masters[p] = entry[MASTER]
    optimizer.__setstate__({"state": bare.state, "param_groups": loaded})
    for p, master in masters.items():
        p.copy_(master)
        if not is_dtensor(p):
            p.__dict__[SLOT].sync_()
    sharding.write_([p.__dict__[SLOT] for p in masters if is_dtensor(p)])
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _check(entry: dict[str, Any], p: Tensor, index: Index | None, name: str) -> None:
    """Raise ValueError for saved state that does not belong to this parameter at these positions."""
    if "step" not in entry:
        raise ValueError(f"{name}: its saved state has no 'step'; this is not a state_dict of AdamW")
    if index is None and POSITIONS in entry:
        raise ValueError(
            f"{name}: the state_dict was made for selected positions, and this Parameter has none; make the optimizer "
            "of SparseModel.parameters(), under fully_shard after it, or of Selection.param_groups()"
        )
    for what in (*MOMENTS, MASTER):
        if what in entry and is_dtensor(entry[what]) != is_dtensor(p):
            held = "DTensors" if is_dtensor(p) else "plain tensors"
            raise ValueError(
                f"{name}: {what} in the state_dict must be {held}, as the Parameter is; load it by "
                "set_optimizer_state_dict of torch.distributed.checkpoint.state_dict"
            )
    same_positions = True
    if index is not None and POSITIONS in entry:
        saved = entry[POSITIONS].to(index.positions.device)  # torch's AdamW casts it to the dtype of p
        same_positions = saved.shape == index.positions.shape and torch.equal(saved, index.positions.to(saved.dtype))
        layouts = [None if x is None else x.tolist() for x in (entry.get(LAYOUT), _layout(p))]
        if same_positions and layouts[0] != layouts[1]:
            raise ValueError(
                f"{name}: the state_dict was made with another number of tensor-parallel ranks, or another plan: its "
                "values have another order; load it as it was saved, or start with a new optimizer"
            )
    shape = index.compact_shape if index is not None and not is_dtensor(p) else p.shape
    step_counts = torch.as_tensor(entry["step"]).shape
    if index is None and "rows" in entry:
        rows = entry["rows"]
        if rows.dtype.is_floating_point:
            raise ValueError(f"{name}: another optimizer changed this state; its rows are {rows.dtype} now")
        sparse_dim = max(0, p.dim() + 1 - entry["exp_avg"].dim()) if "exp_avg" in entry else 1
        if len(rows) and int(rows.max()) >= math.prod(p.shape[:sparse_dim]):
            raise ValueError(f"{name}: the state_dict was made for a table of more rows than {list(p.shape)}")
        shape = torch.Size((len(rows), *p.shape[sparse_dim:]))
    for what in (*MOMENTS, MASTER):
        if what in entry and entry[what].shape != shape:
            raise ValueError(
                f"{name}: the state_dict was made for another selection: {what} has shape {list(entry[what].shape)}, "
                f"this optimizer needs {list(shape)}"
            )
    if len(step_counts) and (index is None or step_counts != (len(index),)):
        raise ValueError(f"{name}: the state_dict was made for another selection: step has shape {list(step_counts)}")
    if not same_positions:
        like = "of the same size but " if entry[POSITIONS].shape == index.positions.shape else ""  # type: ignore[union-attr]
        raise ValueError(
            f"{name}: the state_dict was made for another selection, {like}with other positions; "
            "train the saved one (save the Selection with each checkpoint), and call reselect after loading"
        )


def _widen(state: dict[str, Any], entry: dict[str, Any], p: Tensor, index: Index | None, group: dict[str, Any]) -> None:
    """torch casts all state to the dtype of the parameter; restore ours where it is wider, in new memory."""
    state.pop(POSITIONS, None)
    state.pop(MASTER, None)
    state.pop(LAYOUT, None)
    if index is None and not _of_sparse_gradients(entry, p, group):
        return
    for name in (*MOMENTS, *OF_ROWS):
        if name in entry:
            dtype = state_dtype(p, group) if name in MOMENTS else entry[name].dtype
            state[name] = entry[name].to(p.device, dtype, copy=True)
    if index is not None:
        state["step"] = placed_step(torch.as_tensor(entry["step"], dtype=torch.float32), p, group)
    elif group.get("sparse_state") == "seen" and "rows" not in entry and p.dim():  # from SparseAdam: all rows, in order
        state["rows"] = torch.arange(len(p), device=p.device)


def _of_sparse_gradients(entry: dict[str, Any], p: Tensor, group: dict[str, Any]) -> bool:
    """Steps with dense gradients need moments in the dtype of the parameter, to which torch has cast them by now."""
    if any(name in entry for name in OF_ROWS):
        return True
    if "exp_avg" not in entry:
        return False
    if group.get("sparse_state") == "all" and entry["exp_avg"].dtype != p.dtype:
        return True
    return "amsgrad" not in group and not isinstance(entry["step"], Tensor)  # only SparseAdam's state is like this


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], int, Tensor]]:
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            yield group, i, p


def _index(group: dict[str, Any], i: int, p: Tensor) -> Index | None:
    if group.get("indices"):
        return group["indices"][i]
    return p.__dict__[SLOT].selected if SLOT in p.__dict__ else None


def _layout(p: Tensor) -> Tensor | None:
    """What the order of a Parameter's values depends on besides its positions; None if on nothing."""
    slot = p.__dict__.get(SLOT)
    return None if slot is None or slot.parallel is None else slot.parallel.layout


def _without_room(value: Any) -> Any:
    """A file would contain the whole storage of a tensor, including the spare room for later rows."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.itemsize:
        return value.clone()
    return value


def _without_indices(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "indices"}
