"""The diagonal of the empirical Fisher information, and per-sample gradient norms, in batched passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..common.messages import listed, warn
from ..common.names import base_parameters, matching, own_names
from ..common.supported import refuse_unsupported_of
from ..index import Index
from ..selection import Selection
from ..training.layers import refuse_train_only
from .losses import Batch, Loss, PerSampleLoss, batch_size, rows_of, to_device
from .per_sample import Collector, Misfit, Trust

Labels = Literal["given", "expected"]


@overload
def fisher_diagonal(
    model: nn.Module,
    samples: Iterable[Batch],
    *,
    loss: Loss | None = ...,
    labels: Labels = ...,
    selection: Selection | None = ...,
    names: Iterable[str] | None = ...,
    return_norms: Literal[False] = ...,
    progress: bool = ...,
) -> dict[str, Tensor]: ...


@overload
def fisher_diagonal(
    model: nn.Module,
    samples: Iterable[Batch],
    *,
    loss: Loss | None = ...,
    labels: Labels = ...,
    selection: Selection | None = ...,
    names: Iterable[str] | None = ...,
    return_norms: Literal[True],
    progress: bool = ...,
) -> tuple[dict[str, Tensor], Tensor]: ...


def fisher_diagonal(
    model: nn.Module,
    samples: Iterable[Batch],
    *,
    loss: Loss | None = None,
    labels: Labels = "given",
    selection: Selection | None = None,
    names: Iterable[str] | None = None,
    return_norms: bool = False,
    progress: bool = True,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], Tensor]:
    """Sum, over samples, the square of each sample's own gradient; the model is not changed.

    Equivalent to the following in eval mode, but with one batched backward per batch and no per-sample gradient in
        memory for sample in samples:  # batches of one
            for name, g in zip(names, torch.autograd.grad(model(**sample).loss, parameters)): fisher[name] += g**2

    Args:
        model: any torch model, not under train_only. Linear, GPT-2's Conv1D, Embedding, LayerNorm and RMSNorm are split
            by sample; tied weights count once. Parameters of other modules take one exact backward per sample, and a
            warning names them; so do parameters whose norms differ from autograd's on the first sample, and those whose
            inputs do not have one row of tokens per sample.
        samples: batches in Hugging Face form (mappings of tensors with labels), of any size; moved to the model's
            device. The result does not depend on the batching.
        loss: function of (model, batch) that returns one loss per sample, [B], without mixing samples; other models in
            it need torch.no_grad(). Default: the model's own loss on each sample alone, which for language models is
            the mean over its labelled tokens; raises if the model's loss cannot be computed from its logits.
        labels: "given", or "expected" for classifiers: sum over classes y of p(y|x) times the square of the gradient of
            log p(y|x); labels are not used then.
        selection: restrict to these positions.
        names: patterns (as in `fnmatch`) of parameter names. Default: the selection's, or all floating-point ones, with
            or without requires_grad, except PEFT's adapters (pass "*lora_*" for those).
        return_norms: also return the squared gradient norm of each sample over the same positions.
        progress: show a progress bar.

    Returns:
        name -> tensor of the parameter's shape, or index.compact_shape under a selection; fp32 (fp64 for fp64 models),
        on the device of the parameter. A sum over samples, not a mean. With return_norms, a pair of this and [samples].

    Numerics: fp32 accumulation, fp64 for fp64 models. Deterministic on the CPU.
    Cost: per batch, a forward, a backward without weight gradients, and for a Linear of M x N and T tokens 2*T*M*N more
    operations; memory for the result. A weight that is used more than once, or tied, is kept until its last use.

    Raises:
        ValueError: no samples, samples without labels or with an empty attention mask, a loss that is not one value per
            sample, names that match nothing, checkpointing with use_reentrant=True, or a gradient that is not finite
            (the message names the sample).

    Source: FISH (Sung et al., arXiv 2111.09839), section 3.1.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> samples = [{"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, {"x": torch.tensor([[3.0, 0.0]])}]
        >>> sk.fisher_diagonal(model, samples, loss=lambda model, batch: model(batch["x"])[:, 0])
        {'weight': tensor([[10.,  4.]])}
    """
    indices = _indices(model, selection, names)
    totals = {name: zeros_for(model.get_parameter(name), index) for name, index in indices.items()}
    batches = list(samples)
    plan = prepare(model, batches, indices, loss, labels)
    say_slow(plan.trust.fallback)
    norms = accumulate(model, batches, indices, totals, plan, progress)
    return (totals, norms) if return_norms else totals


def squared_gradient_norms(
    model: nn.Module,
    samples: Iterable[Batch],
    *,
    loss: Loss | None = None,
    labels: Labels = "given",
    selection: Selection | None = None,
    names: Iterable[str] | None = None,
    progress: bool = True,
) -> Tensor:
    """Compute the squared L2 norm of each sample's own gradient; the model is not changed.

    The same pass as `fisher_diagonal` without its totals: no gradient and no Fisher diagonal is in memory.

    Args:
        model, samples, loss, labels, selection, names, progress: as in `fisher_diagonal`.

    Returns:
        [samples], in the order of the samples; fp32 (fp64 for fp64 models), on the model's device. Deterministic on the
        CPU.

    Raises:
        ValueError: as `fisher_diagonal`.

    Source: Goodfellow, arXiv 1510.01799, for per-sample norms from activations.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> samples = [{"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}]
        >>> sk.squared_gradient_norms(model, samples, loss=lambda model, batch: model(batch["x"])[:, 0])
        tensor([1., 4.])
    """
    indices = _indices(model, selection, names)
    batches = list(samples)
    plan = prepare(model, batches, indices, loss, labels)
    say_slow(plan.trust.fallback)
    return accumulate(model, batches, indices, {}, plan, progress)


def _indices(model: nn.Module, selection: Selection | None, names: Iterable[str] | None) -> dict[str, Index | None]:
    """Name -> the part of the parameter to score, None for all of it."""
    refuse_train_only(model)
    if selection is not None:
        parameters = selection.check(model)
        if not selection:
            raise ValueError("selection is empty: there is no gradient to square")
        if names is not None:
            raise ValueError("give either selection or names")
        own = own_names(model, selection)
        return {own[name]: index.to(parameters[name].device) for name, index in selection.items()}
    floating = [name for name, p in model.named_parameters() if p.is_floating_point()]
    base = set(base_parameters(model))
    chosen = [n for n in floating if n in base] if names is None else matching(floating, names, "names")
    if not chosen:
        raise ValueError("names: no floating-point parameter to score")
    return dict.fromkeys(chosen)


def zeros_for(parameter: Tensor, index: Index | None) -> Tensor:
    """Zeros for a total. On the CPU, pages that nothing is added to (rows of unused tokens) are never allocated."""
    shape = parameter.shape if index is None else index.compact_shape
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, np.float64 if dtype == torch.float64 else np.float32))
    return parameter.new_zeros(shape, dtype=dtype)


@dataclass
class FisherPlan:
    """How to differentiate the samples, and which parameters are split by sample."""

    terms: PerSampleLoss
    trust: Trust


def prepare(
    model: nn.Module, batches: Sequence[Batch], indices: Mapping[str, Index | None], loss: Loss | None, labels: str
) -> FisherPlan:
    """Check the loss and the model on the first batch."""
    if not batches:
        raise ValueError("samples holds no batch")
    if torch.is_inference_mode_enabled():
        raise ValueError("there are no gradients inside torch.inference_mode(); call this outside it")
    refuse_unsupported_of(model, indices)
    sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]
    plan = FisherPlan(PerSampleLoss(loss, labels), Trust())
    with Collector(model, indices, trust=plan.trust) as collector, torch.enable_grad():
        first = to_device(batches[0], collector.device)
        plan.terms.check(model, first)
        twin = rows_of(first, torch.tensor([0, 0]), sizes[0])
        if not collector.check(lambda: plan.terms.terms(model, twin, 2), _length(twin)):
            raise ValueError("loss: no gradient of it reaches any of the chosen parameters")
    return plan


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    indices: Mapping[str, Index | None],
    totals: Mapping[str, Tensor],
    plan: FisherPlan,
    progress: bool,
) -> Tensor:
    """Add the squares of all samples to `totals`, which are zero; return the squared norm of each sample."""
    sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]
    with torch.enable_grad():
        while True:
            known = dict(plan.trust.fallback)
            norms: list[Tensor] = []
            try:
                with (
                    Collector(model, indices, totals, plan.trust) as collector,
                    tqdm(total=sum(sizes), desc="Fisher", unit="sample", disable=not progress, leave=False) as bar,
                ):
                    for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
                        norms.append(
                            _one_batch(collector, plan.terms, to_device(batch, collector.device), size, number)
                        )
                        bar.update(size)
                return torch.cat(norms)
            except Misfit:
                say_slow({name: why for name, why in plan.trust.fallback.items() if name not in known})
                for total in totals.values():
                    total.zero_()


def _one_batch(collector: Collector, terms: PerSampleLoss, batch: Batch, size: int, number: int) -> Tensor:
    model = collector.model
    norms, finite = collector.add(
        lambda: terms.terms(model, batch, size),
        lambda b: terms.terms(model, rows_of(batch, torch.tensor([b]), size), 1),
        size,
        _length(batch),
    )
    if not bool(finite.all()):
        broken = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"samples: the gradient of sample {broken} in batch {number} is not finite")
    return norms


def say_slow(fallback: Mapping[str, str]) -> None:
    """Warn of parameters that take one backward per sample, with the reason."""
    if fallback:
        named = listed(f"{name} ({why})" for name, why in fallback.items())
        warn(f"fisher: {len(fallback)} parameters take one backward per sample, exact but slow: {named}")


def _length(batch: Batch) -> int:
    ids = batch.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else 0
