"""The diagonal of the empirical Fisher information, and per-sample gradient norms, in batched passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..common.names import base_parameters, matching, own_names
from ..common.supported import is_fully_sharded
from ..index import Index
from ..selection import Selection
from ..training.layers import refuse_train_only
from .losses import Batch, Loss
from .per_sample import PerSampleGradients
from .sharded import squares_of_shards

Labels = Literal["given", "expected"]


def fisher_diagonal(
    model: nn.Module,
    samples: Iterable[Batch],
    *,
    loss: Loss | None = None,
    labels: Labels = "given",
    selection: Selection | None = None,
    names: Iterable[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Sum, over samples, the square of each sample's own gradient; the model is not changed.

    Equivalent to this loop in eval mode, but in one batched backward per batch, with no per-sample gradient in memory

        for sample in samples:  # batches of one
            for name, g in zip(names, torch.autograd.grad(model(**sample).loss, parameters)): fisher[name] += g**2

    Args:
        model: any torch model, not under train_only. Linear, GPT-2's Conv1D, Embedding, LayerNorm and RMSNorm are split
            by sample; tied weights count once. Parameters of other modules take one exact backward per sample, and a
            warning names them; so do parameters whose norms differ from autograd's on the first sample, and those whose
            inputs do not have one row of tokens per sample. Of a model under fully_shard, see below.
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
        progress: show a progress bar.

    Returns:
        name -> tensor of the parameter's shape, or index.compact_shape under a selection; fp32 (fp64 for fp64 models),
        on the device of the parameter. A sum over samples, not a mean.

    Under fully_shard this is a collective call: all ranks pass the same samples, and get DTensors, sharded as the
    parameters are. Each sample takes one backward of the whole model, on every rank alike, so more ranks save memory
    and no time. The parameters must require gradients; `selection` and labels="expected" are not possible.

    Numerics: fp32 accumulation, fp64 for fp64 models. Deterministic on the CPU.
    Cost: per batch, a forward, a backward without weight gradients, and for a Linear of M x N and T tokens 2*T*M*N more
    operations; memory for the result. A weight that is used more than once, or tied, is kept until its last use.

    Raises:
        ValueError: no samples, samples without labels or with an empty attention mask, a loss that is not one value per
            sample, names that match nothing, checkpointing with use_reentrant=True, or a gradient that is not finite
            (the message names the sample). Under fully_shard also frozen parameters, ranks with other samples,
            selection, and labels="expected".

    Source: FISH (Sung et al., arXiv 2111.09839), section 3.1.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> samples = [{"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, {"x": torch.tensor([[3.0, 0.0]])}]
        >>> sk.fisher_diagonal(model, samples, loss=lambda model, batch: model(batch["x"])[:, 0])
        {'weight': tensor([[10.,  4.]])}
    """
    sharded = is_fully_sharded(model)
    if sharded and selection is not None:
        raise ValueError("selection is not possible under fully_shard; pass names")
    indices = _indices(model, selection, names)
    batches = list(samples)
    if sharded:
        return squares_of_shards(model, batches, indices, loss, labels, progress)
    totals = {name: zeros_for(model.get_parameter(name), index) for name, index in indices.items()}
    gradients = PerSampleGradients(model, batches, indices, loss, labels)
    gradients.warn_slow(indices)
    gradients.add_squares_(batches, indices, totals, progress)
    return totals


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

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> samples = [{"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}]
        >>> sk.squared_gradient_norms(model, samples, loss=lambda model, batch: model(batch["x"])[:, 0])
        tensor([1., 4.])
    """
    indices = _indices(model, selection, names)
    batches = list(samples)
    gradients = PerSampleGradients(model, batches, indices, loss, labels)
    gradients.warn_slow(indices)
    return gradients.add_squares_(batches, indices, {}, progress)


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
