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
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..common.messages import warn
from ..common.supported import is_dtensor, local_of
from ..selection import Selection
from . import sharding
from .attach import Installation, holders_of
from .compact import SLOT, compact_copy, warn_untrained
from .delta import Delta
from .layers import trains_selection
from .left import Left
from .parallel import Parallel
from .replicas import KNOWN
from .reselect import reselect
from .slot import Slot
from .state_hooks import LEFT

STEP_HOOKS: set[int] = set()  # this package's global torch optimizer hooks: none or one


@_disable_dynamo
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of any torch optimizer, write its result into the weights, so that every reader sees it."""
    if getattr(optimizer, "writes_weights", False):
        return
    if KNOWN:
        sharding.link_parameters(optimizer)
    sharded = []
    for group in optimizer.param_groups:
        warn_untrained(optimizer.state, group["params"])
        for values in group["params"]:
            slot = values.__dict__.get(SLOT)
            if slot is None:
                continue
            if is_dtensor(values):
                sharded.append(slot)
                continue
            # Not sync_(): torch's fused steps change parameters without a new version.
            torch.autograd.graph.increment_version(values)
            slot.sync_()
    if sharded:
        sharding.write_(sharded)


class SparseModel:
    """The handle returned by `train_only`: the compact Parameters of a model, and how to undo it.

    Use the model as before. Its `parameters()` now include the compact Parameters beside the frozen weights; its
    `state_dict()` and `save_pretrained` contain plain, current weights and nothing else. As a context manager it
    restores the model on exit.

    Attributes:
        model: the model.
        selection: what is trained.
        slots: parameter name -> Slot, in the order of the selection.
        left: parameter name -> positions that `reselect(restore=False)` left at their trained values, with originals.

    Source: ours.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> tuned = sk.train_only(model, sk.Selection({"weight": sk.Index(torch.tensor([0, 5]), (3, 4))}))
        >>> [(name, values.shape) for name, values in tuned.named_parameters()], tuned.selection
        ([('weight', torch.Size([2]))], Selection(2 elements of 1 tensors))
        >>> model = tuned.restore()  # or tuned.merge(), to keep the trained weights
    """

    def __init__(self, model: nn.Module, slots: dict[str, Slot], found: Installation) -> None:
        self.model = model
        self.slots = slots
        self.left: dict[str, Left] = {}
        self._found: Installation | None = found

    @property
    def selection(self) -> Selection:
        """What is trained, by parameter name."""
        return Selection({name: slot.selected for name, slot in self.slots.items()})

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the weight, compact Parameter) pairs, of index.compact_shape; fp32 (fp64 for fp64).

        Of weights that tensor parallelism divides, flat DTensors, in which the values of each rank are padded with
        zeros to the same number.
        """
        self.check_in_use()
        self._link()
        for name, slot in self.slots.items():
            slot.check_supported()
            yield name, slot.stepped

    def parameters(self) -> Iterator[nn.Parameter]:
        """The compact Parameters, to pass to an optimizer."""
        for _, values in self.named_parameters():
            yield values

    def sync_(self) -> None:
        """Write changed values into the weights now.

        Steps of torch optimizers, forward, state_dict, save_pretrained and delta do this themselves. Call it after
        changing values through `.data` (which torch does not track) at any time other than between a backward and the
        next forward, and after changing values by hand before the weight is read directly or by a compiled forward.

        Compares every value with its weight, whether or not torch recorded a change. Under fully_shard or tensor
        parallelism this is a collective call, and writes all values.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> tuned = sk.train_only(model, sk.Selection({"bias": sk.Index.full((1,))}))
            >>> _ = next(tuned.parameters()).data.fill_(7.0)
            >>> tuned.sync_()
            >>> model.bias.data
            tensor([7.])
        """
        self.check_in_use()
        self._link()
        for slot in self.slots.values():
            if not slot.is_sharded():
                slot.refresh_()
        sharding.write_(slot for slot in self.slots.values() if slot.is_sharded())

    def _link(self) -> None:
        """Find the compact Parameters again if fully_shard replaced them."""
        assert self._found is not None
        sharding.link(self._found.replicas)

    def _refuse_managed(self, call: str) -> None:
        if any(slot.is_managed() for slot in self.slots.values()):
            raise ValueError(
                f"{call} is not possible under fully_shard, which keeps the compact Parameters; take delta() and apply "
                "it to a model that is not sharded, or save the state_dict"
            )

    def reselect(
        self, selection: Selection, optimizer: torch.optim.Optimizer | None = None, *, restore: bool = True
    ) -> None:
        """Train `selection` from now on, instead of what was trained so far.

        Positions kept keep their values; new positions start from the current weight. With `optimizer`, the one that
        steps `parameters()`, positions kept also keep their moments; new ones start without. Under SparseAdamW new
        positions start at step count 0 (the count becomes per-position where it differs), so each has its own bias
        correction; under other optimizers they use the step count of the tensor. A tensor whose Index does not change
        is not touched.

        Call it between a step and the next backward. Changed tensors get new compact Parameters without a gradient:
        call `parameters()` again, and wrap the model in DistributedDataParallel again. In the optimizer they replace
        the old ones, in the order of the selection. A new tensor joins the first group that has a tensor of this model
        (or else the first group without indices); the state of a tensor that leaves is dropped.

        To resume from a checkpoint in a new process, call train_only on the base model and repeat the calls of
        `reselect` before loading; if none of them had restore=False, one call with the last selection is enough.

        Args:
            selection: as for `train_only`.
            optimizer: changed along with the model; if None, make a new one.
            restore: reset positions that leave to their original weights, so that `delta()` stays as large as the
                selection. False: keep their trained values; `restore()` and `delta()` still cover them, at a cost of 4
                B and an original per position. Positions left by an earlier call stay left in either case.

        Raises:
            ValueError: as `train_only`; the optimizer does not hold the compact Parameters, or has state of another
                shape; a row, column or block is kept in part where per-position step counts are used. Nothing has
                changed then.
            TypeError: not an optimizer. RuntimeError: the model was given back.

        Examples:
            >>> model = torch.nn.Linear(4, 3)
            >>> tuned = sk.train_only(model, sk.Selection.random(model, density=0.5))
            >>> optimizer = sk.SparseAdamW(tuned.parameters())
            >>> tuned.reselect(sk.Selection({"weight": sk.Index(torch.tensor([2, 3]), (3, 4))}), optimizer)
            >>> tuned.selection
            Selection(2 elements of 1 tensors)
        """
        self.check_in_use()
        self._refuse_managed("reselect()")
        if any(slot.parallel is not None for slot in self.slots.values()):
            raise ValueError("reselect() is not possible with tensor parallelism; call merge(), then train_only again")
        assert self._found is not None
        self.slots, left = reselect(self._found, self.slots, self.left, selection, optimizer, restore)
        self.leave(left)

    def delta(self) -> Delta:
        """Return the trained weights as a `Delta`, the file to ship. The model is not changed.

        Under fully_shard or tensor parallelism this is a collective call: all processes make it, and each gets the
        whole Delta.

        Examples:
            >>> model = torch.nn.Linear(4, 3)
            >>> sk.train_only(model, sk.Selection.random(model, density=0.5, names="weight")).delta()
            Delta(7 values in 1 tensors, 56 bytes)
        """
        self.check_in_use()
        self.sync_()
        return Delta.from_slots(self.model, self.slots, self.left)

    def restore(self) -> nn.Module:
        """Give the model back as it was found: weights bit for bit, forward, requires_grad. Returns the model.

        Raises ValueError, as `merge` does, under fully_shard, which keeps the compact Parameters.
        """
        if self._found is not None:
            self._refuse_managed("restore()")
            for slot in self.slots.values():
                slot.check_supported()
            originals = [(slot, slot.originals) for slot in self.slots.values()]  # raises before anything is written
            for slot, values in originals:
                slot.write_(values)
            for left in self.left.values():
                left.restore_()
            self._leave()
        return self.model

    def merge(self) -> nn.Module:
        """Keep the trained weights and give back everything else as it was found. Returns the model.

        With tensor parallelism, a collective call, as `sync_` is.
        """
        if self._found is not None:
            self._refuse_managed("merge()")
            self.sync_()
            self._leave()
        return self.model

    def check_in_use(self) -> None:
        """Raise RuntimeError if the model was given back."""
        if self._found is None:
            raise RuntimeError("this SparseModel is closed: call delta() and parameters() before restore() or merge()")

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
        try:
            self.restore()
        except ValueError as refusal:
            if error is None:
                raise
            warn(f"sparsekernels: the model was not restored: {refusal}")


