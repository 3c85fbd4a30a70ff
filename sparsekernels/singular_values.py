"""Gradients of the singular values of a model's weights, in one backward that forms no weight gradient of a Linear.

A Linear runs the forward that it always had; its backward returns, in place of the weight's gradient, that of the
singular values alone. Every other weight has a dense gradient for a moment, and one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm.auto import tqdm

from .autograd import is_sparsified
from .evaluating import evaluating, only_trainable
from .factors import Factors
from .losses import Batch, Loss, batch_size, check_loss, default_loss, to_device
from .matrices import Matrix
from .ops import singular_value_grad, singular_value_grad_linear
from .pairs import kind_of


@dataclass
class Derivatives:
    """What the loss does when a matrix W = sum of s_i u_i v_i^T changes, G being its gradient.

    Attributes:
        values: for each of the factors, dL/ds_i = u_i^T G v_i, [R].
        inner: <G, W>, the derivative for scaling the matrix as a whole; fp32 (fp64 for fp64).
    """

    values: list[Tensor]
    inner: Tensor


@dataclass
class _Sink:
    """Where the derivatives of one parameter arrive: `total` is the Parameter whose gradient they are."""

    name: str
    parameter: nn.Parameter
    matrices: list[tuple[Matrix, Sequence[Factors]]] = field(default_factory=list)
    total: nn.Parameter = field(init=False)

    def start(self) -> None:
        wide = torch.promote_types(self.parameter.dtype, torch.float32)
        self.total = nn.Parameter(self.parameter.new_zeros(sum(self._sizes()), dtype=wide))

    def _sizes(self) -> list[int]:
        return [k for _, parts in self.matrices for k in (1, *(len(part.s) for part in parts))]

    def of_gradient(self, grad: Tensor) -> Tensor:
        """The derivatives, from the dense gradient."""
        found = []
        for matrix, parts in self.matrices:
            g, weight = matrix.read(grad), matrix.read(self.parameter)
            found.append((g.to(self.total.dtype) * weight.to(self.total.dtype)).sum()[None])
            found += [singular_value_grad(_rows(g, part, 0), part.u, part.v) for part in parts]
        return torch.cat(found)

    def of_activations(self, grad_output: Tensor, input: Tensor, grad_input: Tensor) -> Tensor:
        """The derivatives, from those of a Linear's output [T, M], its input [T, N], and that one's gradient [T, N]."""
        found = []
        for matrix, parts in self.matrices:
            grad, back = grad_output, grad_input
            if matrix.rows is not None:
                grad = grad_output[:, matrix.rows]
                weight = matrix.read(self.parameter)
                back = grad @ weight
            # <G, W> = sum over tokens of dY_t^T W X_t, and dY_t^T W is the gradient of the input.
            found.append((back.to(self.total.dtype) * input).sum()[None])
            found += [singular_value_grad_linear(_rows(grad, part, 1), input, part.u, part.v) for part in parts]
        return torch.cat(found)

    def split(self) -> dict[Matrix, Derivatives]:
        """What has arrived.

        Raises:
            ValueError: it is not finite.
        """
        grad = self.total.grad if self.total.grad is not None else torch.zeros_like(self.total)
        if not bool(grad.isfinite().all()):
            raise ValueError(f"samples: the gradient of {self.name!r} is not finite")
        pieces = iter(grad.split(self._sizes()))
        found = {}
        for matrix, parts in self.matrices:
            inner = next(pieces)[0]
            found[matrix] = Derivatives([next(pieces) for _ in parts], inner)
        return found


def _rows(x: Tensor, part: Factors, dim: int) -> Tensor:
    return x if part.rows is None else x.index_select(dim, part.rows.to(x.device))


class _Linear(torch.autograd.Function):
    """y = x W^T + b, or x W + b for a Conv1D; the gradient of `total` is that of the singular values of W."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor, sink: _Sink) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.sink = sink
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grads[0] @ weight
        flat = (x.reshape(-1, x.shape[-1]) for x in (grads[0], input, grad_input))
        return grad_input, None, None, ctx.sink.of_activations(*flat), None


def _forward(module: Any, sink: _Sink, input: Tensor) -> Tensor:
    """The forward of a Linear or Conv1D, as autocast has it."""
    x: Any = input
    weight, bias = module.weight, module.bias
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    matrix = weight.T if kind_of(module) == "conv1d" else weight
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(x, matrix, bias, sink.total, sink)


