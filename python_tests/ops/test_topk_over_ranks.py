"""Top-k over DTensors: the same as over whole tensors in one process, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes, uses_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import sparsekernels as sk
from sparsekernels import Selection

UNITS: list[dict[str, Any]] = [
    {},
    {"magnitude": True},
    {"granularity": "row"},
    {"granularity": "column"},
    {"granularity": "column", "share_inputs": True},
    {"granularity": "block", "block": (3, 4)},
]


def scores(dtype: torch.dtype, ties: bool) -> dict[str, Tensor]:
    """Fewer rows than ranks, rows that do not divide, vectors, experts; with ties many scores are equal, zeros too."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.q_proj": (3, 8), "a.k_proj": (10, 8), "bias": (9,), "experts": (5, 4, 6), "one": (1, 1)}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: ((2 * x).round() / 2 if ties else x).to(dtype) for name, x in found.items()}


def work(rank: int, world: int, folder: str) -> None:
    meshes = [(init_device_mesh("cpu", (world,)), [Shard(0)])]
    meshes.append((init_device_mesh("cpu", (2, world // 2)), [Replicate(), Shard(0)]))
    for mesh, placements in meshes:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for ties in (False, True):
                whole = scores(dtype, ties)
                cut = {name: distribute_tensor(x, mesh, placements) for name, x in whole.items()}
                for options in UNITS:
                    for size in ({"density": 0.1}, {"k": 17}, {"density": 0.3, "per_tensor": True}, {"density": 1.0}):
                        found = Selection.topk(cut, **size, **options)
                        assert found == Selection.topk(whole, **size, **options), (dtype, ties, options, size)
        whole["bias"][4] = torch.nan
        cut["bias"] = distribute_tensor(whole["bias"], mesh, placements)
        for options in UNITS:
            with pytest.raises(ValueError, match=r"'bias'.*NaN"):
                Selection.topk(cut, density=0.1, **options)
        with pytest.raises(ValueError, match="all of them or none"):
            sk.ops.topk([cut["one"], whole["one"]], 1)
        with pytest.raises(ValueError, match="is sharded as"):
            sk.ops.topk([distribute_tensor(whole["a.q_proj"], mesh, [*placements[:-1], Shard(1)])], 1)


@pytest.mark.compatibility("FSDP", "`Selection.topk` of DTensors, such as gradients under FSDP2", "works")
@uses_processes
def test_it_is_one_process(tmp_path: Path) -> None:
    in_processes(work, tmp_path, 4)
