"""What kind of layer a module is."""

from __future__ import annotations

from typing import Any

from torch import nn

NORMS = ("RMSNorm", "LayerNorm")  # transformers has one for each model, alike: linear in its weight, elementwise


def kind_of(module: nn.Module) -> str | None:
    """The kind of layer, which determines how its parameters' gradients are computed; None if unknown.

    A subclass with its own forward may do anything (permute rows, scale a table, transpose a weight), so it is unknown.
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
    """Outputs and inputs of a Linear or Conv1D, from its weight.

    Raises:
        AttributeError: another kind of module.
    """
    kind = kind_of(module)
    if kind not in ("linear", "conv1d"):
        raise AttributeError(f"{type(module).__name__} is not a Linear or Conv1D")
    weight: Any = module.weight
    outputs, inputs = weight.shape if kind == "linear" else weight.shape[::-1]
    return outputs, inputs
