"""Which weights of a transformer block belong together: heads of attention, and neurons of MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .fused import LAYOUTS, Rows, stretches
from .layers import weight_size


@dataclass(frozen=True, eq=False)
class OutputSlice:
    """Outputs of a Linear or Conv1D, in their order.

    Attributes:
        module: its name in the model.
        rows: a slice, or positions (int64, on the CPU), if the module also computes something else; None: all.
    """

    module: str
    rows: Rows | None = None

    @property
    def places(self) -> Rows:
        """An index that selects them from all rows."""
        return slice(None) if self.rows is None else self.rows


@dataclass(frozen=True, eq=False)
class Attention:
    """Self attention, by groups that can be removed: a key/value head with the queries that read it.

    Row (g, d) of the value, of `groups` times `kv_rows`, reaches `output` as columns (g, r, d) for every r below
    `query_rows` / `kv_rows`: attention mixes tokens, never dimensions.

    Attributes:
        name: the module that splits the heads; `attributes` are its attributes.
        query, key, value: the outputs that compute them, possibly of one module.
        output: name of the Linear or Conv1D that reads the heads.
        groups: number of key/value heads.
        query_rows: rows of the query in a group, and columns of the output: heads in the group times their width.
        kv_rows: rows of the key in a group, and of the value: the width of a head.
        rotary: whether queries and keys are rotated or normalised before they are multiplied, so that one row affects
            several dimensions.
        attributes: what each group adds to integer attributes of the module: {"num_heads": 1}; a dot leads into an
            object that other modules may share: {"config.num_attention_heads": 1}.
    """

    name: str
    query: OutputSlice
    key: OutputSlice
    value: OutputSlice
    output: str
    groups: int
    query_rows: int
    kv_rows: int
    rotary: bool
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP, by its neurons: neuron j is row j of every input, and column j of the output.

    If a row of an input is 0 for every token, so is what the output reads: the activation maps 0 to 0, and so does the
    product with a gate.

    Attributes:
        name: the module that applies the activation; `attributes` are its attributes.
        inputs: up, or gate and up.
        output: name of the Linear or Conv1D that reads the neurons.
        neurons: number of neurons.
        attributes: as in Attention; what each neuron adds.
    """

    name: str
    inputs: tuple[OutputSlice, ...]
    output: str
    neurons: int
    attributes: Mapping[str, int] = field(default_factory=dict)


def structures(model: nn.Module) -> tuple[list[Attention], list[Mlp]]:
    """Find the attentions and MLPs of a model whose heads and neurons can be removed, in the order of its modules.

    Known, by class name, are those of transformers for BERT, RoBERTa, XLM-RoBERTa, ELECTRA, CamemBERT, DistilBERT,
    GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3, GPT-NeoX and OPT. Everything else is skipped, and so is
    what is unexpected: cross attention, sizes or attributes that do not fit, projections that are not a plain Linear or
    Conv1D, an activation that has weights, is not elementwise or is not 0 at 0.

    Args:
        model: any; no weight is read, so it may be on the meta device.

    Cost: a few microseconds per module; three numbers through each activation.
    Source: ours, from the code of transformers 5.23.
    """
    attentions, mlps = [], []
    for name, module in model.named_modules():
        kind = type(module)
        place = kind.__module__.split(".")
        if place[:2] != ["transformers", "models"]:  # other packages may have a class of this name with other code
            continue
        title = f"{place[2]}.{kind.__name__}"
        try:
            attention = _ATTENTIONS[title](name, module) if title in _ATTENTIONS else None
            if attention is not None and _holds_attention(model, attention):
                attentions.append(attention)
            mlp = _mlp(name, module, *_MLPS[title]) if title in _MLPS else None
            if mlp is not None and _holds_mlp(model, mlp):
                mlps.append(mlp)
        except AttributeError:  # another version of that class, or projections that were replaced
            continue
    return attentions, mlps