class _Scoring:
    """A context in which a backward leaves derivatives in the sinks; on leaving, the model is as it was.

    `dense` are names of parameters whose whole gradient is taken, though their modules are Linears.
    """

    def __init__(self, model: nn.Module, sinks: Sequence[_Sink], dense: set[str]) -> None:
        self.model, self.sinks, self.dense = model, sinks, dense

    def __enter__(self) -> _Scoring:
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for attribute, parameter in module._parameters.items():
                holders.setdefault(id(parameter), []).append((module, attribute))
        with ExitStack() as stack:
            stack.enter_context(only_trainable(self.model))
            stack.enter_context(evaluating(self.model))
            for sink in self.sinks:
                mine = holders[id(sink.parameter)]
                if sink.name not in self.dense and all(_is_product(*holder) for holder in mine):
                    for module, _ in mine:
                        module.__dict__["forward"] = partial(_forward, module, sink)
                        stack.callback(module.__dict__.pop, "forward")
                else:
                    self.dense.add(sink.name)
                    sink.parameter.requires_grad_(True)
                    hook = sink.parameter.register_post_accumulate_grad_hook(partial(_take, sink))
                    stack.callback(hook.remove)
            self._left = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()


def _is_product(module: nn.Module, attribute: str) -> bool:
    """Whether the parameter is what a Linear or Conv1D multiplies by, in the forward of its class."""
    return attribute == "weight" and kind_of(module) in ("linear", "conv1d") and "forward" not in module.__dict__


def _take(sink: _Sink, parameter: Tensor) -> None:
    grad = parameter.grad
    assert grad is not None
    found = sink.of_gradient(grad.to_dense() if grad.is_sparse else grad)
    sink.total.grad = found if sink.total.grad is None else sink.total.grad.add_(found)
    parameter.grad = None


def singular_value_gradients(
    model: nn.Module,
    samples: Iterable[Batch],
    factors: Mapping[Matrix, Sequence[Factors]],
    *,
    loss: Loss | None = None,
    progress: bool = True,
) -> tuple[dict[Matrix, Derivatives], float]:
    """Differentiate the mean loss over samples by the singular values of weights; the model is left as it was.

    Equivalent to, in eval mode, but for a Linear or a Conv1D without its weight gradient
        G = the gradient of the mean loss by the weight
        [torch.diagonal(f.u.T @ G[f.rows] @ f.v) for f in factors[matrix]]

    Args:
        model: any torch model; a sparsified one must be restored first. The weight of a Linear or Conv1D that is used
            past the forward of its module, and by it as well, counts with what its module does only.
        samples: batches in Hugging Face form (mappings of tensors with labels), of any size; moved to the model's
            device. A batch counts by the number of its samples.
        factors: for each matrix of `matrices(model)` that is wanted, any number of decompositions, of all of its rows
            or of some.
        loss: function of (model, batch) that returns the mean loss of a batch. Default: the model's own.
        progress: show a progress bar.

    Returns:
        Derivatives of each matrix, and the mean loss.

    Numerics: fp32 accumulation, fp64 for fp64 models; half-precision gradients below the range of the dtype are lost,
    as in any backward without loss scaling. Deterministic on the CPU.
    Cost: a forward, a backward without weight gradients, and for a Linear of M x N with factors of R triplets the
    smaller of 2*T*R*(M + N) and 2*M*N*(T + R) operations for T tokens.

    Raises:
        ValueError: no samples, no factors, a loss that is no finite scalar, or derivatives that are not finite.
    """
    batches = list(samples)
    if not batches:
        raise ValueError("samples holds no batch")
    if torch.is_inference_mode_enabled():
        raise ValueError("there are no gradients within torch.inference_mode(); leave it first")
    if any(is_sparsified(module) for module in model.modules()):
        raise ValueError("model is sparsified, so its weights have no gradients of their own; call restore() first")
    sinks: dict[str, _Sink] = {}
    for matrix, parts in factors.items():
        name = matrix.parameter
        sinks.setdefault(name, _Sink(name, model.get_parameter(name))).matrices.append((matrix, parts))
    if not sinks:
        raise ValueError("factors holds no matrix")
    dense: set[str] = set()
    with torch.enable_grad():
        try:
            mean = _run(model, batches, list(sinks.values()), dense, loss, progress)
        except _Unused as unused:
            dense |= unused.names
            mean = _run(model, batches, list(sinks.values()), dense, loss, progress)
    found: dict[Matrix, Derivatives] = {}
    for sink in sinks.values():
        found |= sink.split()
    return found, mean


class _Unused(Exception):
    """Modules whose forward the first batch did not run: their weights may be read past it."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


def _run(
    model: nn.Module,
    batches: Sequence[Batch],
    sinks: Sequence[_Sink],
    dense: set[str],
    loss: Loss | None,
    progress: bool,
) -> float:
    sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]
    device = sinks[0].parameter.device
    mean = 0.0
    for sink in sinks:
        sink.start()
    with (
        _Scoring(model, sinks, dense),
        tqdm(total=sum(sizes), desc="derivatives", unit="sample", disable=not progress, leave=False) as bar,
    ):
        for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            value = (loss or default_loss)(model, to_device(batch, device))
            check_loss(value, "the matrices", f"batch {number} of samples")
            (value * (size / sum(sizes))).backward()
            mean += float(value.detach()) * size / sum(sizes)
            unused = {sink.name for sink in sinks if sink.total.grad is None} - dense
            if number == 0 and unused:
                raise _Unused(unused)
            bar.update(size)
    return mean
