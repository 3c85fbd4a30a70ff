"""Temporary state of a model while it is differentiated: eval mode, and frozen except for some parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Only these parameters require gradients, and start without one; everything is restored on exit."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; on exit, every module's own mode is restored.

    Layers of transformers use checkpointing in train mode only, so checkpointed ones stay in train mode and switch to
    eval mode inside the checkpointed function. Key/value caching is off, as in training: a recomputed layer would cache
    twice.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    layers = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", ())
    told = [m for m in model.modules() if isinstance(m, layers) and getattr(m, "gradient_checkpointing", False)]
    before = [(layer, layer._gradient_checkpointing_func) for layer in told]
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    caches = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for config, _ in caches:
            config.use_cache = False
        for layer, checkpoint in before:
            layer.training = True
            layer._gradient_checkpointing_func = _in_eval_mode(layer, checkpoint)
        yield
    finally:
        for config, cache in caches:
            config.use_cache = cache
        for layer, checkpoint in before:
            layer._gradient_checkpointing_func = checkpoint
        for module, training in modes:
            module.training = training


def _in_eval_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        def inside(*args: Any) -> Any:
            layer.training = False
            try:
                return function(*args)
            finally:
                layer.training = True

        return checkpoint(inside, *args)

    return run
