"""The share of the gradient norm that the largest entries carry."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.shards import Cut
from ..common.supported import is_dtensor, local_of

SHARES = tuple(10 ** (-4 + i / 8) for i in range(33))  # 0.01 % to 100 %, eight points a decade


CURVE_CHUNK = 1 << 22  # elements whose buckets exist at a time


class GradientCurve:
    """The share of the gradient norm that the largest entries carry, from histograms of magnitude; nothing is sorted.

    Entries are bucketed by the upper 16 bits of their fp32 magnitude. Count and energy (sum of squares) of each bucket
    give the curve, linear inside a bucket. Each tensor contributes its own largest share, as SIFT selects.
    """

    BUCKETS = 1 << 15

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._energy: list[Tensor] = []

    def add(self, grad: Tensor) -> None:
        count = torch.zeros(self.BUCKETS, dtype=torch.float64, device=grad.device)
        energy = torch.zeros_like(count)
        for part in local_of(grad).reshape(-1).split(CURVE_CHUNK):
            magnitude = part.float().abs()
            bucket = magnitude.view(torch.int32) >> 16
            count += torch.bincount(bucket, minlength=self.BUCKETS)
            energy += torch.bincount(bucket, magnitude.double().square_(), minlength=self.BUCKETS)
        if is_dtensor(grad):
            group = Cut.of(grad, "a gradient").group
            for each in (count, energy):
                dist.all_reduce(each, group=group)
        occupied = count.nonzero().squeeze(1).flip(0)
        self._counts.append(count[occupied].cpu())
        self._energy.append(energy[occupied].cpu())

    def points(self, shares: Iterable[float]) -> list[tuple[float, float]]:
        """(share, carried) for each share."""
        total = sum(float(energy.sum()) for energy in self._energy)
        out = []
        for share in shares:
            carried = sum(
                _carried(count, energy, share) for count, energy in zip(self._counts, self._energy, strict=True)
            )
            out.append((share, min(1.0, (carried / total) ** 0.5) if total else 0.0))
        return out


def _carried(count: Tensor, energy: Tensor, share: float) -> float:
    """Energy of the largest `share` of entries; buckets come from large to small."""
    wanted = share * float(count.sum())
    before = count.cumsum(0) - count
    part = ((wanted - before) / count).clamp_(0, 1)
    return float((part * energy).sum())
