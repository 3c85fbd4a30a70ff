"""Gradients of the singular values of a model's weights, in one backward that forms no weight gradient of a Linear.

A Linear runs its usual forward; its backward returns the gradient of the singular values instead of the weight's. Other
weights get a dense gradient for a moment, one at a time: those of other modules, of modules whose forward was replaced,
and of modules that the first batch did not run.
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

from ..ops import singular_value_grad, singular_value_grad_linear
from ..structure.layers import kind_of
from ..structure.matrices import Matrix
from ..structure.svd import Factors
from ..training.layers import refuse_train_only
from .eval_mode import in_eval_mode, only_trainable
from .losses import IGNORED, Batch, Loss, batch_size, check_loss, default_loss, rows_of, to_device

AGREES, AGREES_HALF = 1e-2, 0.2  # relative, between the derivatives of a sample in its batch and alone


@dataclass
class Derivatives:
    """Derivatives of the loss by a matrix W = sum of s_i u_i v_i^T with gradient G.

    Attributes:
        values: for each of the factors, dL/ds_i = u_i^T G v_i, [R]; or of each sample's own loss, [samples, R].
        inner: <G, W>, the derivative by a factor of the whole matrix; or of each sample's loss, [samples].
    """

    values: list[Tensor]
    inner: Tensor


@dataclass
class _Sink:
    """Collects the derivatives of one parameter.

    `total` is a Parameter whose gradient they are: [1, derivatives], or [B, derivatives] to keep B samples separate.
    `found` has them batch by batch.
    """

    name: str
    parameter: nn.Parameter
    matrices: list[tuple[Matrix, Sequence[Factors]]] = field(default_factory=list)
    total: nn.Parameter = field(init=False)
    found: list[Tensor] = field(default_factory=list)

    def start(self, samples: int | None) -> None:
        """Begin a batch; samples None: its samples are summed."""
        self.per_sample = samples is not None
        compute_dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        self.total = nn.Parameter(self.parameter.new_zeros((samples or 1, sum(self._sizes())), dtype=compute_dtype))

    def finish(self, scale: float) -> None:
        """End the batch: keep its derivatives, scaled.

        Raises:
            ValueError: they are not finite.
        """
        grad = self.total.detach() if self.total.grad is None else self.total.grad
        if not bool(grad.isfinite().all()):
            raise ValueError(f"samples: the gradient of {self.name!r} is not finite")
        self.found.append(grad * scale)

    def split(self) -> dict[Matrix, Derivatives]:
        """The derivatives collected so far, per matrix."""
        found: dict[Matrix, Derivatives] = {}
        grad = torch.cat(self.found) if self.per_sample else torch.cat(self.found).sum(0)
        pieces = iter(grad.split(self._sizes(), -1))
        for matrix, parts in self.matrices:
            inner, *values = (next(pieces) for _ in range(1 + len(parts)))
            whole = _whole(parts)
            inner = inner.squeeze(-1) if whole is None else (values[whole] * parts[whole].s).sum(-1)
            found[matrix] = Derivatives(values, inner)
        return found

    def _sizes(self) -> list[int]:
        counts = ((_whole(parts) is None, *(len(part.s) for part in parts)) for _, parts in self.matrices)
        return [int(k) for some in counts for k in some]

    def of_gradient(self, grad: Tensor) -> Tensor:
        """The derivatives, from the dense gradient."""
        found = []
        for matrix, parts in self.matrices:
            g = matrix.read(grad)
            if _whole(parts) is None:
                weight = matrix.read(self.parameter)
                found.append((g.to(self.total.dtype) * weight.to(self.total.dtype)).sum()[None])
            found += [singular_value_grad(_rows(g, part, 0), part.u, part.v) for part in parts]
        return torch.cat(found)[None]

    def of_activations(self, grad_output: Tensor, input: Tensor, grad_input: Tensor) -> Tensor:
        """The derivatives from a Linear's output gradient [..., M], input [..., N] and input gradient."""
        samples = len(self.total)
        if samples > 1 and (grad_output.dim() < 2 or len(grad_output) != samples):
            raise _Mixed(self.name)
        dy, x, dx = (t.reshape(samples, -1, t.shape[-1]) for t in (grad_output, input, grad_input))
        found = []
        for matrix, parts in self.matrices:
            grad = dy if matrix.rows is None else dy[..., matrix.rows]
            if _whole(parts) is None:
                # <G, W> = sum over tokens of dY_t^T W X_t, and dY_t^T W is the gradient of the input.
                back = dx if matrix.rows is None else grad @ matrix.read(self.parameter).to(grad.dtype)
                found.append((back.to(self.total.dtype) * x).flatten(1).sum(1, keepdim=True))
            for part in parts:
                values = singular_value_grad_linear(_rows(grad, part, 2), x, part.u, part.v, per_sample=self.per_sample)
                found.append(values if self.per_sample else values[None])
        return torch.cat(found, 1)


