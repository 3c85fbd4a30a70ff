"""The search for the largest Fisher information: FISH Mask runs it once, IRD many times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..choosing import Units, best_units, unit_scores, unit_sizes, units_for
from ..common.names import base_parameters, default_head, groups, matching
from ..common.shards import Cut
from ..common.supported import local_of
from ..common.units import num_units, tile_of
from ..index import Index
from ..ops import gather, topk
from ..scoring.fisher import Labels, zeros_for
from ..scoring.losses import Batch, Loss, batch_size, rows_of
from ..scoring.own_forward import refuse_outside, warn_left_out
from ..scoring.per_sample import PerSampleGradients
from ..selection import Selection
from ..training.sharding import held_of

MAX_FISHER_BYTES = 4 << 30


def take(samples: Iterable[Batch], limit: int | None) -> list[Batch]:
    """The batches up to this many samples; the last one is cut."""
    if limit is not None and limit < 1:
        raise ValueError(f"num_samples must be at least 1, got {limit}")
    taken: list[Batch] = []
    left = limit
    for number, batch in enumerate(samples):
        size = batch_size(batch, number)
        if left is not None and size >= left:
            taken.append(rows_of(batch, torch.arange(left), size))
            return taken
        taken.append(batch)
        left = None if left is None else left - size
    return taken


@dataclass
class Search:
    """The part that FISH and IRD share: the budget, and the best k entries of a set by Fisher information.

    everything: name -> None (the whole tensor) for each target. units: granularity and block. k: number of entries to
    select. left_out: names excluded from the default targets, because they are used outside their module's forward.
    """

    model: nn.Module
    everything: dict[str, Index | None]
    head: list[str]
    units: Units
    k: int
    max_bytes: int
    gradients: PerSampleGradients
    progress: bool
    left_out: list[str]

    @classmethod
    def start(
        cls,
        method: str,
        model: nn.Module,
        batches: Sequence[Batch],
        density: float,
        targets: Iterable[str] | None,
        head: Iterable[str] | None,
        units: Units,
        loss: Loss | None,
        labels: Labels,
        max_fisher_bytes: int,
        progress: bool,
    ) -> Search:
        chosen, dense, k = budget(model, density, targets, head, units)
        gradients = PerSampleGradients(model, batches, dict.fromkeys(chosen), loss, labels)
        left_out = [name for name in chosen if name in gradients.outside]
        everything: dict[str, Index | None] = dict.fromkeys(name for name in chosen if name not in gradients.outside)
        if targets is not None or not everything:
            refuse_outside(left_out, "targets")
        k = min(k, sum(model.get_parameter(name).numel() for name in everything))
        warn_left_out(method, left_out)
        gradients.warn_slow(everything)
        return cls(model, everything, dense, units, k, max_fisher_bytes, gradients, progress, left_out)

    def numel(self, name: str, index: Index | None) -> int:
        return self.model.get_parameter(name).numel() if index is None else index.numel

    def top(
        self, batches: Sequence[Batch], among: Mapping[str, Index | None], k: int
    ) -> tuple[dict[str, Index], float]:
        """The k entries with the largest Fisher information, and the share of all of it that they carry.

        Of larger units than elements, as many of the best as it takes to have k entries.
        """
        kept: dict[str, tuple[Index, Tensor]] = {}
        whole = 0.0
        sizes = {name: 4 * self.numel(name, index) for name, index in among.items()}
        for group in groups(sizes, self.max_bytes):
            totals = {name: zeros_for(self.model.get_parameter(name), among[name]) for name in group}
            self.gradients.add_squares_(batches, {name: among[name] for name in group}, totals, self.progress)
            whole += sum(float(total.sum(dtype=torch.float64)) for total in totals.values())
            names = [*kept, *group]
            scores = [kept[name][1] if name in kept else self._scores(totals[name], among[name]) for name in names]
            befores = [kept[name][0] if name in kept else self.index_of(name, among[name]) for name in names]
            for name, before, score, chosen in zip(names, befores, scores, self._best(scores, befores, k), strict=True):
                kept[name] = before.with_positions(before.positions[chosen]), score.reshape(-1)[chosen]
        carried = sum(float(score.sum(dtype=torch.float64)) for _, score in kept.values())
        return {name: index for name, (index, _) in kept.items() if len(index)}, carried / whole if whole else 0.0

    def index_of(self, name: str, index: Index | None) -> Index:
        """The Index, or every unit of a target."""
        if index is not None:
            return index
        parameter = self.model.get_parameter(name)
        units = units_for(parameter.shape, self.units)
        count = num_units(parameter.shape, tile_of(parameter.shape, *units))
        return Index(torch.arange(count, device=parameter.device), parameter.shape, *units)

    def _scores(self, total: Tensor, index: Index | None) -> Tensor:
        """One score for each unit."""
        if self.units[0] == "element":
            return total
        if index is None:
            return unit_scores(total, self.units, square=False)
        return index.by_unit(total).reshape(len(index), -1).sum(1, dtype=torch.float64)

    def _best(self, scores: Sequence[Tensor], indices: Sequence[Index], k: int) -> list[Tensor]:
        """Which of the units of each tensor are among the best, that have k entries together."""
        if self.units[0] == "element":
            return topk(scores, min(k, sum(score.numel() for score in scores)))
        sizes = [
            unit_sizes(i.shape, self.units, s.device)[i.positions.long()] for i, s in zip(indices, scores, strict=True)
        ]
        return best_units([score / size for score, size in zip(scores, sizes, strict=True)], sizes, k)

    def selection(self, chosen: Mapping[str, Index]) -> Selection:
        """The chosen entries, and the head."""
        return with_head(self.model, chosen, self.head)


def budget(
    model: nn.Module, density: float, targets: Iterable[str] | None, head: Iterable[str] | None, units: Units
) -> tuple[list[str], list[str], int]:
    """Names of the targets and of the head, and how many entries of the targets `density` leaves."""
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    units_for(torch.Size((1, 1)), units)
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    dense = default_head(model) if head is None else matching(parameters, head, "head")
    base = [name for name in base_parameters(model) if name in parameters]
    chosen = base if targets is None else matching(parameters, targets, "targets")
    chosen = [name for name in chosen if name not in set(dense)]
    total = sum(parameters[name].numel() for name in {*base, *dense})
    charged, available = sum(parameters[n].numel() for n in dense), sum(parameters[n].numel() for n in chosen)
    k = min(int(total * density) - charged, available)
    if not chosen:
        raise ValueError("targets: all of them belong to the head, which trains densely; nothing to select")
    if k < 1:
        raise ValueError(
            f"density {density} of {total:,} weights leaves none besides the {charged:,} of the head, which train "
            "densely; raise density, or pass a smaller head"
        )
    return chosen, dense, k


def with_head(model: nn.Module, chosen: Mapping[str, Index], head: Iterable[str]) -> Selection:
    """The chosen entries, and every row of the head."""
    return Selection({**chosen, **{name: Index.full(model.get_parameter(name).shape) for name in head}})


def top_of_shards(totals: Mapping[str, Any], units: Units, k: int) -> tuple[dict[str, Index], float]:
    """As `Search.top`, of the Fisher information of a model under fully_shard: DTensors. A collective call."""
    if units[0] == "element":
        positions = topk(list(totals.values()), k)
    else:
        scores = [unit_scores(total, units, square=False) for total in totals.values()]
        sizes = [unit_sizes(x.shape, units, s.device) for x, s in zip(totals.values(), scores, strict=True)]
        positions = best_units([score / size for score, size in zip(scores, sizes, strict=True)], sizes, k)
    chosen = {
        name: Index(found, total.shape, *units_for(total.shape, units))
        for (name, total), found in zip(totals.items(), positions, strict=True)
        if len(found)
    }
    sums = torch.zeros(2, dtype=torch.float64)
    for name, total in totals.items():
        local = local_of(total)
        sums[1] += float(local.sum(dtype=torch.float64))
        if name in chosen and local.numel():
            sums[0] += float(gather(local, held_of(total, chosen[name]).to(local.device)).sum(dtype=torch.float64))
    carried, whole = Cut.of(next(iter(totals.values())), "the Fisher information").sum(sums).tolist()
    return chosen, carried / whole if whole else 0.0
