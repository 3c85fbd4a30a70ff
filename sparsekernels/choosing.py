"""Which rows, columns or blocks to train: scores of units, and as many of the best as a budget of elements asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .common.shards import Cut
from .common.supported import is_dtensor, local_of
from .common.units import Granularity, Tile, is_cut, num_units, sizes_of, tile_of, tiled
from .index import Index

Units = tuple[Granularity, Tile | None]  # granularity and block, as `Index` takes them

# Modules of one parent that read one input, by their names in transformers and in models' own code.
READ_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)

# Attention whose query reads another input than its key and value, in lower case.
CROSS_ATTENTION = ("encdec", "encoder_attn", "cross")


def count_for(numel: int, k: int | None, density: float | None) -> int:
    """The number of elements that `k` or `density` asks for out of `numel`; a density by the rule of SIFT's code."""
    if (k is None) == (density is None):
        raise ValueError(f"give either k or density, got k={k} and density={density}")
    if k is not None:
        if not 0 < k <= numel:
            raise ValueError(f"k must lie in [1, {numel}], got {k}")
        return k
    assert density is not None
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    return min(int(density * numel) + 1, numel)


def units_for(shape: torch.Size, units: Units) -> Units:
    """What `Index` takes for a tensor of this shape: vectors have neither columns nor blocks, so rows of them."""
    tile_of(torch.Size((1, 1)), *units)  # raises for what no tensor has
    if units[0] == "element" or len(shape) >= 2:
        return units
    return ("row", None) if shape else ("element", None)


def unit_scores(scores: Tensor, units: Units, *, square: bool) -> Tensor:
    """The sum of the scores, or of their squares, in each unit: [number of units], fp64.

    Of a DTensor cut along dimension 0 this is a collective call, with the same result on every rank.
    """
    if is_dtensor(scores):
        return _scores_over_ranks(scores, units, square)
    each = tiled(scores.detach(), tile_of(scores.shape, *units_for(scores.shape, units)))
    if square:
        return torch.linalg.vector_norm(each, dim=(1, 2), dtype=torch.float64).square()
    return each.sum((1, 2), dtype=torch.float64)


def _scores_over_ranks(scores: Any, units: Units, square: bool) -> Tensor:
    """Each rank adds up its rows; units that are cut between ranks get their sums from several."""
    cut, shape = Cut.of(scores, "a score"), scores.shape
    units, local = units_for(shape, units), local_of(scores)
    total = torch.zeros(num_units(shape, tile_of(shape, *units)), dtype=torch.float64, device=local.device)
    if len(shape) == 2 and units[0] == "block":
        height, width = tile_of(shape, *units)
        begin = cut.first // height * -(-shape[1] // width)
        local, units = F.pad(local, (0, 0, cut.first % height, 0)), ("block", (height, width))
    else:
        begin = 0 if len(shape) == 2 and units[0] == "column" else cut.first * (len(total) // max(1, shape[0]))
    if local.numel():
        mine = unit_scores(local, units, square=square)
        total[begin : begin + len(mine)] = mine
    dist.all_reduce(total, group=cut.group)
    return total


def unit_sizes(shape: torch.Size, units: Units, device: torch.device) -> Tensor:
    """The number of elements of each unit, [number of units], int64."""
    tile = tile_of(shape, *units_for(shape, units))
    count = num_units(shape, tile)
    if not is_cut(shape, tile):
        return torch.full((count,), tile[0] * tile[1], device=device)
    rows, columns = sizes_of(torch.arange(count, device=device), shape, tile)
    return rows * columns


def best_units(keys: Sequence[Tensor], sizes: Sequence[Tensor], k: int) -> list[Tensor]:
    """As many units of the largest keys, over all tensors, as it takes to have k elements: sorted positions of each.

    Ties go to the earlier tensor, then to the lower position.
    """
    order = torch.cat(list(keys)).sort(descending=True, stable=True).indices
    held = torch.cat(list(sizes))[order].cumsum(0)
    chosen = order[: int((held < k).sum()) + 1].sort().values
    ends = torch.tensor([len(x) for x in keys], device=chosen.device).cumsum(0)
    bounds = [0, *torch.searchsorted(chosen, ends).tolist()]
    starts = [0, *ends.tolist()]
    return [chosen[bounds[i] : bounds[i + 1]] - starts[i] for i in range(len(keys))]


def sharing_inputs(shapes: Mapping[str, torch.Size]) -> list[list[str]]:
    """The names in groups: those of weights that read one input and have as many columns, and each other by itself."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in shapes:
        path, _, attribute = name.replace(".base_layer.", ".").rpartition(".")  # PEFT puts the layer inside another
        parent, _, module = path.rpartition(".")
        kin = next((i for i, names in enumerate(READ_ONE_INPUT) if module in names), None)
        crossed = any(word in parent.lower() for word in CROSS_ATTENTION)
        key = (name,) if kin is None or crossed or len(shapes[name]) != 2 else (parent, kin, attribute, shapes[name][1])
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def choose_units(
    shapes: Mapping[str, torch.Size],
    scores: Mapping[str, Tensor] | torch.Generator,
    units: Units,
    *,
    k: int | None = None,
    density: float | None = None,
    per_tensor: bool = True,
    share_inputs: bool = False,
) -> dict[str, Index]:
    """The best units of each tensor, or of all together: those with most for each element they cost, or random ones."""
    shapes = {name: shape for name, shape in shapes.items() if shape.numel()}
    members = sharing_inputs(shapes) if share_inputs else [[name] for name in shapes]
    keys, sizes = [], []
    for names in members:
        device = torch.device("cpu") if isinstance(scores, torch.Generator) else scores[names[0]].device
        sizes.append(torch.stack([unit_sizes(shapes[name], units, device) for name in names]).sum(0))
        if isinstance(scores, torch.Generator):
            keys.append(torch.rand(len(sizes[-1]), generator=scores))
        else:
            keys.append(torch.stack([scores[name] for name in names]).sum(0) / sizes[-1])
    out: dict[str, Index] = {}
    for group in [[i] for i in range(len(members))] if per_tensor else [list(range(len(members)))]:
        numels = [shapes[name].numel() for i in group for name in members[i]]
        budgets = numels if per_tensor else [sum(numels)]
        for numel in budgets:
            count_for(numel, k, density)  # raises if they are out of range
        wanted = sum(k or max(1, int((density or 0) * numel)) for numel in budgets)
        found = best_units([keys[i] for i in group], [sizes[i] for i in group], wanted)
        for i, positions in zip(group, found, strict=True):
            if len(positions):
                out |= {name: Index(positions, shapes[name], *units_for(shapes[name], units)) for name in members[i]}
    return {name: out[name] for name in shapes if name in out}
