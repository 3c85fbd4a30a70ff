"""Freeze a model and train a compact copy of its selected weights.

`train_only` leaves every module's forward as it is: weights stay dense and are written in place. What changes is the
backward: Linear and Embedding return the gradient of the selected positions alone; any other module's dense gradient is
gathered as soon as autograd has it, and freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..selection import Selection
from .attach import Installation, holders_of
from .delta import Delta
from .layers import trains_selection
from .reselect import reselect
from .slot import SLOT, Left, Slot, compact_copy, warn_untrained
from .state_hooks import LEFT

STEP_HOOKS: set[int] = set()  # what this package has among torch's global optimizer hooks: none, or one


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of any torch optimizer the weights hold its result, whoever reads them next."""
    if getattr(optimizer, "writes_weights", False):
        return
    for group in optimizer.param_groups:
        warn_untrained(optimizer.state, group["params"])
        for values in group["params"]:
            if SLOT in values.__dict__:
                # Not sync_(): torch's fused steps change parameters without a new version.
                torch.autograd.graph.increment_version(values)
                values.__dict__[SLOT].sync_()


class SparseModel:
    """What `train_only` returns: the compact Parameters of a model, and the way back.

    The model stays the object it was; use it as before. Its `parameters()` now hold the compact Parameters beside the
    frozen weights, its `state_dict()` and `save_pretrained` hold plain, current weights and nothing else. As a context
    manager it restores the model on leaving.

    Attributes:
        model: the model. selection: what is trained.
        slots: parameter name -> Slot, in the order of the selection.
        left: parameter name -> what `reselect(restore=False)` left as it was trained, with its originals.
    """

    def __init__(self, model: nn.Module, slots: dict[str, Slot], found: Installation) -> None:
        self.model = model
        self.slots = slots
        self.left: dict[str, Left] = {}
        self._found: Installation | None = found

    @property
    def selection(self) -> Selection:
        """What is trained, by parameter name."""
        return Selection({name: slot.index for name, slot in self.slots.items()})

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the weight, its compact Parameter): [K] for elements, [R, *row] for rows; fp32 (fp64 for fp64)."""
        self.check_in_use()
        for name, slot in self.slots.items():
            slot.check_supported()
            yield name, slot.values

    def parameters(self) -> Iterator[nn.Parameter]:
        """The compact Parameters: what an optimizer takes."""
        for _, values in self.named_parameters():
            yield values

    def sync_(self) -> None:
        """Write changed values into the weights now.

        Needed where values were changed through `.data`, which torch does not count, other than between a backward and
        the next forward; and where they were changed by hand and a weight is then read directly or by a compiled
        forward. Else steps of torch optimizers, forward, state_dict, save_pretrained and delta do it by themselves.

        Every value is compared with its weight, whether or not torch counted a change of it.
        """
        self.check_in_use()
        for slot in self.slots.values():
            slot.refresh_()

    def reselect(
        self, selection: Selection, optimizer: torch.optim.Optimizer | None = None, *, restore: bool = True
    ) -> None:
        """Train `selection` from now on, in place of what was trained so far.

        Positions kept keep their values; positions that come in start from the current weight. With `optimizer`, the
        one that steps `parameters()`, positions kept keep their moments too, and those that come in start without:
        under SparseAdamW at step count 0, one count per position where they differ, so that each has its own bias
        correction; under any other with the step count of the tensor. An untouched index changes nothing for its
        tensor.

        Call it between a step and the next backward. Changed tensors get new compact Parameters, without a gradient:
        ask `parameters()` again, and wrap again in DistributedDataParallel. In the optimizer they take the places of
        the old ones, in the order of the selection; a tensor that comes in joins the first group that holds one of this
        model (or, failing that, the first group without indices), a tensor that leaves takes its state along.

        Args:
            selection: as for `train_only`.
            optimizer: brought along; without it, make a new one.
            restore: positions that leave get back the weights of before the training, so that `delta()` stays as large
                as the selection. False: they stay as they are; `restore()` and `delta()` go on knowing them, for 4 B
                and an original a position. Positions that an earlier call left stay, whatever this one says.

        To go on from a checkpoint in a new process, call train_only on the base and repeat the calls of `reselect`
        before you load, or, if none of them had restore=False, call it with the last selection.

        Raises:
            ValueError: as `train_only`; the optimizer does not hold the compact Parameters, or keeps state that is not
                shaped like them; rows of which some elements are kept and others are not, where per-position step
                counts matter. Nothing has changed then.
            TypeError: not an optimizer. RuntimeError: the model was given back.
        """
        self.check_in_use()
        assert self._found is not None
        self.slots, left = reselect(self._found, self.slots, self.left, selection, optimizer, restore)
        self.leave(left)

    def delta(self) -> Delta:
        """The trained weights as a file to ship; see `Delta`."""
        self.check_in_use()
        self.sync_()
        return Delta.from_slots(self.model, self.slots, self.left)

    def restore(self) -> nn.Module:
        """Give the model back as it was found: weights bit for bit, forward, requires_grad. Returns the model."""
        if self._found is not None:
            originals = [(slot, slot.originals) for slot in self.slots.values()]  # raises before anything is written
            for slot, values in originals:
                slot.write_(values)
            for left in self.left.values():
                left.restore_()
            self._leave()
        return self.model

    def merge(self) -> nn.Module:
        """Keep the trained weights and give back everything else as it was found. Returns the model."""
        if self._found is not None:
            self.sync_()
            self._leave()
        return self.model

    def check_in_use(self) -> None:
        """Raise RuntimeError if the model was given back."""
        if self._found is None:
            raise RuntimeError("the model was given back by restore() or merge(); ask for deltas and parameters before")

    def _leave(self) -> None:
        assert self._found is not None
        self._found.put_back()
        self._found = None
        self.leave({})

    def leave(self, left: dict[str, Left]) -> None:
        """Set `left`, also where `load_state_dict` looks for it."""
        for module in self.model.modules():
            module.__dict__.pop(LEFT, None)
        self.left = left
        for entry in left.values():
            entry.owner.__dict__.setdefault(LEFT, {})[entry.name] = entry.index

    def __enter__(self) -> SparseModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def train_only(model: nn.Module, selection: Selection) -> SparseModel:
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
            model that is already trains a selection. The model is unchanged then.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("train_only makes Parameters to train; call it outside torch.inference_mode()")
    if any(trains_selection(module) for module in model.modules()):
        raise ValueError("the model already trains a selection; call restore() or merge() on its SparseModel first")
    weights = selection.check(model)
    holders = holders_of(model, weights)
    found = Installation(model)
    slots: dict[str, Slot] = {}
    try:
        for parameter, _, _ in found.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, weight in weights.items():
            # What the meta device takes it does not give back, and the weight may come from there later.
            index = selection[name] if weight.is_meta else selection[name].to(weight.device)
            slots[name] = Slot(name, holders[name], found.replicas)
            found.give(slots[name], index, *compact_copy(weight, index))
        found.watch()
    except BaseException:
        found.put_back()
        raise
    if not STEP_HOOKS:
        STEP_HOOKS.add(register_optimizer_step_post_hook(_after_step).id)
    return SparseModel(model, slots, found)
