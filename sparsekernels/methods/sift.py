"""SIFT: train the entries whose gradient is largest on the first batches (Song et al., arXiv 2312.11875)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..common.names import default_head, default_targets, groups, matching
from ..common.supported import refuse_unsupported_of
from ..index import Index
from ..scoring.eval_mode import only_trainable
from ..scoring.losses import default_loss
from ..scoring.own_forward import OwnForward, refuse_outside, warn_left_out
from ..selection import Selection, count_for
from .gradient_curve import SHARES, GradientCurve

Loss = Callable[[nn.Module, Any], Tensor]


def sift(
    model: nn.Module,
    batches: Iterable[Any],
    density: float = 0.01,
    *,
    targets: Iterable[str] | None = None,
    head: Iterable[str] | None = None,
    num_batches: int = 1,
    loss: Loss | None = None,
    max_gradient_bytes: int = 1 << 30,
    progress: bool = True,
) -> Selection:
    """Select, in each target tensor, the share `density` of entries with the largest |gradient|.

    Per tensor: k = min(int(density * numel) + 1, numel); the gradient is that of the loss summed over the first
    `num_batches` batches. The model's weights, gradients, requires_grad flags and mode are left as they were; the mode
    it is in (train or eval) is the one that is used, and buffers that a forward updates (BatchNorm) are updated.

    Args:
        model: any torch model.
        batches: batches in Hugging Face form (a mapping of tensors with labels), or whatever `loss` takes. Tensors in
            mappings are moved to the device of the model.
        density: share of each target in (0, 1].
        targets: patterns (as in `fnmatch`) of parameter names; default: every weight of two or more dimensions inside
            the numbered blocks, that is attention and MLP projections, frozen ones as well, without embeddings, norms,
            the head, adapters of PEFT, and what is used outside the forward of its module as well, where `train_only`
            cannot train it. A warning names the latter.
        head: patterns of parameters to train densely; default: everything under a module called classifier, score,
            classification_head, qa_outputs or pooler. () for none.
        num_batches: how many batches to sum over.
        loss: function of (model, batch); default `model(**batch).loss`.
        max_gradient_bytes: with num_batches > 1, targets are worked through in groups whose gradients fit in this, each
            group with its own passes over the batches. With one batch a gradient is freed as soon as its entries are
            selected, and this is not used.
        progress: show a progress bar.

    Returns:
        Selection with the targets as elements and the head as all of its rows. `.report["curve"]` is a list of
        (share, carried): the largest `share` of each target's entries carries `carried` of the L2 norm of the gradient
        of all targets, to the resolution of 1/128 in magnitude. `.report["left_out"]`: what was left out of the default
        targets, since it is used outside the forward of its module.

    Raises:
        ValueError: density or num_batches out of range, patterns that match nothing, fewer batches than asked,
            a target that gets no gradient, that is named and used outside the forward of its module, or NaN in one;
            parameters that are sharded or quantised.

    Source: paper, section 3, and the authors' code (rule for k, targets, one batch). Ours: pooler counts as head.
    """
    count_for(1, None, density)
    names = dict(model.named_parameters())
    dense = matching(names, head, "head") if head is not None else default_head(model)
    chosen = matching(names, targets, "targets") if targets is not None else default_targets(model)
    chosen = [name for name in chosen if name not in set(dense)]
    if not chosen:
        raise ValueError("targets: the model has no weights in numbered blocks; name the targets yourself")
    refuse_unsupported_of(model, [*chosen, *dense])
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    first = list(itertools.islice(batches, num_batches))
    if len(first) < num_batches:
        raise ValueError(f"num_batches is {num_batches}, but batches holds only {len(first)}")

    found: dict[str, Index] = {}
    outside: set[str] = set()
    curve = GradientCurve()

    def take(name: str, grad: Tensor) -> None:
        found.update(Selection.topk({name: grad}, density=density, magnitude=True))
        curve.add(grad)
        bar.update()

    with tqdm(total=len(chosen), desc="SIFT: selecting", unit="tensor", disable=not progress, leave=False) as bar:
        for group in (
            groups({name: names[name].nbytes for name in chosen}, max_gradient_bytes) if num_batches > 1 else [chosen]
        ):
            outside |= _gradients(model, {name: names[name] for name in group}, first, loss or default_loss, take)
    missing = [name for name in chosen if name not in found and name not in outside]
    if missing:
        raise ValueError(f"targets that got no gradient: {', '.join(missing[:5])}; leave them out of targets")
    left_out = [name for name in chosen if name in outside]
    chosen = [name for name in chosen if name in found]
    if targets is not None or not chosen:
        refuse_outside(left_out, "targets")
    warn_left_out("sift", left_out)
    selection = Selection(
        {name: found[name] for name in chosen} | {name: Index.full(names[name].shape) for name in dense}
    )
    selection.report = {"curve": curve.points(SHARES), "left_out": left_out}
    return selection


def _gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: list[Any],
    loss: Loss,
    take: Callable[[str, Tensor], None],
) -> set[str]:
    """Call take(name, gradient summed over the batches) for each parameter; with one batch, as soon as it is there.

    Not for those that are used outside their module's forward: their names are returned.
    """
    taken: set[str] = set()
    outside: set[str] = set()

    def hand_over(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if name not in uses.own:  # where checkpointing hides the graph, that at least can be told
            outside.add(name)
        if name not in outside:
            take(name, parameter.grad)
        parameter.grad = None

    def hook(name: str) -> Callable[[Tensor], None]:
        def freed(parameter: Tensor) -> None:
            if name in taken:
                raise RuntimeError(
                    f"the gradient of {name!r} comes in pieces; use checkpointing with use_reentrant=False"
                )
            taken.add(name)
            hand_over(name, parameter)

        return freed

    with only_trainable(model, parameters.values()), torch.enable_grad(), OwnForward(model, parameters) as uses:
        hooks = []
        if len(batches) == 1:
            hooks = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in parameters.items()]
        try:
            for batch in batches:
                value = loss(model, batch)
                outside |= uses.outside(value)
                value.backward()
        finally:
            for handle in hooks:
                handle.remove()
        if len(batches) > 1:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    hand_over(name, parameter)
    return outside
