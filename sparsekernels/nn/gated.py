"""Linear layers with stochastic gates, which are multiplied into the frozen weight, never into activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import gate_gradient, gate_values, gated_weight
from ..ops.gates.checks import Kind


@dataclass
class Gating:
    """Settings of gates. The layers of a model share one instance.

    Attributes:
        kind, noise: as in `sk.ops.gate_values`.
        probing: backward also leaves dL/dz of every open gate in `probes` of its layer.
        watching: in training, record in `LayerGates.used_outside` that a layer's weight or bias was used outside its
            module's forward, where gates have no effect. Reading it there then returns an alias instead of the
            Parameter.
        frozen: gates have no noise and a gradient of zero, in train mode too; in eval mode there is never noise.
    """

    kind: Kind
    noise: float
    probing: bool = False
    watching: bool = False
    frozen: bool = False


SIDES = ("rows", "columns")


class _Gated(torch.autograd.Function):
    """y = x W'^T + b', with W' = z_r * (W + scale * B A) * z_c and b' = z_r * b; W stays frozen.

    Backward recomputes W' from the key. The activations x and y are saved if needed: y is z_r times the ungated output,
    so the product of y and dy yields the gradient of z_r.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None,
        a: Tensor | None, b: Tensor | None, row_probe: Tensor | None, column_probe: Tensor | None, key: Tensor | None,
        transposed: bool, gating: Gating, group: int, scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.options = (gating.kind, gating.noise, transposed, group, scale)
        ctx.frozen = gating.frozen
        needed = ctx.needs_input_grad
        if needed[1]:
            raise RuntimeError("the weight of a gated layer must stay frozen; call requires_grad_(False) on it")
        folded, shift = _fold(x.dtype, weight, bias, rows, columns, a, b, key, *ctx.options)
        y = _linear(x, folded, shift, transposed)
        keep_x = needed[5] or needed[6] or (not gating.frozen and (needed[4] or needed[8]))
        keep_y = not gating.frozen and (needed[3] or needed[7])
        ctx.save_for_backward(
            x if keep_x else None, y if keep_y else None, weight, bias, rows, columns, a, b, key
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _Gated._backward(ctx, grads)

    @staticmethod
    def _backward(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, rows, columns, a, b, key = ctx.saved_tensors
        kind, noise, transposed, group, scale = ctx.options
        draw: dict[str, Any] = {"kind": kind, "noise": noise, "key": key}
        needed, dy = list(ctx.needs_input_grad), _matrix(grads[0])
        out: list[Tensor | None] = [None] * 14
        if ctx.frozen:
            sides = zip((rows, columns), needed[3:5], strict=True)
            out[3:5] = [torch.zeros_like(logits) if want else None for logits, want in sides]
            needed[3] = needed[4] = needed[7] = needed[8] = False
        if needed[0] or needed[4] or needed[8]:
            folded, _ = _fold(dy.dtype, weight, None, rows, columns, a, b, key, *ctx.options)
            dx = dy @ (folded.T if transposed else folded)
            out[0] = dx.view(*grads[0].shape[:-1], dx.shape[1])
            if needed[4] or needed[8]:
                out[4], out[8], _ = gate_gradient(_matrix(x), dx, columns, stream=1, group=group, **draw)
        if needed[3] or needed[7]:
            out[3], out[7], out[2] = gate_gradient(dy, _matrix(y), rows, stream=0, **draw)
        elif needed[2]:
            sums = dy.sum(0, dtype=bias.dtype)
            out[2] = sums if rows is None else sums * gate_values(rows, stream=0, **draw)[0]
        if needed[5] or needed[6]:
            # dB = s z_r dy^T (x z_c A^T), dA = s (dy z_r B)^T x z_c: gates go into the factors.
            z_r = None if rows is None else gate_values(rows, stream=0, **draw)[0]
            z_c = None if columns is None else gate_values(columns, stream=1, **draw)[0].repeat_interleave(group)
            inner = _matrix(x) @ (a if z_c is None else a * z_c).to(dy.dtype).T
            outer = dy @ (b if z_r is None else b * z_r[:, None]).to(dy.dtype)
            out[6] = (dy.T @ inner).to(b.dtype) * (scale if z_r is None else scale * z_r[:, None])
            out[5] = (outer.T @ _matrix(x)).to(a.dtype) * (scale if z_c is None else scale * z_c)
        if out[2] is not None:
            out[2] = out[2].to(bias.dtype) if needed[2] else None
        return tuple(grad if want else None for grad, want in zip(out, ctx.needs_input_grad, strict=True))


def _fold(
    dtype: torch.dtype, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None,
    a: Tensor | None, b: Tensor | None, key: Tensor | None,
    kind: Kind, noise: float, transposed: bool, group: int, scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """W', laid out like the weight, and b'; in `dtype`."""
    if a is not None and b is not None:
        left, right = (a.T, b.T) if transposed else (b, a)
        with torch.autocast(weight.device.type, enabled=False):  # a backward or compress() may run inside autocast
            weight = torch.addmm(weight.to(a.dtype), left, right, alpha=scale)
    if bias is not None:
        bias = bias.to(weight.dtype)
    if rows is None and columns is None:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    return gated_weight(
        weight, bias, rows, columns,
        kind=kind, noise=noise, key=key, transposed=transposed, dtype=dtype, column_group=group,
    )  # fmt: skip


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.T if transposed else weight, bias)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Watched(torch.autograd.Function):
    """A parameter as it is; a backward that reaches it is recorded."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, token: Tensor, gates: LayerGates) -> Tensor:
        ctx.gates = gates
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.gates.used_outside = True
        return grads[0] if ctx.needs_input_grad[0] else None, None, None


def _watched(name: str) -> property:
    """The parameter of a gated layer, as code other than its forward reads it."""

    def read(layer: Any) -> Tensor | None:
        parameter, gates = layer._parameters[name], layer.gates
        if parameter is None or not (layer.training and gates.gating.watching and torch.is_grad_enabled()):
            return parameter
        # A frozen weight needs another input that requires grad, to have a backward.
        return _Watched.apply(parameter, parameter.new_zeros(()).requires_grad_(), gates)  # type: ignore[no-any-return]

    return property(read)


class LayerGates(nn.Module):
    """The gates of one layer and its low-rank factors; a submodule `gates` of the layer.

    Parameters, each of which may be None: `rows` [M] and `columns` [N / column_group], logits; `lora_A` [r, N] and
    `lora_B` [M, r]. All are fp32 (fp64 for an fp64 weight), whatever the dtype of the weight.

    Attributes:
        gating: shared settings. column_group: number of neighbouring columns that share a gate.
        lora_scale: factor of B A. transposed: the weight is [N, M].
        probes: by name of the gates, tensors whose .grad is dL/dz after a backward, if `gating.probing`.
        used_outside: whether a backward reached the weight or bias outside the layer's forward, while
            `gating.watching`.
        left_out: whether the layer computes as it would without gates and low-rank factors.
    """

    rows: nn.Parameter | None
    columns: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, gating: Gating, column_group: int, lora_scale: float, transposed: bool) -> None:
        super().__init__()
        self.gating, self.column_group, self.lora_scale, self.transposed = gating, column_group, lora_scale, transposed
        self.probes: dict[str, Tensor] = {}
        self.used_outside = self.left_out = False

    def apply_to(self, layer: nn.Module, input: Tensor) -> Tensor:
        """The forward of the gated layer."""
        weight: Any = layer._parameters["weight"]
        bias = layer._parameters["bias"]
        if self.left_out:
            return _linear(input, weight, bias, self.transposed)
        noisy = layer.training and not self.gating.frozen
        # From torch's generator, whose state checkpointing restores for recomputation.
        key = torch.randint(2**63 - 1, (1,), device=input.device) if noisy else None
        device, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        parts = self._parts(weight)
        probes = [self._probe(name, part) if layer.training else None for name, part in zip(SIDES, parts, strict=False)]
        with torch.autocast(device, enabled=False):
            y: Tensor = _Gated.apply(
                input.to(dtype), weight, bias, *parts, *probes, key,
                self.transposed, self.gating, self.column_group, self.lora_scale,
            )  # fmt: skip
        return y

    @torch.no_grad()
    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight, [M, N], and bias as in evaluation, multiplied by gates, with low-rank factors added; same dtype."""
        rows, columns, a, b = self._parts(weight)
        options = (self.gating.kind, self.gating.noise, self.transposed, self.column_group, self.lora_scale)
        weight, bias = _fold(weight.dtype, weight, bias, rows, columns, a, b, None, *options)
        return (weight.T if self.transposed else weight), bias

    def _parts(self, weight: Tensor) -> list[Tensor | None]:
        compute_dtype = torch.promote_types(weight.dtype, torch.float32)
        return [None if p is None else p.to(compute_dtype) for p in (self.rows, self.columns, self.lora_A, self.lora_B)]

    def _probe(self, name: str, logits: Tensor | None) -> Tensor | None:
        if logits is None or not self.gating.probing or self.gating.frozen:
            return None
        probe = self.probes.get(name)
        if probe is None or probe.device != logits.device:
            probe = self.probes[name] = torch.zeros_like(logits, requires_grad=True)
        return probe


class GatedLinear(nn.Linear):
    """An `nn.Linear` with gates. Made by `gate` from an existing module."""

    gates: LayerGates
    weight = _watched("weight")  # type: ignore[assignment]
    bias = _watched("bias")  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return self.gates.apply_to(self, input)


@cache
def _gated_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind is nn.Linear:
        return GatedLinear
    own = {name: vars(GatedLinear)[name] for name in ("forward", "weight", "bias")}
    return type(f"Gated{kind.__name__}", (kind,), own)


def gate(
    module: nn.Module,
    gating: Gating,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    column_group: int = 1,
    lora_rank: int = 0,
    lora_scale: float = 1.0,
) -> None:
    """Add gates to a Linear or Conv1D, in place: its class changes, its weight is frozen.

    Args:
        module: of exactly one of the two classes.
        gating: shared by the layers of a model.
        rows ([M]), columns ([N / column_group]): initial logits; None: no gates on that side.
        column_group: number of neighbouring columns that share a gate.
        lora_rank: r of factors B A added to the weight; B starts at zero, A normal over sqrt(N), from torch's
            generator. 0: none.
        lora_scale: factor of B A.
    """
    weight: Any = module.weight
    transposed = not isinstance(module, nn.Linear)
    n, m = weight.shape if transposed else weight.shape[::-1]
    gates = LayerGates(gating, column_group, lora_scale, transposed)
    gates.rows = _parameter(rows, weight)
    gates.columns = _parameter(columns, weight)
    gates.lora_A = _parameter(torch.randn(lora_rank, n) / n**0.5 if lora_rank else None, weight)
    gates.lora_B = _parameter(torch.zeros(m, lora_rank) if lora_rank else None, weight)
    weight.requires_grad_(False)
    put_back(module, gates.train(module.training))


def _parameter(x: Tensor | None, weight: Tensor) -> nn.Parameter | None:
    compute_dtype = torch.promote_types(weight.dtype, torch.float32)
    return None if x is None else nn.Parameter(x.to(weight.device, compute_dtype))


def ungate(module: nn.Module) -> LayerGates:
    """Return the module to its original class, its weight still frozen; returns the gates, for `put_back`."""
    gates: LayerGates = module._modules.pop("gates")  # type: ignore[assignment]
    module.__class__ = type(module).__mro__[1]
    return gates


def put_back(module: nn.Module, gates: LayerGates) -> None:
    """Give the module back the gates that `ungate` returned."""
    module.__class__ = _gated_class(type(module))  # type: ignore[arg-type]
    module._modules["gates"] = gates
