"""Exact top-k over a tensor or a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...common.supported import is_dtensor
from ..backend import Backend, select


def topk(scores: Sequence[Tensor], k: int, *, magnitude: bool = False, backend: Backend | None = None) -> list[Tensor]:
    """Find the k largest entries over all tensors together, without concatenating them; the tensors are not changed.

    Equivalent to a stable descending sort of `torch.cat([s.reshape(-1) for s in scores])`, cut at k.

    Args:
        scores: tensors of one dtype (fp32, fp64, bf16, fp16) on one device, any shapes; not changed. Or DTensors of one
            mesh, cut along dimension 0, such as gradients under fully_shard: a collective call then, with the same
            result on every rank.
        k: between 1 and the number of entries of all tensors together.
        magnitude: compare absolute values; no copy of them is made.

    Returns:
        One int64 tensor for each of `scores`: ascending flat offsets of its entries among the k. Ties at the boundary
        go to the earlier tensor, then to the lower offset; -0.0 and 0.0 tie.

    Numerics: exact. Deterministic.
    Cost: radix select: scores are read once to check for NaN, once per digit (16 bits of the dtype on the CPU, 8 in
    Triton or for fewer than 2^18 scores), and once more to collect. On a GPU the host waits twice, for NaN and the
    counts.

    Raises:
        ValueError: an empty list of tensors, k out of range, mixed dtypes or devices, or NaN (the message names the
            tensor's index).

    Source: ours.

    Examples:
        >>> sk.ops.topk([torch.tensor([1.0, 5.0]), torch.tensor([[4.0, -6.0]])], k=2)
        [tensor([1]), tensor([0])]
        >>> sk.ops.topk([torch.tensor([1.0, 5.0]), torch.tensor([[4.0, -6.0]])], k=2, magnitude=True)
        [tensor([1]), tensor([1])]
    """
    scores = list(scores)
    if not scores:
        raise ValueError("scores must hold at least one tensor")
    first = scores[0]
    for i, score in enumerate(scores):
        if score.dtype != first.dtype or score.device != first.device:
            raise ValueError(
                f"scores must share dtype and device: scores[0] is {first.dtype} on {first.device}, "
                f"scores[{i}] is {score.dtype} on {score.device}"
            )
    if not first.is_floating_point():
        raise ValueError(f"scores must be floating point, got {first.dtype}")
    total = sum(score.numel() for score in scores)
    if not 1 <= k <= total:
        raise ValueError(f"k must lie in [1, {total}], got {k}")
    if any(is_dtensor(score) for score in scores):
        if not all(is_dtensor(score) for score in scores):
            raise ValueError("scores must be DTensors, all of them or none")
        from .over_ranks import topk_over_ranks

        return topk_over_ranks(scores, k, magnitude)
    run = select("topk", first.device.type, backend)
    try:
        positions, counts = run([score.contiguous() for score in scores], k, magnitude)
    except RuntimeError as error:
        if "holds NaN" in str(error):
            raise ValueError(f"scores[{str(error).split('scores[')[1]}") from None
        raise
    found: list[Tensor] = list(positions.split(counts.tolist()))
    return found
