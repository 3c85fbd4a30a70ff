"""FISH Mask: train the entries with the largest Fisher information (Sung et al., arXiv 2111.09839)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..scoring.fisher import Labels
from ..scoring.losses import Batch, Loss, batch_size
from ..selection import Selection
from .fisher_search import MAX_FISHER_BYTES, Search, take


def fish(
    model: nn.Module,
    samples: Iterable[Batch],
    density: float = 0.005,
    *,
    num_samples: int | None = 1024,
    labels: Labels = "given",
    targets: Iterable[str] | None = None,
    head: Iterable[str] | None = None,
    loss: Loss | None = None,
    max_fisher_bytes: int = MAX_FISHER_BYTES,
    progress: bool = True,
) -> Selection:
    """Select, over all tensors together, the entries with the largest diagonal Fisher information.

    One global top-k: k = int(density * numel of the model) - numel of the head, which trains densely and is charged to
    the budget. The Fisher information is a sum over samples of squared per-sample gradients, in eval mode. The model is
    left as it was.

    Args:
        model, samples, labels, loss: as in `sparsekernels.fisher_diagonal`.
        density: share of all parameters of the model that train, head included, in (0, 1]. Adapters do not count.
        num_samples: the first so many samples are used; None for all.
        targets: patterns (as in `fnmatch`) of the parameters that compete; default: all but the head, embeddings,
            biases and norms too, frozen ones as well, without the adapters of PEFT, and without what is used outside
            the forward of its module as well, where `train_only` cannot train it. A warning names the latter.
        head: patterns of parameters to train densely; default: everything under a module called classifier, score,
            classification_head, qa_outputs or pooler. () for none.
        max_fisher_bytes: targets are worked through in groups whose Fisher diagonals fit in this, each group with its
            own passes over the samples; the best k so far are carried along. The result does not depend on it.
        progress: show a progress bar.

    Returns:
        Selection with elements of the targets, and the head as all of its rows. `.report` holds the number of
        "samples", "carried", the share of the Fisher information of all targets that the selection carries, and
        "left_out", what was left out of the default targets, since it is used outside the forward of its module.

    Raises:
        ValueError: density out of (0, 1] or used up by the head, patterns that match nothing, targets that are named
            and used outside the forward of their module, and all that `fisher_diagonal` raises.

    Source: paper and the authors' code (global top-k, budget, eval mode, density, 1024 samples). Ours: groups.
    """
    batches = take(samples, num_samples)
    search = Search.start("fish", model, batches, density, targets, head, loss, labels, max_fisher_bytes, progress)
    chosen, carried = search.top(batches, search.everything, search.k)
    selection = search.selection(chosen)
    count = sum(batch_size(batch, i) for i, batch in enumerate(batches))
    selection.report = {"samples": count, "carried": carried, "left_out": search.left_out}
    return selection
