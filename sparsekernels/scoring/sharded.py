"""Fisher information of a model under fully_shard (FSDP2): each rank squares what it holds of each sample's gradient.

FSDP2 averages gradients over the ranks, and squares of averages are not the averages of squares. So all ranks run the
same sample at a time: the average is then its own gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..common.shards import Cut, of_everyone
from ..common.supported import is_dtensor, local_of
from .eval_mode import in_eval_mode
from .losses import Batch, Loss, PerSampleLoss, batch_size, rows_of, to_device


def squares_of_shards(
    model: nn.Module, batches: Sequence[Batch], names: Iterable[str], loss: Loss | None, labels: str, progress: bool
) -> dict[str, Tensor]:
    """As `fisher_diagonal`: DTensors, sharded as the parameters. A collective call; all ranks give the same batches.

    Raises:
        ValueError: a parameter is frozen, or is not sharded; ranks have different samples; and as `fisher_diagonal`.
    """
    if not batches:
        raise ValueError("samples holds no batch")
    if labels != "given":
        raise ValueError(f'labels={labels!r} is not possible under fully_shard; use labels="given"')
    parameters: dict[str, Any] = {name: model.get_parameter(name) for name in names}
    for name, p in parameters.items():
        if not is_dtensor(p):
            raise ValueError(f"{name!r} is not sharded, unlike others: call reshard() on the model, or leave it out")
        if not p.requires_grad:
            raise ValueError(f"{name!r} is frozen: under fully_shard it needs requires_grad")
    first = next(iter(parameters.values()))
    _compare(batches, first.device_mesh)
    cut = Cut.of(first, repr(next(iter(parameters))))
    totals = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]
    rule = PerSampleLoss(loss, labels)
    before = [(p, p.grad) for p in model.parameters()]
    bar = tqdm(total=sum(sizes), desc="Fisher", unit="sample", disable=not progress, leave=False)
    try:
        with in_eval_mode(model), torch.enable_grad(), bar:
            rule.check(model, to_device(batches[0], first.device))
            for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
                for sample in range(size):
                    for p, _ in before:
                        p.grad = None
                    alone = to_device(rows_of(batch, torch.tensor([sample]), size), first.device)
                    (term,) = rule.terms(model, alone, 1)
                    term.sum().backward()
                    if bool(cut.sum(_add_squares(parameters, totals))):
                        raise ValueError(f"samples: the gradient of sample {sample} in batch {number} is not finite")
                    bar.update()
    finally:
        for p, grad in before:
            p.grad = grad
    return totals


def _add_squares(parameters: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> Tensor:
    """Add what this rank holds; returns how many of the parameters have a gradient that is not finite."""
    broken = torch.zeros((), dtype=torch.int64, device=next(iter(parameters.values())).device)
    for name, p in parameters.items():
        if p.grad is not None:
            total, grad = local_of(totals[name]), local_of(p.grad)
            total += grad.to(total.dtype).square()
            broken += grad.isfinite().all().logical_not()
    return broken


def _compare(batches: Sequence[Batch], mesh: Any) -> None:
    """Raise ValueError, in all processes, if one of them has other samples."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for key, x in batch.items():
            if isinstance(x, Tensor):
                digest.update(f"{key} {x.dtype} {list(x.shape)}".encode())
                digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    found = of_everyone(digest.hexdigest(), [mesh.get_group(dim) for dim in range(mesh.ndim)])
    first, wanted = next(iter(found.items()))
    for rank, other in found.items():
        if other != wanted:
            raise ValueError(
                f"samples: rank {rank} has others than rank {first}; under fully_shard all ranks must pass the same "
                "ones, in the same order, so without a DistributedSampler"
            )
