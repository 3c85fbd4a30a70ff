"""What kind of layer a module is."""

from __future__ import annotations

from typing import Any

from torch import nn

NORMS = ("RMSNorm", "LayerNorm")  # transformers has one for each model, alike: linear in its weight, elementwise


def kind_of(module: nn.Module) -> str | None:
    """How the gradient of a module's own parameters is made, or None where that is not known.

    A subclass with a forward of its own may do anything: rows moved, a table scaled, a weight transposed.
    """
    kind, name = type(module), type(module).__name__
    if kind.forward is nn.Linear.forward:
        return "linear"
    if name == "Conv1D" and hasattr(module, "nf"):  # of transformers' GPT-2: a Linear with its weight transposed
        return "conv1d"
    if isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward:
        return None if module.max_norm is not None or module.scale_grad_by_freq else "embedding"
    if kind.forward is nn.LayerNorm.forward or (not isinstance(module, nn.LayerNorm) and name.endswith(NORMS)):
        plain = all(p is None or p.dim() == 1 for p in module._parameters.values())
        return "norm" if plain and set(module._parameters) <= {"weight", "bias"} else None
    return None


def weight_size(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a Linear or Conv1D, by its weight.

    Raises:
        AttributeError: it is another module.
    """
    kind = kind_of(module)
    if kind not in ("linear", "conv1d"):
        raise AttributeError(f"{type(module).__name__} is no Linear or Conv1D")
    weight: Any = module.weight
    outputs, inputs = weight.shape if kind == "linear" else weight.shape[::-1]
    return outputs, inputs
