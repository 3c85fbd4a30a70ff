"""The gradients by which gates are judged, collected after a backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...nn.gated import LayerGates
from .parts import Vector


def take_gradients(
    layers: Mapping[str, LayerGates], vectors: Sequence[Vector], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the values of gates since the last call, which are cleared; over all processes, on the CPU.

    Returns:
        gradients ([gates], fp32): the mean over processes. reached ([vectors], bool): whether a backward reached the
        gates of the vector, in any process. outside ([layers], bool): whether the weight or bias of a gated layer was
        used outside its module's forward, in any process.
    """
    gradients, reached = [], []
    for vector in vectors:
        probe = layers[vector.layer].probes.get(vector.side)
        gradient = None if probe is None else probe.grad
        gradients.append(torch.zeros(vector.count) if gradient is None else gradient)
        reached.append(float(gradient is not None))
        if probe is not None:
            probe.grad = None
    outside = [float(gates.used_outside and not gates.left_out) for gates in layers.values()]
    parts = [*gradients, torch.tensor(reached), torch.tensor(outside)]
    flat = torch.cat([x.to(device, torch.float32) for x in parts])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
    mean, where, which = flat.cpu().split([len(flat) - len(reached) - len(outside), len(reached), len(outside)])
    return mean, where > 0, which > 0


def check_measured(reached: Tensor) -> None:
    """Raise RuntimeError if no gate was reached by a backward."""
    if not reached.any():
        raise RuntimeError(
            "no gradient reached any gate, so their importance is unknown: call model.train() before the forward "
            "(from_pretrained returns a model in eval mode), and backward() before step()"
        )
