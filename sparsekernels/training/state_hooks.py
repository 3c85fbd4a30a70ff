"""state_dict and load_state_dict under train_only: plain keys, current weights, no unselected weight changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.supported import as_integers, is_dtensor, local_of
from ..index import Index
from . import sharding
from .compact import VALUES
from .layers import SLOTS, detach, slots_of

LEFT = "_sparse_left"  # where a module keeps {name of its parameter: Index of what reselect(restore=False) left}
KEPT = "_sparse_kept"  # where it keeps the names of those that it had, with values, when train_only was called
LOADING = "_sparse_loading"  # where it keeps the errors of the load_state_dict that has checked it


def before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Write the values into the weights before these are saved."""
    for slot in slots_of(module).values():
        slot.sync_()


def after_save(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Remove the values from the state_dict: they have no key of their own."""
    for attribute in slots_of(module):
        state_dict.pop(prefix + attribute + VALUES, None)


def before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load the values along with their weights, so that the two never differ."""
    for attribute, slot in slots_of(module).items():
        slot.seen = None  # torch writes the values next, those of now where the state has no weight
        weight = state_dict.get(prefix + attribute)
        found = slot.values.detach()  # if the weight does not fit, torch reports it
        if weight is not None and weight.shape == slot.selected.shape and is_dtensor(weight) == is_dtensor(slot.weight):
            found = sharding.loaded(slot, weight) if is_dtensor(weight) else slot.loaded(weight)
        if slot.owner is module:
            # Also where there are some: set_model_state_dict puts those of now into a dict that has none.
            state_dict[prefix + attribute + VALUES] = found
        else:
            with torch.no_grad():
                slot.values.copy_(found)


def keep(model: nn.Module) -> None:
    """Record which parameters the model has now; ones added later, such as an adapter's, may change."""
    for part in model.modules():
        part.__dict__[KEPT] = [name for name, p in part._parameters.items() if p is not None and not p.is_meta]


def before_loading(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
    _: bool,
    __: Any,
    ___: Any,
    errors: list[str],
) -> None:
    """Raise ValueError, before anything is loaded, if frozen weights outside the selection would change.

    delta() would miss them, and restore() would not give back the model as it was found. The first module that a load
    reaches checks all modules inside it; each load has its own list of errors, by which it is recognised.
    """
    if module.__dict__.pop(LOADING, None) is errors:
        return
    slots: list[Any] = []
    for part in module.modules():
        if SLOTS in part.__dict__:
            detach(part)  # a view that an interrupt left over is no weight to compare with
            slots += slots_of(part).values()
    sharding.reshard(module, [slot for slot in slots if slot.is_managed()])
    known = _known(module)
    counts: dict[str, int] = {}
    shards: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        if part is not module:
            part.__dict__[LOADING] = errors
        for attribute in part.__dict__.get(KEPT, ()):
            parameter = part._parameters.get(attribute)
            name = f"{path}.{attribute}" if path else attribute
            loaded = state_dict.get(prefix + name)
            if parameter is None or parameter.requires_grad or not isinstance(loaded, Tensor):
                continue
            if metadata.get("assign_to_params_buffers") and loaded.dtype != parameter.dtype:
                raise ValueError(
                    f"load_state_dict(assign=True) would make {name!r} {loaded.dtype}, and it is {parameter.dtype}; "
                    "load without assign; or restore() the model, load, and call train_only again"
                )
            if loaded.shape != parameter.shape or loaded.is_meta or parameter.is_meta:
                continue  # torch reports the first; there is nothing to compare in the others
            if is_dtensor(parameter) != is_dtensor(loaded):
                continue  # torch reports it
            if is_dtensor(parameter):
                shards[name] = parameter
            counts[name] = _changed(local_of(parameter), local_of(loaded), known.get(id(parameter), []))
    counts |= sharding.summed(shards, counts)
    for name, count in counts.items():
        if count:
            raise ValueError(
                f"the state_dict changes {count:,} weights of {name!r} that are not selected, so delta() would "
                "miss them and restore() would not be the base: it was trained with another selection or from "
                "another base, or is an average of state_dicts, or the model itself changes them. Call "
                "train_only with the selection it was trained with (save the Selection with each checkpoint); "
                "or restore() the model, load, and call train_only again"
            )


def _known(module: nn.Module) -> dict[int, list[Index]]:
    """id of a weight -> positions whose originals are kept, of what this process holds; none of meta weights."""
    known: dict[int, list[Index]] = {}
    for part in module.modules():
        for slot in part.__dict__.get(SLOTS, {}).values():
            if not slot.weight.is_meta:
                known[id(slot.weight)] = [sharding.held(slot)]
    for part in module.modules():
        for attribute, index in part.__dict__.get(LEFT, {}).items():
            weight: Any = part._parameters[attribute]
            if not weight.is_meta:
                known.setdefault(id(weight), []).append(sharding.held_of(weight, index))
    return known


def _changed(weight: Tensor, loaded: Tensor, known: list[Index]) -> int:
    """The number of weights that would get other bits, except those at known positions."""
    if any(index.numel == weight.numel() for index in known):
        return 0
    loaded = loaded.to(weight.device, weight.dtype)
    if not known and torch.equal(as_integers(weight), as_integers(loaded)):
        return 0
    different = as_integers(weight) != as_integers(loaded)
    for index in known:
        different &= ~index.to(weight.device).mask()
    return int(different.sum())
