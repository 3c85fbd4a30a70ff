"""Freeze a model and train a compact copy of its selected weights.

`sparsify` leaves every module's forward as it is: weights stay dense and are written in place. What changes is the
backward: Linear and Embedding return the gradient of the selected positions alone; any other module's dense gradient is
gathered as soon as autograd has it, and freed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim.optimizer import register_optimizer_step_post_hook

from .autograd import SLOTS, SparseEmbedding, SparseLinear, attach, is_sparsified, slots_of
from .ops import gather, scatter_
from .selection import Index, Selection

if TYPE_CHECKING:
    from .delta import Delta

VALUES, POSITIONS, ORIGINALS = "_values", "_positions", "_originals"
SLOT = "_sparse_slot"


STEP_HOOKS: list[Any] = []  # what this package has among torch's global optimizer hooks: none, or one


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of any torch optimizer the weights hold its result, whoever reads them next."""
    if getattr(optimizer, "writes_weights", False):
        return
    for group in optimizer.param_groups:
        for values in group["params"]:
            if SLOT in values.__dict__:
                # Not sync_(): torch's fused steps change parameters without a new version.
                torch.autograd.graph.increment_version(values)
                values.__dict__[SLOT].sync_()


class CompactParameter(nn.Parameter):
    """The values of a Slot. Saved as a plain Parameter; the slot of a copied model finds its copy in `sync_`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())


class Slot:
    """One selected tensor: finds its weight, values, positions and originals on the module that owns them.

    Tied weights share one slot. `written` is the version of the values that the weight holds.
    """

    def __init__(self, owner: nn.Module, name: str, index: Index) -> None:
        self.owner, self.name, self.shape, self.rows = owner, name, index.shape, index.rows
        self.written = -1

    @property
    def weight(self) -> nn.Parameter:
        weight = self.owner._parameters[self.name]
        assert weight is not None
        return weight

    @property
    def values(self) -> nn.Parameter:
        values = self.owner._parameters[self.name + VALUES]
        assert values is not None
        return values

    @property
    def index(self) -> Index:
        positions = self.owner._buffers[self.name + POSITIONS]
        assert positions is not None
        return Index.trusted(positions, self.shape, self.rows)

    @property
    def originals(self) -> Tensor:
        originals = self.owner._buffers[self.name + ORIGINALS]
        assert originals is not None
        return originals

    def sync_(self) -> None:
        """Write the values into the weight, if they changed since the last time."""
        if torch.compiler.is_compiling():
            return  # SparseAdamW writes through by itself; a version number is no part of a graph
        values = self.values
        values.__dict__.setdefault(SLOT, self)
        if values._version != self.written:
            self.write_(values)
            self.written = values._version

    def write_(self, values: Tensor) -> None:
        scatter_(self.weight.detach(), self.index, values.detach())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "written": -1}  # versions of a copy count from its own beginning


class SparseModel:
    """What `sparsify` returns: the compact Parameters of a model, and the way back.

    The model stays the object it was; use it as before. Its `parameters()` now hold the compact Parameters beside the
    frozen weights, its `state_dict()` and `save_pretrained` hold plain, current weights and nothing else. As a context
    manager it restores the model on leaving.

    Attributes:
        model: the model. selection: what is trained.
        slots: parameter name -> Slot, in the order of the selection.
    """

    def __init__(self, model: nn.Module, slots: dict[str, Slot], found: _Found) -> None:
        self.model = model
        self.slots = slots
        self._found: _Found | None = found

    @property
    def selection(self) -> Selection:
        """What is trained, by parameter name."""
        return Selection({name: slot.index for name, slot in self.slots.items()})

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the weight, its compact Parameter): [K] for elements, [R, *row] for rows; fp32 (fp64 for fp64)."""
        self._check_in_use()
        for name, slot in self.slots.items():
            yield name, slot.values

    def parameters(self) -> Iterator[nn.Parameter]:
        """The compact Parameters: what an optimizer takes."""
        for _, values in self.named_parameters():
            yield values

    def sync_(self) -> None:
        """Write changed values into the weights now.

        Needed only where values were changed by hand, and a weight is then read directly or by a compiled forward:
        steps of torch optimizers, forward, state_dict, save_pretrained and delta do it by themselves.
        """
        for slot in self.slots.values():
            slot.sync_()

    def delta(self) -> Delta:
        """The trained weights as a file to ship; see `Delta`."""
        from .delta import Delta

        self._check_in_use()
        self.sync_()
        return Delta.from_slots(self.slots)

    def restore(self) -> nn.Module:
        """Give the model back as it was found: weights bit for bit, forward, requires_grad. Returns the model."""
        if self._found is not None:
            for slot in self.slots.values():
                slot.write_(slot.originals)
            self._leave()
        return self.model

    def merge(self) -> nn.Module:
        """Keep the trained weights and give back everything else as it was found. Returns the model."""
        if self._found is not None:
            self.sync_()
            self._leave()
        return self.model

    def _check_in_use(self) -> None:
        if self._found is None:
            raise RuntimeError("the model was given back by restore() or merge(); ask for deltas and parameters before")

    def _leave(self) -> None:
        assert self._found is not None
        self._found.put_back()
        self._found = None

    def __enter__(self) -> SparseModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


