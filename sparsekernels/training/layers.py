"""Modules with a sparse backward: subclasses, and hooks for every other module.

The autograd functions run the plain dense forward and return the gradient of the compact values, not of the weight.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..index import Index
from ..ops import gather, masked_grad_embedding, masked_grad_linear
from .slot import Slot

SLOTS = "_sparse_slots"  # where a module keeps {name of its parameter: Slot}
KEPT_ASIDE = "_sparse_aside_"  # and the name of a parameter: where a module keeps it while a view stands in its place
_DIVIDED_BY_DTENSOR = (nn.Linear, nn.Embedding)  # their forward under transformers' tensor parallelism takes DTensors


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module that trains a selection, by the name of the parameter in it."""
    slots: dict[str, Slot] = module.__dict__[SLOTS]
    return slots


def trains_selection(module: nn.Module) -> bool:
    """Whether the module itself holds a selected parameter."""
    return SLOTS in module.__dict__


def refuse_train_only(model: nn.Module) -> None:
    """Raise ValueError if any module of the model is under train_only: its weights may change at the next step."""
    if any(trains_selection(module) for module in model.modules()):
        raise ValueError("the model trains a selection; call restore() or merge() on its SparseModel first")


class _Linear(torch.autograd.Function):
    """y = x W^T + b, or x W + b where the weight is transposed; the gradient of `values` is that of W at the index.

    `kept` is what backward needs of x: all of it, or the features that the gradient of the selected weights depends
    on; `index` is the selection in the weight of these features.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        kept: Tensor | None,
        positions: Tensor,
        index: Index,
        transposed: bool,
        slot: Slot,
    ) -> Tensor:
        input_needed, values_needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        kept = input if kept is None else kept
        ctx.save_for_backward(kept if values_needed else None, weight if input_needed else None, positions)
        ctx.index, ctx.transposed, ctx.slot, ctx.dtype = index, transposed, slot, values.dtype
        return F.linear(input, weight.T if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, weight, positions = ctx.saved_tensors
        grad_input = grad_bias = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ (weight.T if ctx.transposed else weight)
        if ctx.needs_input_grad[2]:
            grad_bias = _matrix(grad).sum(0)
        if ctx.needs_input_grad[3]:
            index, parallel = ctx.index.at(positions), ctx.slot.parallel
            if parallel is not None:
                outputs, inputs = (1, 0) if ctx.transposed else (0, 1)  # dimensions of the weight
                grad, kept = parallel.features(grad, outputs), parallel.features(kept, inputs)
            left, right = (kept, grad) if ctx.transposed else (grad, kept)
            grad_values = masked_grad_linear(_matrix(left), _matrix(right), index).to(ctx.dtype)
            if parallel is not None:
                grad_values = parallel.distributed(grad_values)
            _gradient_came(ctx)
        return grad_input, None, grad_bias, grad_values, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """y = W[ids]; the gradient of `values` is that of W at the index."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, values: Tensor, positions: Tensor, slot: Slot, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids, positions)
        ctx.index, ctx.slot, ctx.dtype, ctx.padding_idx = slot.index, slot, values.dtype, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, positions = ctx.saved_tensors
        index, parallel = ctx.index.at(positions), ctx.slot.parallel
        (grad,) = grads
        if parallel is None:
            grad = grad.reshape(ids.numel(), index.shape[1])
            found = masked_grad_embedding(grad, ids.reshape(-1), index, padding_idx=ctx.padding_idx).to(ctx.dtype)
        else:
            rows, foreign = parallel.rows_of(ids, ctx.padding_idx)
            grad = parallel.features(grad, 1).reshape(len(rows), index.shape[1]).masked_fill(foreign[:, None], 0)
            found = parallel.distributed(masked_grad_embedding(grad, rows, index).to(ctx.dtype))
        _gradient_came(ctx)
        return None, None, found, None, None, None


