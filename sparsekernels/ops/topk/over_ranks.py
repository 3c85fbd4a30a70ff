"""Exact top-k over DTensors: each rank counts its own scores and the histograms are summed; nobody holds all scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...common.shards import Cut
from ...common.supported import local_of

DIGITS = {4: (11, 11, 10), 8: (11, 11, 11, 11, 10, 10)}  # bits of each, for keys of so many bytes


def topk_over_ranks(scores: Sequence[Any], k: int, magnitude: bool) -> list[Tensor]:
    """As `topk`, of DTensors cut along dimension 0; the same on every rank. A collective call.

    Of equal scores those of the earlier tensor are taken, then those of lower offsets: of earlier ranks.
    """
    cuts = [Cut.of(score, f"scores[{i}]") for i, score in enumerate(scores)]
    cut = cuts[0]
    if any(each.group is not cut.group for each in cuts):
        raise ValueError("scores must be sharded over one device mesh")
    found_nan = torch.tensor([int(local_of(score).isnan().any()) for score in scores], device=scores[0].device)
    holds_nan = cut.sum(found_nan)
    if bool(holds_nan.any()):
        raise ValueError(f"scores[{int(holds_nan.nonzero()[0])}] holds NaN")
    bound, ties = _boundary(scores, k, magnitude, cut)

    above = [(key > bound).nonzero().reshape(-1) for key in _keys(scores, magnitude)]
    equal = [(key == bound).nonzero().reshape(-1) for key in _keys(scores, magnitude)]
    counts = cut.gather(torch.tensor([len(each) for each in equal], device=scores[0].device)).t()  # of tensor and rank
    before = counts.reshape(-1).cumsum(0).view(counts.shape) - counts
    mine = (ties - before[:, dist.get_rank(cut.group)]).clamp_(min=0).tolist()
    found = [
        torch.cat([more, same[:quota]]).sort().values + each.first * score.shape[1:].numel()
        for more, same, quota, each, score in zip(above, equal, mine, cuts, scores, strict=True)
    ]
    return _shared(found, cut)


def _boundary(scores: Sequence[Any], k: int, magnitude: bool, cut: Cut) -> tuple[int, int]:
    """The key of the k-th largest score, and how many of the scores with this key are among the k."""
    size = 8 if scores[0].dtype == torch.float64 else 4
    known, prefix, wanted = 0, 0, k
    for width in DIGITS[size]:
        shift = 8 * size - known - width
        histogram = torch.zeros(1 << width, dtype=torch.int64, device=scores[0].device)
        for key in _keys(scores, magnitude):
            code = key ^ (-1 << (8 * size - 1))  # the sign bit turned: digits order as keys do
            if known:
                code = code[(code >> (shift + width)) & ((1 << known) - 1) == prefix]
            histogram += torch.bincount((code >> shift) & ((1 << width) - 1), minlength=1 << width)
        histogram = cut.sum(histogram)
        from_here_up = histogram.flip(0).cumsum(0).flip(0)
        digit = int((from_here_up >= wanted).sum()) - 1
        wanted -= int(from_here_up[digit] - histogram[digit])
        known, prefix = known + width, prefix << width | digit
    return prefix - (1 << (8 * size - 1)), wanted


def _keys(scores: Sequence[Any], magnitude: bool) -> Iterator[Tensor]:
    """int64 keys of the scores that this rank holds, one tensor after another, ordered as the scores are."""
    for score in scores:
        x = local_of(score).reshape(-1)
        x = x if x.dtype == torch.float64 else x.float()
        x = (x.abs() if magnitude else x) + 0.0  # of one zero
        bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
        yield torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits).long()


def _shared(found: list[Tensor], cut: Cut) -> list[Tensor]:
    """For each tensor, what all ranks found, one after another."""
    counts = cut.gather(torch.tensor([len(each) for each in found], device=found[0].device))
    mine = torch.cat(found)
    room = mine.new_zeros(int(counts.sum(1).max()))
    room[: len(mine)] = mine
    parts = [row.split(lengths) for row, lengths in zip(cut.gather(room), _lengths(counts, len(room)), strict=True)]
    return [torch.cat([part[i] for part in parts]) for i in range(len(found))]


def _lengths(counts: Tensor, room: int) -> list[list[int]]:
    """For each rank the lengths of its parts, and of the room that is left."""
    return [[*row, room - sum(row)] for row in counts.tolist()]
