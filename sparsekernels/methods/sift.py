"""SIFT: train the entries whose gradient is largest on the first batches (Song et al., arXiv 2312.11875)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..choosing import choose_units, count_for, unit_scores
from ..common.names import default_head, default_targets, groups, matching
from ..common.supported import holds_nan, is_fully_sharded, refuse_unsupported_of
from ..common.units import Granularity, Tile, tile_of
from ..index import Index
from ..scoring.eval_mode import only_trainable
from ..scoring.losses import default_loss
from ..scoring.own_forward import OwnForward, refuse_outside, warn_left_out
from ..selection import Selection
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
    granularity: Granularity = "element",
    block: Tile | None = None,
    share_inputs: bool = False,
    loss: Loss | None = None,
    max_gradient_bytes: int = 1 << 30,
    progress: bool = True,
) -> Selection:
    """Select, in each target tensor, the share `density` of entries with the largest |gradient|.

    Per tensor: k = min(int(density * numel) + 1, numel), or as many rows, columns or blocks, of the largest sums of
    squares, as it takes to have density * numel entries; the gradient is that of the loss summed over the first
    `num_batches` batches. Weights, gradients, requires_grad and the model's mode do not change. The forward runs in the
    current mode (train or eval); buffers that a forward updates (BatchNorm) are updated.

    Args:
        model: any torch model; one under fully_shard must be all trainable. This is a collective call then: each rank
            gives its own batches, and all get the same Selection. What is used outside its module's forward is not
            noticed there.
        batches: batches in Hugging Face form (mappings of tensors with labels), or whatever `loss` accepts. Tensors in
            mappings are moved to the model's device.
        density: share of each target, in (0, 1].
        targets: patterns (as in `fnmatch`) of parameter names. Default: attention and MLP projections, that is every
            weight of two or more dimensions inside numbered blocks, frozen ones included, without embeddings, norms,
            the head and PEFT's adapters. Weights that are also used outside their module's forward, which `train_only`
            cannot train, are left out too, with a warning.
        head: patterns of parameters to train densely. Default: everything under a module called classifier, score,
            classification_head, qa_outputs or pooler. () for none.
        num_batches: number of batches to sum over.
        granularity, block: what is selected of each target; see `sparsekernels.Index`.
        share_inputs: of columns: the same ones, by the sum of their scores, in weights that read one input (query, key
            and value; gate and up), so that training keeps one copy of these columns for all of them.
        loss: function of (model, batch). Default: `model(**batch).loss`.
        max_gradient_bytes: with num_batches > 1, targets are processed in groups whose gradients fit in this, each
            group with its own passes over the batches. With one batch, each gradient is freed once its entries are
            selected, and this is not used.
        progress: show a progress bar.

    Returns:
        Selection with units of the targets, and the head as all of its rows. `.report["curve"]` is a list of
        (share, carried): the largest `share` of each target's entries carries `carried` of the L2 norm of the gradient
        of all targets, to a resolution of 1/128 in magnitude. `.report["left_out"]`: the default targets that were left
        out.

    Raises:
        ValueError: density or num_batches out of range, patterns that match nothing, fewer batches than num_batches, a
            target without a gradient or with NaN in it, a named target that is also used outside its module's forward,
            or parameters that are sharded or quantised.
        RuntimeError: reentrant gradient checkpointing.

    Numerics: gradients as the model's backward gives them; ties go to the lower position. Deterministic if the model
    is.

    Source: SIFT (Song et al., arXiv 2312.11875), section 3, and the authors' code (rule for k, targets, one batch).
    Ours: the pooler counts as head; rows, columns and blocks.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [torch.randn(16, 4)]
        >>> sk.methods.sift(model, batches, density=0.1, loss=lambda model, x: model(x).square().mean())
        Selection(6 elements of 2 tensors)
    """
    count_for(1, None, density)
    tile_of(torch.Size((1, 1)), granularity, block)
    if share_inputs and granularity != "column":
        raise ValueError(f'share_inputs is for granularity="column", got {granularity!r}')
    names = dict(model.named_parameters())
    dense = matching(names, head, "head") if head is not None else default_head(model)
    chosen = matching(names, targets, "targets") if targets is not None else default_targets(model)
    chosen = [name for name in chosen if name not in set(dense)]
    if not chosen:
        raise ValueError("targets: the model has no weights in numbered blocks; pass targets")
    sharded = is_fully_sharded(model)
    if not sharded:
        refuse_unsupported_of(model, [*chosen, *dense])
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    first = list(itertools.islice(batches, num_batches))
    if len(first) < num_batches:
        raise ValueError(f"num_batches is {num_batches}, but batches has only {len(first)}")

    found: dict[str, Index] = {}
    scores: dict[str, Tensor] = {}  # of units
    outside: set[str] = set()
    curve = GradientCurve()

    def take(name: str, grad: Tensor) -> None:
        if granularity == "element":
            found.update(Selection.topk({name: grad}, density=density, magnitude=True))
        elif holds_nan(grad):
            raise ValueError(f"the gradient of {name!r} holds NaN")
        else:
            scores[name] = unit_scores(grad, (granularity, block), square=True)
        curve.add(grad)
        bar.update()

    with tqdm(total=len(chosen), desc="SIFT: selecting", unit="tensor", disable=not progress, leave=False) as bar:
        if sharded:
            _sharded_gradients(model, {name: names[name] for name in chosen}, first, loss or default_loss, take)
            parts: Iterable[list[str]] = ()
        elif num_batches > 1:
            parts = groups({name: names[name].nbytes for name in chosen}, max_gradient_bytes)
        else:
            parts = [chosen]
        for group in parts:
            outside |= _gradients(model, {name: names[name] for name in group}, first, loss or default_loss, take)
    shapes = {name: names[name].shape for name in scores}
    found |= choose_units(shapes, scores, (granularity, block), density=density, share_inputs=share_inputs)
    missing = [name for name in chosen if name not in found and name not in outside]
    if missing:
        raise ValueError(f"targets without a gradient: {', '.join(missing[:5])}; leave them out of targets")
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


def _sharded_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: list[Any],
    loss: Loss,
    take: Callable[[str, Tensor], None],
) -> None:
    """Call take(name, gradient) for each parameter of a model under fully_shard: the mean over ranks, a DTensor."""
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if frozen:
        raise ValueError(f"{frozen[0]!r} is frozen: under fully_shard sift needs a model that is all trainable")
    before = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.grad = None
        for batch in batches:
            loss(model, batch).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                take(name, parameter.grad)
    finally:
        for p, grad in before:
            p.grad = grad


def _gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: list[Any],
    loss: Loss,
    take: Callable[[str, Tensor], None],
) -> set[str]:
    """Call take(name, gradient summed over the batches) for each parameter; with one batch, as soon as it is computed.

    Parameters used outside their module's forward are skipped; their names are returned.
    """
    taken: set[str] = set()
    outside: set[str] = set()

    def hand_over(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if name not in uses.own:  # detected even where checkpointing hides the graph
            outside.add(name)
        if name not in outside:
            take(name, parameter.grad)
        parameter.grad = None

    def hook(name: str) -> Callable[[Tensor], None]:
        def freed(parameter: Tensor) -> None:
            if name in taken:
                raise RuntimeError(
                    f"the gradient of {name!r} arrives in pieces; use checkpointing with use_reentrant=False"
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