class _Found:
    """How the model was found: requires_grad and grad of every parameter, classes of modules, hooks to take off."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self.classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self.hooks: list[Any] = []
        self.registered: list[tuple[nn.Module, str]] = []
        self.carriers: list[nn.Module] = []

    def put_back(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for module, cls in self.classes:
            module.__class__ = cls
        for module, name in self.registered:
            values = module._parameters.pop(name + VALUES)
            assert values is not None
            values.__dict__.pop(SLOT, None)  # an optimizer that outlives this finds nothing to write any more
            for suffix in (POSITIONS, ORIGINALS):
                del module._buffers[name + suffix]
                module._non_persistent_buffers_set.discard(name + suffix)
        for module in self.carriers:
            del module.__dict__[SLOTS]
        for parameter, flag, grad in self.parameters:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def sparsify(model: nn.Module, selection: Selection) -> SparseModel:
    """Freeze `model` and give it one compact trainable Parameter for each selected tensor.

    Args:
        model: any module; changed in place as `SparseModel` describes, undone by `restore()`.
        selection: what to train, by parameter name. Positions move to the device of their parameter.

    Returns:
        SparseModel. `SparseModel.parameters()` go to any torch optimizer: SparseAdamW writes the weights in the pass
        that steps the values, after any other they are written by a hook on its step.

    Memory, for K selected elements: values and their gradient 4 B each, positions 4 B (int64 past 2^31 elements),
    originals in the dtype of the weight.

    Raises:
        ValueError: names or shapes that do not fit the model, two names of one tied weight, weights that are not
            contiguous or not floating point, an Embedding with max_norm, the out_proj of nn.MultiheadAttention, or a
            model that is sparsified already. The model is unchanged then.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("sparsify makes Parameters to train; call it outside torch.inference_mode()")
    weights = selection.check(model)
    owners = _owners(model, weights)
    found = _Found(model)
    slots: dict[str, Slot] = {}
    try:
        for parameter, _, _ in found.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, weight in weights.items():
            slots[name] = _give_values(owners[name], selection[name].to(weight.device), found)
    except BaseException:
        found.put_back()
        raise
    if not STEP_HOOKS:
        STEP_HOOKS.append(register_optimizer_step_post_hook(_after_step))
    return SparseModel(model, slots, found)


Owners = dict[str, list[tuple[nn.Module, str]]]


