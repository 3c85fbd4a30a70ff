"""Scalars of a step that stay on the device: a tensor lr, and what a GradScaler sets on the optimizer.

The host never waits for them, so a step can be captured in a CUDA graph: the kernels read them when they run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..common.supported import is_dtensor
from ..training.compact import SLOT
from .state import step_device

Scaling = tuple[Tensor | None, Tensor | None]  # grad_scale and found_inf
NOTHING: Scaling = (None, None)
GIVEN = frozenset(("grad_scale", "found_inf"))  # the attributes that a GradScaler sets

# Raises while a CUDA graph is captured from groups that are not capturable; older torch has another name for it.
check_capture = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)


def takes_scaling(optimizer: Optimizer) -> bool:
    """Whether step() accepts grad_scale and found_inf as tensors, without reading them on the host.

    Compact Parameters and those with indices do if their steps are counted on their device; others where torch's step
    does: with fused=True and a dense gradient. If any Parameter does not, GradScaler unscales all gradients itself and
    reads found_inf on the host.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if is_dtensor(p):  # found_inf is of this rank's gradients; GradScaler asks the others
                return False
            if SLOT in p.__dict__ or group.get("indices"):
                step = optimizer.state.get(p, {}).get("step")
                if (step_device(p, group) if step is None else step.device) != p.device:
                    return False
            elif not group["fused"] or (p.grad is not None and p.grad.is_sparse):
                return False
    return True


def scaling(optimizer: Any) -> Scaling:
    """The grad_scale and found_inf of this step, which torch.amp.GradScaler sets as attributes for its duration."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if grad_scale is None and found_inf is None:
        return NOTHING
    if not takes_scaling(optimizer):
        raise RuntimeError(
            "grad_scale or found_inf is set, but a parameter needs its gradient unscaled before step(): it is not "
            "compact, has no indices and is not in a group with fused=True, or its state['step'] is on the host"
        )
    # GradScaler adds up found_inf over devices; step counts are reduced by it, and torch's kernel expects 0 or 1.
    return grad_scale, None if found_inf is None else found_inf.clamp(max=1)


def numbers(
    group: dict[str, Any], param: Tensor, scale: Scaling
) -> tuple[float, Tensor | None, Tensor | None, Tensor | None]:
    """lr; then lr (as a number it is NaN then), grad_scale and found_inf as tensors on the device of the Parameters.

    lr is a tensor if it is on a GPU, or on the CPU in a capturable group.
    """
    lr = group["lr"]
    if type(lr) is float and scale is NOTHING:
        return lr, None, None, None
    device = param.device
    rest = [None if x is None else x.to(device, torch.float32, non_blocking=device.type != "cpu") for x in scale]
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or (group["capturable"] and device.type == "cpu")):
        return math.nan, lr.to(device, torch.float32, non_blocking=device.type != "cpu"), rest[0], rest[1]
    return float(lr), None, rest[0], rest[1]
