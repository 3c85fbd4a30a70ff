"""A random mask over the weights that SIFT selects from: the baseline of every other method, and a good one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..common.names import default_head, default_targets, matching
from ..common.units import Granularity, Tile
from ..index import Index
from ..selection import Selection


def random_mask(
    model: nn.Module,
    density: float = 0.05,
    *,
    targets: Iterable[str] | None = None,
    head: Iterable[str] | None = None,
    granularity: Granularity = "column",
    block: Tile | None = None,
    share_inputs: bool = True,
    seed: int = 0,
) -> Selection:
    """Select, in each target tensor, the share `density` of columns (or rows, blocks, entries) uniformly at random.

    Needs no data and no forward, and gives the same Selection in every process with one seed.

    Args:
        model: any torch model, also one that tensor parallelism shards.
        density: share of each target, in (0, 1].
        targets: patterns (as in `fnmatch`) of parameter names. Default: attention and MLP projections, that is every
            weight of two or more dimensions inside numbered blocks, frozen ones included, without embeddings, norms,
            the head and PEFT's adapters. Whether a weight is also used outside its module's forward, which `train_only`
            cannot train, is not noticed.
        head: patterns of parameters to train densely. Default: everything under a module called classifier, score,
            classification_head, qa_outputs or pooler. () for none.
        granularity, block: what is selected of each target; see `sparsekernels.Index`. Columns are input features, but
            in GPT-2's Conv1D, whose weight is transposed, rows are. Of vectors, rows instead of columns and blocks.
        share_inputs: of columns: choose the same ones in weights that read one input (query, key and value; gate and
            up), so that training keeps one copy of these columns for all of them.
        seed: of a CPU generator, so the result does not depend on the device.

    Returns:
        Selection with units of the targets, and the head as all of its rows, on the CPU. Deterministic for a given
        seed.

    Raises:
        ValueError: density out of range, patterns that match nothing, or a granularity or block that does not fit.

    Source: random masks, Xu and Zhang, arXiv 2405.02596; columns, S2FT (Yang et al., arXiv 2412.06289). Ours: the
    defaults; targets and head are those of `sift`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.ReLU(), torch.nn.Linear(8, 20))
        >>> sk.methods.random_mask(model, density=0.1)["0.weight"]
        Index(2 columns of [8, 20])
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    dense = matching(shapes, head, "head") if head is not None else default_head(model)
    chosen = matching(shapes, targets, "targets") if targets is not None else default_targets(model)
    chosen = [name for name in chosen if name not in set(dense)]
    if not chosen:
        raise ValueError("targets: the model has no weights in numbered blocks; pass targets")
    selection = Selection.random(
        shapes,
        density,
        seed=seed,
        names=chosen,
        granularity=granularity,
        block=block,
        share_inputs=share_inputs,
    )
    return selection | Selection({name: Index.full(shapes[name]) for name in dense})
