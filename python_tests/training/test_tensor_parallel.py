"""Tensor parallelism over gloo, alone and under fully_shard (FSDP2): several processes are one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids
from parallel_models import net, parallelised, sharded_part, step
from processes import in_processes, uses_processes
from sharded_models import UNITS, loss_of, optimizer_of, same, selection, train, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekernels as sk
from sparsekernels import Index, Selection


def matrix(rank: int, world: int, folder: str) -> None:
    tensor_parallel = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    both = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    for units in UNITS:
        model = parallelised(tensor_parallel)
        tuned = sk.train_only(model, selection(net(), units))
        train(model, tuned, optimizer_of(tuned), 0, 1, clip=sk.clip_grad_norm_)
        torch.save([whole(model), tuned.delta()], f"{folder}/tp-{units}-{rank}.pt")
        if world == 4:
            run, tuned = under_both(both, units)
            train(run, tuned, optimizer_of(tuned), both["dp"].get_local_rank(), world // 2, clip=sk.clip_grad_norm_)
            torch.save([whole(run), tuned.delta()], f"{folder}/fsdp-tp-{units}-{rank}.pt")
            other, loaded = under_both(both, units)
            other.load_state_dict(run.state_dict())
            for found, wanted in zip(loaded.parameters(), tuned.parameters(), strict=True):
                assert torch.equal(sharded_part(found), sharded_part(wanted))
            same(whole(other), whole(run), 0.0)
    if world == 4:
        four_ranks(rank, tensor_parallel, both)


def four_ranks(rank: int, tensor_parallel: Any, both: Any) -> None:
    """Compiled layers, use before the optimizer is made, checkpoints of another layout, other plain weights."""
    results = []
    for compiled in (False, True):
        run, tuned = under_both(both, "column")
        run.eval()
        with torch.no_grad():
            run(ids(2, 7))
        run.state_dict()
        for layer in (run.up, run.down) if compiled else ():
            layer.compile(backend="aot_eager")
        train(run, tuned, optimizer_of(tuned), both["dp"].get_local_rank(), 2, clip=sk.clip_grad_norm_)
        results.append(whole(run))
    same(results[1], results[0])

    states = []
    for mesh in (tensor_parallel, both["tp"]):
        model = parallelised(mesh)
        tuned = sk.train_only(model, Selection({"down.weight": Index.full((10, 16))}))
        optimizer = optimizer_of(tuned)
        step(model, optimizer)
        states.append(optimizer.state_dict())
    with pytest.raises(ValueError, match="another number of tensor-parallel ranks"):
        optimizer.load_state_dict(states[0])
    single = sk.SparseAdamW(sk.train_only(net(), tuned.selection).parameters())
    with pytest.raises(ValueError, match=r"another number of tensor-parallel ranks|must be plain tensors"):
        single.load_state_dict(states[0])

    model = parallelised(both["tp"])
    up = Index(torch.tensor([5, 100 + 10 * both["tp"].get_local_rank()]), (16, 10))
    sk.train_only(model, Selection({"norm.weight": Index.full((10,)), "up.weight": up}))
    run = fully_shard(model, mesh=both["dp"])
    optimizer = sk.SparseAdamW([p for p in run.parameters() if p.requires_grad][::-1])  # that of the norm first
    loss_of(run, ids(2, 7)).backward()
    with pytest.raises(ValueError, match=r"'up.weight': rank 1 trains other positions than rank 0"):
        optimizer.step()


def under_both(mesh: Any, units: str) -> tuple[nn.Module, sk.SparseModel]:
    model = parallelised(mesh["tp"])
    tuned = sk.train_only(model, selection(net(), units))
    for layer in (model.up, model.words):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), tuned


@pytest.mark.compatibility("Tensor parallelism", "`parallelize_module`, before `train_only`", "works")
@pytest.mark.compatibility(
    "Tensor parallelism", "with FSDP2: `parallelize_module`, then `train_only`, `fully_shard`", "works"
)
@uses_processes
@pytest.mark.parametrize("world", [2, 4])
def test_processes_are_one_process(tmp_path: Path, world: int) -> None:
    in_processes(matrix, tmp_path, world)
    before = net().state_dict()
    for units in UNITS:
        model = net()
        tuned = sk.train_only(model, selection(model, units))
        train(model, tuned, optimizer_of(tuned), 0, 1, clip=sk.clip_grad_norm_)
        masks = {name: index.mask() for name, index in tuned.selection.items()}
        for mesh in ("tp", "fsdp-tp") if world == 4 else ("tp",):
            found = [torch.load(tmp_path / f"{mesh}-{units}-{rank}.pt", weights_only=False) for rank in range(world)]
            state, delta = found[0]
            same(state, model.state_dict())
            assert delta.selection == tuned.selection
            plain = net()
            delta.apply(plain)
            same(plain.state_dict(), state, 0.0)
            for name, weight in state.items():
                assert all(torch.equal(weight, other[name]) for other, _ in found), (mesh, units, name)
                unselected = ~masks[name] if name in masks else torch.ones_like(weight, dtype=torch.bool)
                assert torch.equal(weight[unselected], before[name][unselected]), (mesh, units, name)
                assert unselected.all() or not torch.equal(weight, before[name]), (mesh, units, name)
