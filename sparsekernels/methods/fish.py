"""FISH Mask: train the entries with the largest Fisher information (Sung et al., arXiv 2111.09839)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..common.supported import is_fully_sharded
from ..common.units import Granularity, Tile
from ..scoring.fisher import Labels, fisher_diagonal
from ..scoring.losses import Batch, Loss, batch_size
from ..selection import Selection
from .fisher_search import MAX_FISHER_BYTES, Search, budget, take, top_of_shards, with_head


def fish(
    model: nn.Module,
    samples: Iterable[Batch],
    density: float = 0.005,
    *,
    num_samples: int | None = 1024,
    labels: Labels = "given",
    targets: Iterable[str] | None = None,
    head: Iterable[str] | None = None,
    granularity: Granularity = "element",
    block: Tile | None = None,
    loss: Loss | None = None,
    max_fisher_bytes: int = MAX_FISHER_BYTES,
    progress: bool = True,
) -> Selection:
    """Select, over all tensors together, the entries with the largest diagonal Fisher information.

    One global top-k with k = int(density * numel of the model) - numel of the head: the head trains densely and counts
    against the budget. The Fisher information is a sum over samples of squared per-sample gradients, in eval mode. The
    model is not changed.

    Args:
        model, samples, labels, loss: as in `sparsekernels.fisher_diagonal`, also for a model under fully_shard: all
            ranks pass the same samples and get the same Selection, and what is used outside its module's forward is not
            noticed.
        density: share of all parameters of the model that train, head included, in (0, 1]. Adapters do not count.
        num_samples: use only the first `num_samples` samples; None for all.
        targets: patterns (as in `fnmatch`) of the parameters that compete. Default: all but the head, including
            embeddings, biases, norms and frozen parameters, without PEFT's adapters. Weights that are also used outside
            their module's forward, which `train_only` cannot train, are left out too, with a warning.
        head: patterns of parameters to train densely. Default: everything under a module called classifier, score,
            classification_head, qa_outputs or pooler. () for none.
        granularity, block: what is selected of the targets; see `sparsekernels.Index`. The score of a row, column or
            block is the Fisher information of its entries, summed; those that carry most for each entry they cost are
            selected, as many as it takes to have k entries.
        max_fisher_bytes: targets are processed in groups whose Fisher diagonals fit in this, each group with its own
            passes over the samples; the best k so far are kept. The result does not depend on it.
        progress: show a progress bar.

    Returns:
        Selection with units of the targets, and the head as all of its rows. `.report` has "samples", their number;
        "carried", the share of the Fisher information of all targets that the selection carries; "left_out", the
        default targets that were left out.

    Raises:
        ValueError: density out of (0, 1] or used up by the head, patterns that match nothing, named targets that are
            also used outside their module's forward, and all that `fisher_diagonal` raises.

    Numerics: as `fisher_diagonal`; ties go to the lower position. Deterministic on the CPU.

    Source: FISH (Sung et al., arXiv 2111.09839) and the authors' code (global top-k, budget, eval mode, density, 1024
    samples). Ours: groups; rows, columns and blocks.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> samples = [{"x": torch.randn(16, 4)}]
        >>> loss = lambda model, batch: model(batch["x"]).square().sum(1)  # one loss per sample
        >>> selection = sk.methods.fish(model, samples, density=0.1, loss=loss)
        >>> selection.numel, selection.report["samples"]
        (4, 16)
    """
    batches, units = take(samples, num_samples), (granularity, block)
    count = sum(batch_size(batch, i) for i, batch in enumerate(batches))
    left_out: list[str] = []
    if is_fully_sharded(model):
        names, dense, k = budget(model, density, targets, head, units)
        totals = fisher_diagonal(model, batches, loss=loss, labels=labels, names=names, progress=progress)
        chosen, carried = top_of_shards(totals, units, k)
        selection = with_head(model, chosen, dense)
    else:
        search = Search.start(
            "fish", model, batches, density, targets, head, units, loss, labels, max_fisher_bytes, progress
        )
        chosen, carried = search.top(batches, search.everything, search.k)
        selection, left_out = search.selection(chosen), search.left_out
    selection.report = {"samples": count, "carried": carried, "left_out": left_out}
    return selection
