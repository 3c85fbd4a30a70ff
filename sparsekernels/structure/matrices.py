"""The two-dimensional matrices in a model's parameters: whole, parts of a fused projection, or one per expert."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..common.names import default_targets
from ..common.supported import refuse_unsupported_of
from ..nn.low_rank import LowRankLinear
from .fused import LAYOUTS, Rows


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix [M, N], outputs by inputs, and its location in a parameter. Made by `matrices`.

    Attributes:
        label: unique and readable: the parameter's name, plus a part, `h.0.attn.c_attn.weight[q]`, or an expert,
            `layers.0.mlp.experts.down_proj[5]`, if the parameter has several.
        parameter: the name in `model.named_parameters()`.
        shape: (M, N).
        transposed: the parameter is [N, M], as in transformers' Conv1D.
        expert: index into dimension 0 of a 3-D parameter, or None.
        rows: which outputs of the parameter, in their order: a slice, positions (int64, on the CPU), or None for all.
        layer: number of its block: the first number in the name; None outside numbered blocks.
        kind: the rest of the name after that number, without ".weight" and with the part: `attn.c_attn[q]`, the same in
            every layer and for every expert. If a second stack of blocks has parameters of the same names, as decoders
            beside encoders, it starts with the name of the stack: `decoder.block.layer.0.SelfAttention.q`.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> matrix = sk.matrices(model)["0.weight"]
        >>> matrix.shape, matrix.layer, matrix.kind
        ((2, 3), 0, 'weight')
        >>> matrix.write_(model[0].weight, torch.ones(2, 3))
        >>> matrix.read(model[0].weight)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    label: str
    parameter: str
    shape: tuple[int, int]
    transposed: bool
    expert: int | None
    rows: Rows | None
    layer: int | None
    kind: str

    def read(self, weight: Tensor) -> Tensor:
        """Return the matrix, [M, N], detached: a view of `weight`, or a copy if its rows are not contiguous in it.

        Args:
            weight: the parameter `self.parameter`, or a tensor of the same layout, such as its gradient; any dtype, any
                device. Not changed.

        Raises:
            ValueError: the tensor has another layout.
        """
        whole = self._whole(weight)
        return whole.index_select(0, self.rows.to(weight.device)) if isinstance(self.rows, Tensor) else whole

    def write_(self, weight: Tensor, value: Tensor) -> None:
        """Overwrite the matrix with `value`, rounded to nearest in `weight`'s dtype; other weights keep their bits.

        Args:
            weight: as for `read`; written in place, not recorded by autograd, its version counter is incremented.
            value ([M, N], any floating dtype, any device): not changed.

        Raises:
            ValueError: either shape differs.
        """
        if value.shape != self.shape:
            raise ValueError(f"value: {self.label!r} is {list(self.shape)}, got {list(value.shape)}")
        with torch.no_grad():
            whole = self._whole(weight)
            if isinstance(self.rows, Tensor):
                whole.index_copy_(0, self.rows.to(weight.device), value.detach().to(whole))
            else:
                whole.copy_(value)

    def _whole(self, weight: Tensor) -> Tensor:
        """A detached view of the matrix, or if its rows are scattered, of the matrix that contains them."""
        whole = weight.detach()
        if whole.dim() == (2 if self.expert is None else 3):
            whole = whole if self.expert is None else whole[self.expert]
            whole = whole.T if self.transposed else whole
            whole = whole[self.rows] if isinstance(self.rows, slice) else whole
            if whole.shape == self.shape or (isinstance(self.rows, Tensor) and whole.shape[1] == self.shape[1]):
                return whole
        raise ValueError(f"weight: {list(weight.shape)} does not contain {self.label!r}, {list(self.shape)}")


def matrices(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Matrix]:
    """List the matrices of a model by label, in the order of its parameters, each tied parameter once.

    Fused projections are split if the class determines their layout: `GPT2Attention.c_attn` (self attention),
    `nn.MultiheadAttention.in_proj_weight`, `GPTNeoXAttention.query_key_value`, `BloomAttention.query_key_value` and
    `Phi3Attention.qkv_proj` into q, k and v, `Phi3MLP.gate_up_proj` into gate and up. Any other module that computes
    several things at once, such as fused experts, is one matrix. A 3-D parameter is one matrix per index of dimension
    0; its rows are dimension 1, which may be outputs or inputs: implementations differ, and the rank is the same.

    Args:
        model: any model; no weight is read, so it may be on the meta device.
        names: patterns as in `fnmatch`, of labels or of parameter names (a tied parameter has several); a parameter
            name stands for all its matrices. Brackets are first read literally, so `*[q]` is every query, and only if
            nothing matches as a set of characters. Embedding tables and heads may be named. None: the projections of
            attention and MLP, i.e. all in numbered blocks except embeddings, heads, and matrices with a side of 1.

    Returns:
        label -> Matrix. Convolutions, LowRankLinear, integer parameters and those not of two or three dimensions have
        none.

    Raises:
        ValueError: a pattern matches nothing, or only parameters without a matrix; a parameter is sharded or quantised.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.MultiheadAttention(4, num_heads=2))
        >>> list(sk.matrices(model, "1.in_proj*"))
        ['1.in_proj_weight[q]', '1.in_proj_weight[k]', '1.in_proj_weight[v]']
    """
    parameters = {name: p for name, p in model.named_parameters() if _holds_matrices(model, name, p)}
    kinds = _kinds(parameters)
    found = {m.label: m for name, p in parameters.items() for m in _inside(model, name, p, kinds[name])}
    if names is None:
        targets = set(default_targets(model))
        chosen = {label for label, m in found.items() if m.parameter in targets and min(m.shape) > 1}
    else:
        spoken = _spoken(model, found)
        chosen = set()
        for pattern in [names] if isinstance(names, str) else names:
            chosen.update(_matching(pattern, spoken, model))
    refuse_unsupported_of(model, {m.parameter for label, m in found.items() if label in chosen})
    return {label: m for label, m in found.items() if label in chosen}


def _holds_matrices(model: nn.Module, name: str, parameter: Tensor) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    dense = not isinstance(
        owner, (_ConvNd, LowRankLinear)
    )  # a convolution is not a matrix, and a factor is only half of one
    return dense and parameter.dim() in (2, 3) and parameter.is_floating_point()


def _kinds(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """Layer and kind of each name."""
    split: dict[str, tuple[int | None, str, str]] = {}
    stacks: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            split[name] = None, "", name.removesuffix(".weight")
        else:
            stack, rest = ".".join(parts[:at]), ".".join(parts[at + 1 :]).removesuffix(".weight")
            split[name] = int(parts[at]), stack, rest
            stacks.setdefault(rest, set()).add(stack)
    alike = {stack for some in stacks.values() if len(some) > 1 for stack in some}
    return {
        name: (layer, ".".join(filter(None, [stack, rest] if stack in alike or not rest else [rest])))
        for name, (layer, stack, rest) in split.items()
    }


def _inside(model: nn.Module, name: str, parameter: Tensor, kind: tuple[int | None, str]) -> Iterator[Matrix]:
    """The matrices of one parameter."""
    layer, title = kind
    if parameter.dim() == 3:
        for expert in range(parameter.shape[0]):
            shape = (parameter.shape[1], parameter.shape[2])
            yield Matrix(f"{name}[{expert}]", name, shape, False, expert, None, layer, title)
        return
    transposed = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
    outputs, inputs = parameter.shape[::-1] if transposed else parameter.shape
    parts = _parts(model, name, outputs)
    if not parts:
        yield Matrix(name, name, (outputs, inputs), transposed, None, None, layer, title)
    for part, rows in parts.items():
        count = len(range(outputs)[rows]) if isinstance(rows, slice) else len(rows)
        yield Matrix(f"{name}[{part}]", name, (count, inputs), transposed, None, rows, layer, f"{title}[{part}]")


def _parts(model: nn.Module, name: str, outputs: int) -> Mapping[str, Rows]:
    """Which outputs belong to which part of a fused projection; empty for any other parameter."""
    path = name.split(".")
    for depth in (1, 2):
        holder = model.get_submodule(".".join(path[:-depth]))
        torch_own = isinstance(holder, nn.MultiheadAttention) and type(holder).forward is nn.MultiheadAttention.forward
        title = "torch" if torch_own else type(holder).__name__
        layout = LAYOUTS.get((title, ".".join(path[-depth:])))
        if layout is not None:
            try:
                parts = layout(holder)
            except AttributeError:  # another class of that name
                return {}
            covered = sum(p.stop - p.start if isinstance(p, slice) else len(p) for p in parts.values())
            return parts if covered == outputs else {}
    return {}


def _spoken(model: nn.Module, found: Mapping[str, Matrix]) -> dict[str, set[str]]:
    """Names that a pattern may match, and the labels they stand for: every name of a parameter, also with its parts."""
    every = dict(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in every.items():
        aliases.setdefault(id(parameter), []).append(name)
    spoken: dict[str, set[str]] = {}
    for label, matrix in found.items():
        for alias in aliases[id(every[matrix.parameter])]:
            spoken.setdefault(alias, set()).add(label)
            spoken.setdefault(alias + label.removeprefix(matrix.parameter), set()).add(label)
    return spoken


def _matching(pattern: str, spoken: Mapping[str, set[str]], model: nn.Module) -> set[str]:
    """The labels that a pattern stands for."""
    if pattern in spoken:
        return spoken[pattern]
    readings = (pattern.replace("[", "[[]"), pattern)
    for reading in readings:
        matched = [labels for name, labels in spoken.items() if fnmatch.fnmatchcase(name, reading)]
        if matched:
            return set().union(*matched)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(fnmatch.fnmatchcase(name, reading) for reading in readings):
            raise ValueError(
                f"names: {pattern!r} matches no matrix; {name!r} is {parameter.dtype} {list(parameter.shape)}, "
                "and only floating-point parameters of two dimensions, or three for experts, hold matrices, "
                "those of convolutions and of LowRankLinear excepted"
            )
    # One with brackets, if any, is the most instructive.
    example = next((name for name in spoken if name.endswith("]")), next(iter(spoken), None))
    hint = f"labels look like {example!r}" if example else "the model has no matrices"
    raise ValueError(f"names: nothing matches {pattern!r}; {hint}")
