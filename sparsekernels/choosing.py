"""Which rows, columns or blocks to train: scores of units, and as many of the best as a budget of elements asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common.units import Granularity, Tile, is_cut, matrix_of, num_units, sizes_of, tile_of, tiles_of
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
    """The sum of the scores, or of their squares, in each unit: [number of units], fp32, fp64 for fp64."""
    tile = tile_of(scores.shape, *units_for(scores.shape, units))
    m, n = matrix_of(scores.shape)
    height, width = tile
    x = scores.detach().reshape(-1, m, n)
    if is_cut(scores.shape, tile):
        x = F.pad(x, (0, -n % width, 0, -m % height))
    down, across = tiles_of(scores.shape, tile)
    x = x.to(torch.promote_types(x.dtype, torch.float32)).view(-1, down, height, across, width)
    return (x.square() if square else x).sum((2, 4)).reshape(-1)


def unit_sizes(shape: torch.Size, units: Units, device: torch.device) -> Tensor:
    """The number of elements of each unit, [number of units], int64."""
    tile = tile_of(shape, *units_for(shape, units))
    count = num_units(shape, tile)
    if not is_cut(shape, tile):
        return torch.full((count,), tile[0] * tile[1], device=device)
    rows, columns = sizes_of(torch.arange(count, device=device), shape, tile)
    return rows * columns


def best_units(scores: Sequence[Tensor], sizes: Sequence[Tensor], k: int) -> list[Tensor]:
    """The fewest units, over all tensors, that have k elements or more: sorted positions, for each tensor.

    Those with the largest scores for each element they cost; ties go to the earlier tensor, then to the lower position.
    """
    every = torch.cat(list(sizes))
    order = (torch.cat(list(scores)) / every).sort(descending=True, stable=True).indices
    held = every[order].cumsum(0)
    chosen = order[: int((held < k).sum()) + 1].sort().values
    ends = torch.tensor([len(x) for x in scores], device=chosen.device).cumsum(0)
    bounds = [0, *torch.searchsorted(chosen, ends).tolist()]
    starts = [0, *ends.tolist()]
    return [chosen[bounds[i] : bounds[i + 1]] - starts[i] for i in range(len(scores))]


def sharing_inputs(shapes: Mapping[str, torch.Size]) -> list[list[str]]:
    """The names in groups: those of weights that read one input and have as many columns, and each other by itself."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in shapes:
        path, _, attribute = name.rpartition(".")
        parent, _, module = path.rpartition(".")
        kin = next((i for i, names in enumerate(READ_ONE_INPUT) if module in names), None)
        key = (name,) if kin is None or len(shapes[name]) != 2 else (parent, kin, attribute, shapes[name][1])
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
    """The best units of each tensor, or of all together, by the scores of units; by random ones from a generator."""
    members = sharing_inputs(shapes) if share_inputs else [[name] for name in shapes]
    values, sizes = [], []
    for names in members:
        if isinstance(scores, torch.Generator):
            count = num_units(shapes[names[0]], tile_of(shapes[names[0]], *units_for(shapes[names[0]], units)))
            values.append(torch.rand(count, generator=scores))
        else:
            values.append(torch.stack([scores[name] for name in names]).sum(0))
        sizes.append(torch.stack([unit_sizes(shapes[name], units, values[-1].device) for name in names]).sum(0))
    out: dict[str, Index] = {}
    for group in [[i] for i in range(len(members))] if per_tensor else [list(range(len(members)))]:
        numels = [shapes[name].numel() for i in group for name in members[i]]
        budgets = numels if per_tensor else [sum(numels)]
        for numel in budgets:
            count_for(numel, k, density)  # raises if they are out of range
        wanted = sum(k or max(1, int((density or 0) * numel)) for numel in budgets)
        found = best_units([values[i] for i in group], [sizes[i] for i in group], wanted)
        for i, positions in zip(group, found, strict=True):
            if len(positions):
                out |= {name: Index(positions, shapes[name], *units_for(shapes[name], units)) for name in members[i]}
    return {name: out[name] for name in shapes if name in out}