def _owners(model: nn.Module, weights: dict[str, nn.Parameter]) -> Owners:
    """For each selected name every (module, attribute) that holds the parameter; raises for what cannot be trained."""
    if any(is_sparsified(module) for module in model.modules()):
        raise ValueError("the model is sparsified already; call restore() or merge() on its SparseModel first")
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, attribute))
    seen: dict[int, str] = {}
    for name, weight in weights.items():
        if id(weight) in seen:
            raise ValueError(f"{name!r} and {seen[id(weight)]!r} are one tied weight; select it under one name")
        seen[id(weight)] = name
        if not weight.is_floating_point():
            raise ValueError(f"{name!r} is {weight.dtype}; only floating-point weights can be trained")
        if not weight.is_contiguous():
            raise ValueError(f"{name!r} is not contiguous; assign a contiguous copy to it first")
        for module, attribute in holders[id(weight)]:
            taken = [
                attribute + suffix for suffix in (VALUES, POSITIONS, ORIGINALS) if hasattr(module, attribute + suffix)
            ]
            if taken:
                raise ValueError(f"{name!r}: its module has something called {taken[0]!r} already")
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                raise ValueError(f"{name!r}: an Embedding with max_norm rewrites its weight in forward")
            if type(module) in (nn.Linear, nn.Embedding) and attribute not in ("weight", "bias"):
                raise ValueError(
                    f"{name!r}: the weight is computed from it (weight_norm, pruning); that is not supported"
                )
            if isinstance(module, NonDynamicallyQuantizableLinear):
                raise ValueError(f"{name!r} is read by its nn.MultiheadAttention past its own forward; leave it out")
    return {name: holders[id(weight)] for name, weight in weights.items()}


def _give_values(holders: list[tuple[nn.Module, str]], index: Index, found: _Found) -> Slot:
    """Register values, positions and originals on the first holder, and teach every holder the sparse backward."""
    owner, name = holders[0]
    slot = Slot(owner, name, index)
    originals = gather(slot.weight.detach(), index)
    wide = torch.promote_types(originals.dtype, torch.float32)
    owner.register_parameter(name + VALUES, CompactParameter(originals.to(wide, copy=True)))
    owner.register_buffer(name + POSITIONS, index.positions, persistent=False)
    owner.register_buffer(name + ORIGINALS, originals, persistent=False)
    found.registered.append((owner, name))
    slot.values.__dict__[SLOT] = slot  # how SparseAdamW finds the weight
    slot.written = slot.values._version
    for module, attribute in holders:
        if not is_sparsified(module):
            module.__dict__[SLOTS] = {}
            found.carriers.append(module)
            found.hooks += [
                module.register_state_dict_pre_hook(_before_save),
                module.register_state_dict_post_hook(_after_save),
                module.register_load_state_dict_pre_hook(_before_load),
            ]
            if "forward" in module.__dict__:  # accelerate's hooks, say: the class's forward is not what runs
                found.hooks += attach(module)
            elif type(module) is nn.Linear:
                found.classes.append((module, nn.Linear))
                module.__class__ = SparseLinear
            elif type(module) is nn.Embedding and not module.scale_grad_by_freq:
                found.classes.append((module, nn.Embedding))
                module.__class__ = SparseEmbedding
            else:
                found.hooks += attach(module)
        slots_of(module)[attribute] = slot
    return slot


def _before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    for slot in slots_of(module).values():
        slot.sync_()


def _after_save(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for attribute in slots_of(module):
        state_dict.pop(prefix + attribute + VALUES, None)


def _before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loaded weights bring the values along, so that the two never disagree."""
    for attribute, slot in slots_of(module).items():
        weight = state_dict.get(prefix + attribute)
        found = slot.values.detach()  # should the weight not fit, torch reports it
        if weight is not None and weight.shape == slot.shape:
            found = gather(weight.detach().contiguous(), slot.index.to(weight.device)).to(slot.values)
        if slot.owner is module:
            state_dict.setdefault(prefix + attribute + VALUES, found)
        else:
            with torch.no_grad():
                slot.values.copy_(found)