class _Attach(torch.autograd.Function):
    """The weight itself; its dense gradient is gathered into that of `values` at once, and freed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, positions: Tensor, slot: Slot) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.index, ctx.slot, ctx.dtype = slot.index, slot, values.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        dense = grads[0].to_dense() if grads[0].is_sparse else grads[0]
        parallel = ctx.slot.parallel
        if parallel is not None:
            dense = parallel.like_weight(dense)
        found = gather(dense.contiguous(), ctx.index.at(positions)).to(ctx.dtype)
        _gradient_came(ctx)
        return None, found if parallel is None else parallel.distributed(found), None, None


def _gradient_came(ctx: Any) -> None:
    """Tell the slot, unless compiled, that its values may change from now on."""
    if not torch.compiler.is_compiling():
        ctx.slot.pending = True


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is not possible without features


def _attached(slot: Slot) -> Tensor:
    values, index = slot.sync_()
    result: Tensor = _Attach.apply(slot.weight, values, index.positions, slot)
    return result


def sparse_linear(module: Any, input: Tensor, *, transposed: bool) -> Tensor:
    """The forward of a Linear, or of one whose weight is transposed, whose parameters have slots."""
    weight, bias = module.weight, module.bias
    slots = slots_of(module)
    if "bias" in slots:
        bias = _attached(slots["bias"])
    slot = slots.get("weight")
    if slot is None:
        return F.linear(input, weight.T if transposed else weight, bias)
    values, index = slot.sync_()
    kind, kept = input.device.type, None
    features, seen, parallel = None, input, slot.parallel
    narrow = slot.narrow if torch.is_grad_enabled() and values.requires_grad else None
    inputs = 0 if transposed else 1  # dimension of the weight
    # Other ranks may have no narrow, so taking this one's must not need them.
    if narrow is not None and (parallel is None or parallel.fits(input, inputs)):
        features, index = narrow.on(index.positions.device)
        seen = input if parallel is None else parallel.features(input, inputs)
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        if features is not None:
            kept = features.take(seen, input.dtype, slot)
        return _Linear.apply(input, weight, bias, values, kept, index.positions, index, transposed, slot)  # type: ignore[no-any-return]
    # As autocast does for F.linear; cast here so that backward sees the dtypes of forward.
    dtype = torch.get_autocast_dtype(kind)
    if features is not None:
        kept = features.take(seen, input.dtype if input.dtype == torch.float64 else dtype, slot)
    args = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (input, weight, bias)]
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(*args, values, kept, index.positions, index, transposed, slot)  # type: ignore[no-any-return]


class SparseLinear(nn.Linear):
    """A Linear whose weight, bias or both have slots. Made by `train_only` from an existing module."""

    def forward(self, input: Tensor) -> Tensor:
        return sparse_linear(self, input, transposed=False)


class SparseEmbedding(nn.Embedding):
    """An Embedding whose weight has a slot. Made by `train_only` from an existing module."""

    def forward(self, input: Tensor) -> Tensor:
        slot = slots_of(self)["weight"]
        values, index = slot.sync_()
        result: Tensor = _Embedding.apply(input, self.weight, values, index.positions, slot, self.padding_idx)
        return result


def attach(module: nn.Module) -> list[Any]:
    """Hooks for any other kind of module: during its forward, the selected parameters are `_Attach`ed views.

    A view is stored in the module's __dict__, where Python looks before nn.Module does; the Parameters stay where they
    are. torch runs no hook after a KeyboardInterrupt. A leftover view then reads and writes the storage of the
    Parameter until the next forward, state_dict, load_state_dict, restore or merge removes it.

    One kind of module is treated otherwise: under tensor parallelism, with a forward of its own that replaces its
    class's, and neither Linear nor Embedding. Experts that transformers divides are such: their forward replaces each
    DTensor in `_parameters` by its local part, so the view must stand there, and the Parameter is kept aside. A view
    left over by a KeyboardInterrupt is then listed by `parameters()` until it is removed as above.
    """
    return [
        module.register_forward_pre_hook(_put),
        module.register_forward_hook(detach, always_call=True),
        module.register_state_dict_pre_hook(detach),
        module.register_load_state_dict_pre_hook(detach),
    ]


def _put(module: Any, *_: Any) -> None:
    detach(module)  # torch.compile's graph then depends on whether a view was left over
    for name, slot in slots_of(module).items():
        if not torch.is_grad_enabled():
            slot.sync_()
            continue
        weight, view = slot.weight, cast(Any, _attached(slot))
        if slot.parallel is not None and "forward" in module.__dict__ and not isinstance(module, _DIVIDED_BY_DTENSOR):
            module.__dict__[KEPT_ASIDE + name] = weight
            module._parameters[name] = view
        else:
            module.__dict__[name] = view
        if not torch.compiler.is_compiling():
            # torch cannot deepcopy views, and a model may be copied after an interrupt.
            view.__dict__["__deepcopy__"] = partial(copy.deepcopy, weight)


def detach(module: Any, *_: Any) -> None:
    """Remove the views, so that the module reads its parameters again."""
    for name in slots_of(module):
        module.__dict__.pop(name, None)
        weight = module.__dict__.pop(KEPT_ASIDE + name, None)
        if weight is not None:
            module._parameters[name] = weight