def _under(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _apart(name: str, module: Any, children: str, output: str, width: int, rotary: bool, **units: int) -> Attention:
    """Attention with separate modules for queries, keys and values."""
    query, key, value = children.split()
    groups = weight_size(getattr(module, key))[0] // width
    queries = weight_size(getattr(module, query))[0] // groups
    q, k, v = (OutputSlice(_under(name, child)) for child in (query, key, value))
    return Attention(name, q, k, v, output, groups, queries, width, rotary, units)


def _bert(name: str, attention: Any) -> Attention | None:
    inner = attention.self
    if not type(inner).__name__.endswith("SelfAttention"):
        return None
    width, output = inner.attention_head_size, _under(name, "output.dense")
    units = {"num_attention_heads": 1, "all_head_size": width}
    return _apart(_under(name, "self"), inner, "query key value", output, width, False, **units)


def _distilbert(name: str, a: Any) -> Attention:
    return _apart(name, a, "q_lin k_lin v_lin", _under(name, "out_lin"), a.attention_head_size, False, n_heads=1)


def _opt(name: str, a: Any) -> Attention:
    return _apart(name, a, "q_proj k_proj v_proj", _under(name, "out_proj"), a.head_dim, False, num_heads=1)


def _llama(name: str, a: Any) -> Attention:
    return _apart(name, a, "q_proj k_proj v_proj", _under(name, "o_proj"), a.head_dim, True)


def _fused(name: str, a: Any, child: str) -> tuple[OutputSlice, OutputSlice, OutputSlice]:
    """Query, key and value, where one module computes them."""
    parts = LAYOUTS[type(a).__name__, f"{child}.weight"](a)
    q, k, v = (OutputSlice(_under(name, child), parts[part]) for part in "qkv")
    return q, k, v


def _gpt2(name: str, a: Any) -> Attention:
    """Also called for cross attention, whose c_attn has two of the three parts, and so does not fit."""
    width, units = a.head_dim, {"num_heads": 1, "split_size": a.head_dim}
    output = _under(name, "c_proj")
    return Attention(name, *_fused(name, a, "c_attn"), output, a.num_heads, width, width, False, units)


def _neox(name: str, a: Any) -> Attention:
    width, output = a.head_size, _under(name, "dense")
    heads = weight_size(a.query_key_value)[0] // (3 * width)
    return Attention(name, *_fused(name, a, "query_key_value"), output, heads, width, width, True)


def _phi3(name: str, a: Any) -> Attention:
    width, groups, output = a.head_dim, a.num_key_value_heads, _under(name, "o_proj")
    each = a.config.num_attention_heads // groups
    units = {"num_key_value_heads": 1, "config.num_attention_heads": each, "config.num_key_value_heads": 1}
    return Attention(name, *_fused(name, a, "qkv_proj"), output, groups, each * width, width, True, units)


_BERT = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta", "electra": "Electra"}
_BERT["camembert"] = "Camembert"
_LLAMA = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_LLAMA.update({"gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3"})

# Keys: folder of transformers and class in it.
_ATTENTIONS: dict[str, Callable[[str, Any], Attention | None]] = {
    **{f"{folder}.{title}Attention": _bert for folder, title in _BERT.items()},
    **{f"{folder}.{title}Attention": _llama for folder, title in _LLAMA.items()},
    "distilbert.DistilBertSelfAttention": _distilbert,
    "gpt2.GPT2Attention": _gpt2,
    "gpt_neox.GPTNeoXAttention": _neox,
    "opt.OPTAttention": _opt,
    "phi3.Phi3Attention": _phi3,
}
# Inputs, output, activation, and the attribute for the number of neurons, if any.
_MLPS: dict[str, tuple[str, str, str, str | None]] = {
    **{
        f"{folder}.{title}Layer": ("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn", None)
        for folder, title in _BERT.items()
    },
    **{
        f"{folder}.{title}MLP": ("gate_proj up_proj", "down_proj", "act_fn", "intermediate_size")
        for folder, title in _LLAMA.items()
    },
    "distilbert.FFN": ("lin1", "lin2", "activation", None),
    "gpt2.GPT2MLP": ("c_fc", "c_proj", "act", None),
    "gpt_neox.GPTNeoXMLP": ("dense_h_to_4h", "dense_4h_to_h", "act", None),
    "opt.OPTDecoderLayer": ("fc1", "fc2", "activation_fn", None),
    "phi3.Phi3MLP": ("gate_up_proj", "down_proj", "activation_fn", None),
}


def _mlp(name: str, module: Any, inputs: str, output: str, activation: str, attribute: str | None) -> Mlp | None:
    if not _keeps_zero(attrgetter(activation)(module)):
        return None
    neurons = weight_size(module.get_submodule(output))[1]
    parts = [OutputSlice(_under(name, child)) for child in inputs.split()]
    if inputs == "gate_up_proj":  # one above the other
        parts = [OutputSlice(parts[0].module, rows) for rows in stretches(gate=neurons, up=neurons).values()]
    return Mlp(name, tuple(parts), _under(name, output), neurons, {attribute: 1} if attribute else {})


def _keeps_zero(activation: Any) -> bool:
    """Whether it maps 0 to 0 elementwise, tested on the activation alone."""
    if isinstance(activation, nn.Module) and next(iter(activation.state_dict()), None) is not None:
        return False
    x = torch.tensor([0.0, 1.5, -0.5])
    try:
        with torch.no_grad():
            y, alone = activation(x.clone()), activation(x[2:].clone())  # some work in place
    except (RuntimeError, TypeError):  # needs a certain size, or is not a function
        return False
    return bool(y.shape == x.shape and y[0] == 0 and torch.allclose(alone, y[2:]))


def _covers(model: nn.Module, rows: Mapping[str, int], output: str, columns: int) -> bool:
    """Whether the modules have exactly these rows, and the output these columns."""
    sizes = {module: weight_size(model.get_submodule(module))[0] for module in rows}
    return sizes == rows and weight_size(model.get_submodule(output))[1] == columns


def _follows(model: nn.Module, name: str, attributes: Mapping[str, int], count: int) -> bool:
    """Whether the attributes have the values for `count` units."""
    module = model.get_submodule(name)
    return all(attrgetter(key)(module) == unit * count for key, unit in attributes.items())


def _holds_attention(model: nn.Module, a: Attention) -> bool:
    rows: dict[str, int] = {}
    for part, each in ((a.query, a.query_rows), (a.key, a.kv_rows), (a.value, a.kv_rows)):
        rows[part.module] = rows.get(part.module, 0) + a.groups * each
    covers = _covers(model, rows, a.output, a.groups * a.query_rows)
    return covers and a.query_rows % a.kv_rows == 0 and _follows(model, a.name, a.attributes, a.groups)


def _holds_mlp(model: nn.Module, mlp: Mlp) -> bool:
    rows: dict[str, int] = {}
    for part in mlp.inputs:
        rows[part.module] = rows.get(part.module, 0) + mlp.neurons
    return _covers(model, rows, mlp.output, mlp.neurons) and _follows(model, mlp.name, mlp.attributes, mlp.neurons)
