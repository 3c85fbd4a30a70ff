"""Which parameters the package supports: those in plain memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

SHARDED = "_is_fsdp_managed_module"  # what FSDP, both generations, sets on every module that it manages
PARTITIONED = "ds_id"  # what DeepSpeed ZeRO-3 sets on every parameter


def refuse_unsupported(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a parameter that is sharded, quantised or not yet initialised."""
    kind = type(tensor).__name__
    if is_dtensor(tensor) or kind == "FlatParameter" or PARTITIONED in tensor.__dict__:
        refuse_sharded(name)
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueError(
            f"{name} is {kind}: quantised and other wrapped weights are not supported, because writes into them would "
            "be lost; load the model without quantisation"
        )
    if is_lazy(tensor):
        raise ValueError(f"{name} has no values yet; run one forward first")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose import is slow."""
    return type(tensor).__name__ == "DTensor"


def is_flattened(tensor: Tensor) -> bool:
    """Whether a Parameter is a view of the flat one that FSDP1 keeps instead."""
    return "_fsdp_flattened" in tensor.__dict__


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether fully_shard (FSDP2) manages the model; FSDP1 has no DTensors."""
    managed = any(SHARDED in module.__dict__ for module in model.modules())
    return managed and any(is_dtensor(p) for p in model.parameters())


def local_of(tensor: Any) -> Tensor:
    """What this process holds of a tensor, without its graph."""
    local: Any = tensor.detach()  # torch.no_grad() would stay on if Ctrl-C came while it ends
    return local.to_local() if is_dtensor(local) else local  # type: ignore[no-any-return]


def holds_nan(tensor: Tensor) -> bool:
    """Whether any entry is NaN; of a DTensor, on any rank: a collective call."""
    found: Any = tensor.isnan().any()
    return bool(found.full_tensor() if is_dtensor(found) else found)


def refuse_sharded(name: str, how: str = "") -> NoReturn:
    """Raise ValueError for a parameter that is sharded, or that is so in a way that is not supported."""
    raise ValueError(
        f"{name} is sharded{how and ' ' + how}, which is not supported here. To train it, call parallelize_module "
        "before train_only, and fully_shard (FSDP2), with its default placement, after it; or use "
        "DistributedDataParallel. FSDP1 and DeepSpeed ZeRO-3 are not supported"
    )


def refuse_unsupported_of(
    model: nn.Module, names: Iterable[str] | None = None, *, tensor_parallel: bool = False
) -> None:
    """Raise ValueError if one of these parameters, by default any, is sharded, quantised or not yet initialised.

    tensor_parallel: whether they may be DTensors outside of fully_shard.
    """
    chosen = None if names is None else set(names)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            if parameter is None or not (chosen is None or name in chosen):
                continue
            if SHARDED in module.__dict__:
                refuse_sharded(repr(name))
            if not (tensor_parallel and is_dtensor(parameter)):
                refuse_unsupported(repr(name), parameter)


def as_integers(x: Tensor) -> Tensor:
    """The bits, so that comparisons distinguish -0 from 0, and NaN equals itself."""
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
