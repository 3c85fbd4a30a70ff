"""How train_only takes over a model and gives it back: parameters, classes of modules, hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..index import Index
from .compact import SLOT, VALUES
from .layers import SLOTS, SparseEmbedding, SparseLinear, attach, detach, slots_of, trains_selection
from .replicas import REPLICAS, Replicas, before_forward
from .slot import Holders, Slot
from .state_hooks import KEPT, LOADING, after_save, before_load, before_loading, before_save, keep


class Installation:
    """The state the model was found in: requires_grad and grad of every parameter, module classes, hooks to remove."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self.modules: dict[nn.Module, tuple[type[nn.Module], list[Any]]] = {}
        self.slots: list[Slot] = []
        self.model, self.replicas, self.watched = model, Replicas(self.slots, model), False
        # Before the hooks of slots, so that nothing has changed yet when these refuse.
        self.hooks: list[Any] = [part.register_load_state_dict_pre_hook(before_loading) for part in model.modules()]
        model.__dict__[REPLICAS] = self.replicas
        keep(model)

    def watch(self) -> None:
        """Compare replicas before a forward. A slot of the model itself does that already, so no hook is added then."""
        if not self.watched and not trains_selection(self.model):  # a hook costs time
            self.hooks.append(self.model.register_forward_pre_hook(before_forward))
            self.watched = True

    def give(self, slot: Slot, index: Index, values: nn.Parameter, originals: Tensor) -> None:
        """Register a new slot on its owner, and give every module that holds the weight the sparse backward."""
        self.slots.append(slot)
        slot.register(index, values, originals)
        for module, attribute in slot.holders:
            if module not in self.modules:
                self._teach(module)
            slots_of(module)[attribute] = slot

    def _teach(self, module: nn.Module) -> None:
        module.__dict__[SLOTS] = {}
        hooks: list[Any] = [
            module.register_state_dict_pre_hook(before_save),
            module.register_state_dict_post_hook(after_save),
            module.register_load_state_dict_pre_hook(before_load),
        ]
        self.modules[module] = type(module), hooks
        if "forward" in module.__dict__:  # set by accelerate's hooks, for example: the class's forward does not run
            hooks += attach(module)
        elif type(module) is nn.Linear:
            module.__class__ = SparseLinear
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            from .conv1d import SparseConv1D

            module.__class__ = SparseConv1D
        elif type(module) is nn.Embedding and not module.scale_grad_by_freq:
            module.__class__ = SparseEmbedding
        else:
            hooks += attach(module)

    def take(self, slot: Slot) -> None:
        """Undo `give`."""
        self.slots.remove(slot)
        slot.unregister()
        for module, attribute in slot.holders:
            if module not in self.modules:
                continue
            detach(module)
            slots_of(module).pop(attribute, None)
            if not slots_of(module):
                module.__class__, hooks = self.modules.pop(module)
                for hook in hooks:
                    hook.remove()
                del module.__dict__[SLOTS]

    def put_back(self) -> None:
        for slot in list(self.slots):
            self.take(slot)
        for hook in self.hooks:
            hook.remove()
        self.model.__dict__.pop(REPLICAS, None)
        for part in self.model.modules():
            part.__dict__.pop(KEPT, None)
            part.__dict__.pop(LOADING, None)
        for parameter, flag, grad in self.parameters:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def holders_of(model: nn.Module, weights: dict[str, nn.Parameter], slots: Iterable[Slot] = ()) -> dict[str, Holders]:
    """For each selected name, every (module, attribute) that holds the parameter; raises if one cannot be trained.

    `slots` are the model's current ones.
    """
    own = {(id(slot.owner), slot.name) for slot in slots}
    holders: dict[int, Holders] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, attribute))
    seen: dict[int, str] = {}
    for name, weight in weights.items():
        if id(weight) in seen:
            raise ValueError(f"{name!r} and {seen[id(weight)]!r} are one tied weight; select it under one name")
        seen[id(weight)] = name
        if SLOT in weight.__dict__:
            raise ValueError(f"{name!r} is a compact Parameter; select the weight that it stands for")
        if not weight.is_floating_point():
            raise ValueError(f"{name!r} is {weight.dtype}; only floating-point weights can be trained")
        if not weight.is_contiguous():
            raise ValueError(f"{name!r} is not contiguous; assign a contiguous copy to it first")
        for module, attribute in holders[id(weight)]:
            if hasattr(module, attribute + VALUES) and (id(module), attribute) not in own:
                raise ValueError(f"{name!r}: its module already has an attribute {attribute + VALUES!r}")
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                raise ValueError(f"{name!r}: an Embedding with max_norm rewrites its weight in forward")
            plain = type(module) in (nn.Linear, nn.Embedding, SparseLinear, SparseEmbedding)
            if (plain or type(module).__name__ in ("Conv1D", "SparseConv1D")) and attribute not in ("weight", "bias"):
                raise ValueError(
                    f"{name!r}: the weight is computed from it (weight_norm, pruning); that is not supported"
                )
            if isinstance(module, NonDynamicallyQuantizableLinear):
                raise ValueError(f"{name!r} is read by its nn.MultiheadAttention, not by its own forward; leave it out")
    return {name: holders[id(weight)] for name, weight in weights.items()}
