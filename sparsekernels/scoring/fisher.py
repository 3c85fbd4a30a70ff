"""The diagonal of the empirical Fisher information, and per-sample gradient norms, in batched passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..common.names import base_parameters, matching, own_names
from ..index import Index
from ..selection import Selection
from ..training.layers import refuse_train_only
from .losses import Batch, Loss
from .per_sample import PerSampleGradients

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
    """Add up, over samples, the square of each sample's own gradient; the model is left as it was.

    Equivalent to, in eval mode, but in one batched backward a batch and without any per-sample gradient in memory
        for sample in samples:  # batches of one
            for name, g in zip(names, torch.autograd.grad(model(**sample).loss, parameters)): fisher[name] += g**2

    Args:
        model: any torch model; one under train_only must be restored first. Linear, GPT-2's Conv1D, Embedding,
            LayerNorm and RMSNorm are split by sample; tied weights count once. Parameters of any other module take an
            exact backward for each sample, and a warning names them, as do those whose norms differ from autograd's on
            the first sample, or whose inputs have not one row of tokens a sample.
        samples: batches in Hugging Face form (mappings of tensors with labels), of any size; moved to the model's
            device. The result does not depend on how samples are batched.
        loss: function of (model, batch) that returns one loss for each sample, [B], without mixing them; other models
            in it need torch.no_grad(). Default: the model's own loss on each sample alone, which for language models
            is the mean over its labelled tokens; a model with another loss than its logits tell is refused.
        labels: "given", or "expected" for classifiers: sum over classes y of p(y|x) times the square of the gradient of
            log p(y|x); labels are not used then.
        selection: restrict to these positions.
        names: patterns (as in `fnmatch`) of parameter names; default: all floating-point ones, whatever requires_grad
            says, without the adapters of PEFT (name these, "*lora_*", to have theirs); or the selection's.
        progress: show a progress bar.

    Returns:
        name -> tensor of the parameter's shape, or index.compact_shape under a selection; fp32 (fp64 for fp64 models),
        on the device of the parameter. It is a sum over samples, not a mean.

    Numerics: fp32 accumulation, fp64 for fp64 models. Deterministic on the CPU.
    Cost: for each batch a forward and a backward without weight gradients, and for a Linear of M x N 2*T*M*N operations
    more for T tokens; F itself. A weight that is used more than once, tied ones included, is kept until its last use.

    Raises:
        ValueError: no samples, samples without labels or with an empty attention mask, a loss that is not one value a
            sample, names that match nothing, checkpointing with use_reentrant=True, or a gradient that is not finite:
            the sample is named.

    Source: FISH (Sung et al., arXiv 2111.09839), section 3.1.
    """
    indices = _indices(model, selection, names)
    totals = {name: zeros_for(model.get_parameter(name), index) for name, index in indices.items()}
    batches = list(samples)
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
    """Compute the squared L2 norm of each sample's own gradient, over all parameters or over a selection.

    The same pass as `fisher_diagonal`, without its totals: neither gradients nor Fisher are in memory.

    Args and Raises: as `fisher_diagonal`.

    Returns:
        [samples], in the order of the samples; fp32 (fp64 for fp64 models), on the model's device.
    """
    indices = _indices(model, selection, names)
    batches = list(samples)
    gradients = PerSampleGradients(model, batches, indices, loss, labels)
    gradients.warn_slow(indices)
    return gradients.add_squares_(batches, indices, {}, progress)


def _indices(model: nn.Module, selection: Selection | None, names: Iterable[str] | None) -> dict[str, Index | None]:
    """Name -> the part of the parameter that counts, None for the whole."""
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
        raise ValueError("names: no parameter is left")
    return dict.fromkeys(chosen)


def zeros_for(parameter: Tensor, index: Index | None) -> Tensor:
    """On the CPU pages that nothing is added to, such as rows of tokens that never occur, are never made."""
    shape = parameter.shape if index is None else index.compact_shape
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, np.float64 if dtype == torch.float64 else np.float32))
    return parameter.new_zeros(shape, dtype=dtype)