def _whole(parts: Sequence[Factors]) -> int | None:
    """The part, if any, that has all rows and all triplets of the matrix: then <G, W> is the sum of s_i dL/ds_i."""
    return next((i for i, part in enumerate(parts) if part.rows is None and part.complete), None)


class _Mixed(Exception):
    """A module whose input does not have one entry per sample: samples must run alone to be separated."""


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
        return grad_input, None, None, ctx.sink.of_activations(grads[0], input, grad_input), None


def _forward(module: Any, sink: _Sink, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward of a Linear or Conv1D under autocast's rules; its one argument may have any name."""
    x: Any
    (x,) = (*args, *kwargs.values())
    weight, bias = module.weight, module.bias
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    matrix = weight.T if kind_of(module) == "conv1d" else weight
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(x, matrix, bias, sink.total, sink)


class _Scoring:
    """A context in which a backward leaves derivatives in the sinks; on exit, the model is as it was.

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
            stack.enter_context(in_eval_mode(self.model))
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
    per_sample: bool = False,
    loss: Loss | None = None,
    progress: bool = True,
) -> tuple[dict[Matrix, Derivatives], float]:
    """Differentiate the mean loss over samples by the singular values of weights; the model is not changed.

    Equivalent to the following in eval mode, but without the weight gradient of a Linear or Conv1D

        G = the gradient of the mean loss by the weight
        [torch.diagonal(f.u.T @ G[f.rows] @ f.v) for f in factors[matrix]]

    Args:
        model: any torch model, not under train_only. If the weight of a Linear or Conv1D is also used outside its
            module's forward, that use is not counted.
        samples: batches in Hugging Face form (mappings of tensors with labels), of any size; moved to the model's
            device. A batch is weighted by its number of samples.
        factors: for each wanted matrix of `matrices(model)`, any number of decompositions, of all of its rows or of
            some.
        per_sample: return the derivatives of each sample's own loss; their mean is that of the mean loss. Batches are
            split if every matrix belongs to a Linear or Conv1D with one entry per sample in dimension 0, and the loss
            is a mean over samples; otherwise samples run one by one, which is slow. To find out, one sample runs alone
            of the first batch and of every batch with unequal numbers of labels.
        loss: function of (model, batch) that returns the mean loss of a batch. Default: the model's own.
        progress: show a progress bar.

    Returns:
        matrix -> Derivatives, whose `values` are one [R] (or [samples, R]) per decomposition; and the mean loss.

    Numerics: fp32 accumulation, fp64 for fp64 models; `inner`, unless factors cover the whole matrix, comes from the
    input's gradient, rounded to its dtype. Half-precision gradients below the range of the dtype are lost, as in any
    backward without loss scaling. Deterministic on the CPU.
    Cost: a forward, a backward without weight gradients, and for a Linear of M x N with factors of R triplets
    2*T*R*(M + N) operations for T tokens, or, not per sample, 2*M*N*(T + R) where that is less.

    Raises:
        ValueError: no samples, no factors, a loss that is not a finite scalar, or derivatives that are not finite.

    Source: Sreeram et al., Compress to Impress, arXiv 2510.20800; without the weight gradient: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> matrix = sk.matrices(model)["0.weight"]
        >>> factors = {matrix: sk.factorize([model[0].weight])}
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> found, mean = sk.singular_value_gradients(model, [{"x": torch.ones(4, 3)}], factors, loss=loss)
        >>> [values.shape for values in found[matrix].values]
        [torch.Size([2])]
    """
    batches = list(samples)
    if not batches:
        raise ValueError("samples holds no batch")
    if torch.is_inference_mode_enabled():
        raise ValueError("there are no gradients inside torch.inference_mode(); call this outside it")
    refuse_train_only(model)
    sinks: dict[str, _Sink] = {}
    for matrix, parts in factors.items():
        name = matrix.parameter
        sinks.setdefault(name, _Sink(name, model.get_parameter(name))).matrices.append((matrix, parts))
    if not sinks:
        raise ValueError("factors holds no matrix")
    sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]
    dense: set[str] = set()
    with torch.enable_grad():
        while True:
            try:
                mean = _run(model, batches, sizes, list(sinks.values()), dense, per_sample, loss, progress)
                break
            except _Unused as unused:
                dense |= unused.names
            except _Mixed:
                pairs = zip(batches, sizes, strict=True)
                batches = [rows_of(b, torch.tensor([i]), size) for b, size in pairs for i in range(size)]
                sizes = [1] * len(batches)
    found: dict[Matrix, Derivatives] = {}
    for sink in sinks.values():
        found |= sink.split()
    return found, mean


class _Unused(Exception):
    """Modules whose forward the first batch did not run: their weights may be used in another way."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


def _run(
    model: nn.Module,
    batches: Sequence[Batch],
    sizes: Sequence[int],
    sinks: Sequence[_Sink],
    dense: set[str],
    per_sample: bool,
    loss: Loss | None,
    progress: bool,
) -> float:
    """Leave the derivatives in the sinks; return the mean loss."""
    device, mean, count = sinks[0].parameter.device, 0.0, sum(sizes)
    for sink in sinks:
        sink.found.clear()
    with (
        _Scoring(model, sinks, dense),
        tqdm(total=count, desc="derivatives", unit="sample", disable=not progress, leave=False) as bar,
    ):
        if per_sample and dense and max(sizes) > 1:
            raise _Mixed
        for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            for sink in sinks:
                sink.start(size if per_sample else None)
            value = (loss or default_loss)(model, to_device(batch, device))
            unused = {sink.name for sink in sinks} - dense
            if number or not unused or not isinstance(value, Tensor) or value.requires_grad:
                check_loss(value, "the matrices", f"batch {number} of samples")
                value.backward()
                unused -= {sink.name for sink in sinks if sink.total.grad is not None}
            if number == 0 and unused:
                raise _Unused(unused)
            mean += float(value.detach()) * size / count
            for sink in sinks:
                sink.finish(size if per_sample else size / count)
            if per_sample and size > 1:
                suspect = _suspect(batch, number == 0)
                if suspect is not None and not _agrees(model, rows_of(batch, suspect, size), suspect, sinks, loss):
                    raise _Mixed
            bar.update(size)
    return mean


def _suspect(batch: Batch, first: bool) -> Tensor | None:
    """A sample [1] to run alone: of texts with unequal numbers of labels the one with the fewest, else any, or None."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        counts = (labels != IGNORED).sum(1)
        if bool((counts != counts[0]).any()):
            return counts.where(counts > 1, counts.max()).argmin()[None]
    return torch.tensor([0]) if first else None


def _agrees(model: nn.Module, alone: Batch, sample: Tensor, sinks: Sequence[_Sink], loss: Loss | None) -> bool:
    """Whether a sample of the last batch has the same derivatives when run alone."""
    for sink in sinks:
        sink.start(1)
    (loss or default_loss)(model, to_device(alone, sinks[0].parameter.device)).backward()
    off = size = 0.0
    for sink in sinks:
        own = sink.total.detach() if sink.total.grad is None else sink.total.grad
        off += float((sink.found[-1][int(sample)] - own[0]).double().square().sum())
        size += float(own.double().square().sum())
    dtype = sinks[0].parameter.dtype
    rounds = dtype.itemsize < 4 or torch.is_autocast_enabled(sinks[0].parameter.device.type)
    return off <= (AGREES_HALF if rounds else AGREES) ** 2 * size