def train_only(model: nn.Module, selection: Selection) -> SparseModel:
    """Freeze `model` and give it one compact trainable Parameter for each selected tensor.

    Unselected weights keep their bits; the forward does not change.

    Args:
        model: any module; changed in place as `SparseModel` describes, undone by `restore()`.
        selection: what to train, by parameter name. Positions are moved to the device of their parameter.

    Returns:
        SparseModel. Pass `SparseModel.parameters()` to any torch optimizer. SparseAdamW writes the weights in the same
        pass that steps the values; after a step of any other optimizer a hook writes them.

    Memory: for K selected elements, 4 B each for values, gradient and positions (8 B for positions past 2^31 elements),
    and the originals in the dtype of the weight.

    Raises:
        ValueError: names or shapes that do not fit the model, two names of one tied weight, weights that are not
            contiguous or not floating point, quantised, or sharded by anything but parallelize_module, an Embedding
            with max_norm, the out_proj of nn.MultiheadAttention, a model that is already under train_only, or a call
            inside torch.inference_mode(). The model is unchanged then.

    Source: ours.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> tuned = sk.train_only(model, sk.Selection.random(model, density=0.25))
        >>> optimizer = sk.SparseAdamW(tuned.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> tuned.delta().save("delta.safetensors")
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("train_only makes Parameters to train; call it outside torch.inference_mode()")
    if any(trains_selection(module) for module in model.modules()):
        raise ValueError("the model already trains a selection; call restore() or merge() on its SparseModel first")
    weights = selection.check(model, tensor_parallel=True)
    holders = holders_of(model, weights)
    found = Installation(model)
    slots: dict[str, Slot] = {}
    try:
        for parameter, _, _ in found.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, weight in weights.items():
            # Positions moved to the meta device would be lost, and the weight may be materialised later.
            index = selection[name] if weight.is_meta else selection[name].to(weight.device)
            slots[name] = slot = Slot(name, holders[name], found.replicas)
            if is_dtensor(weight):
                slot.parallel = Parallel.of(weight, index, repr(name))
                index = slot.parallel.index
            values, originals = compact_copy(local_of(weight), index)
            found.give(slot, index, values if slot.parallel is None else slot.parallel.parameter(values), originals)
        found.watch()
    except BaseException:
        found.put_back()
        raise
    if not STEP_HOOKS:
        STEP_HOOKS.add(register_optimizer_step_post_hook(_after_step).id)
    return SparseModel(model, slots, found)
