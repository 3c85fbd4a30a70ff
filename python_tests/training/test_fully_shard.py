"""FSDP2 and DistributedDataParallel over gloo: processes on parts of a batch are one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import in_processes, uses_processes
from sharded_models import MODELS, UNITS, fresh, made, optimizer_of, same, selection, train, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import sparsekernels as sk


def matrix(rank: int, world: int, folder: str) -> None:
    meshes = {"fsdp": init_device_mesh("cpu", (world,)), "ddp": None}
    if world == 4:
        meshes["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name, mesh in meshes.items():
        for kind in MODELS:
            for units in UNITS:
                if mesh is None:
                    model = made(kind)
                    tuned = sk.train_only(model, selection(model, units))
                    run = DistributedDataParallel(model)
                else:
                    run, tuned = fresh(kind, mesh, units)
                train(run, tuned, optimizer_of(tuned), rank, world)
                torch.save(whole(tuned.model), f"{folder}/{name}-{kind}-{units}-{rank}.pt")


@pytest.mark.compatibility("FSDP", "FSDP2 (`fully_shard`, after `train_only`), also with a 2-D mesh (HSDP)", "works")
@uses_processes
@pytest.mark.parametrize("world", [2, 4])
def test_processes_are_one_process(tmp_path: Path, world: int) -> None:
    """For each kind of unit: accumulation, clipping, decay; unselected weights keep their bits on every rank."""
    in_processes(matrix, tmp_path, world)
    for kind in MODELS:
        before = made(kind).state_dict()
        for units in UNITS:
            model = made(kind)
            tuned = sk.train_only(model, selection(model, units))
            train(model, tuned, optimizer_of(tuned), 0, 1)
            masks = {name: index.mask() for name, index in tuned.selection.items()}
            for mesh in ("fsdp", "ddp", "hsdp") if world == 4 else ("fsdp", "ddp"):
                states = [torch.load(tmp_path / f"{mesh}-{kind}-{units}-{rank}.pt") for rank in range(world)]
                same(states[0], model.state_dict())
                for name, weight in states[0].items():
                    assert all(torch.equal(weight, state[name]) for state in states), (mesh, kind, units, name)
                    if name in masks:
                        unselected = ~masks[name]
                        assert torch.equal(weight[unselected], before[name][unselected]), (mesh, kind, units, name)
                        assert unselected.all() or not torch.equal(weight, before[name]), (mesh, kind, units, name)
