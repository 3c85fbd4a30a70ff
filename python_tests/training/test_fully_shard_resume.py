"""Checkpoints of a sharded model: other numbers of processes, and a process that is killed in the middle of a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import ids
from processes import in_processes, uses_processes
from sharded_models import fresh, loss_of, made, optimizer_of, same, selection, whole
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import sparsekernels as sk
from sparsekernels.training import sharding

STEPS = 2  # with each number of processes
LIMIT = 240  # seconds


def step(run: Any, optimizer: Any, number: int, rank: int, world: int) -> None:
    loss_of(run, ids(8, 7, seed=number).chunk(world)[rank]).backward()
    optimizer.step()
    optimizer.zero_grad()


def full(state: Any) -> Any:
    """Every tensor of a state whole, on each rank."""
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full(value) for value in state]
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def resume(rank: int, world: int, folder: str) -> None:
    """Load the newest checkpoint, check that it is what was saved, go on, and save the next."""
    mesh, (number,) = init_device_mesh("cpu", (world,)), [int(Path(folder, "number").read_text())]
    for units in ("element", "block"):
        for dtype in (torch.float32, torch.bfloat16):
            path = f"{folder}/{units}-{dtype}-"
            run, tuned = fresh("zoo", mesh, units, dtype)
            optimizer = optimizer_of(tuned)
            if number:
                model_state, state = get_state_dict(run, optimizer)
                dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=f"{path}{number}")
                set_state_dict(run, optimizer, model_state_dict=model_state, optim_state_dict=state)
                check_equal(full(list(get_state_dict(run, optimizer))), torch.load(f"{path}{number}.pt"))
            for at in range(number, number + STEPS):
                step(run, optimizer, at, rank, world)
            model_state, state = get_state_dict(run, optimizer)
            dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=f"{path}{number + STEPS}")
            found = full([model_state, state])
            if rank == 0:
                torch.save(found, f"{path}{number + STEPS}.pt")


def check_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            check_equal(found[key], wanted[key])
    elif isinstance(wanted, list):
        for a, b in zip(found, wanted, strict=True):
            check_equal(a, b)
    else:
        assert found == wanted


@pytest.mark.compatibility("FSDP", "torch.distributed.checkpoint, with another number of processes", "works")
@uses_processes
def test_other_numbers_of_processes_resume(tmp_path: Path) -> None:
    """2, then 4, then 1: state bit for bit, and the weights of one process that never stopped."""
    for turn, world in enumerate((2, 4, 1)):
        (tmp_path / "number").write_text(str(turn * STEPS))
        (tmp_path / "store").unlink(missing_ok=True)
        in_processes(resume, tmp_path, world)
    model = made("zoo")
    tuned = sk.train_only(model, selection(model))
    optimizer = optimizer_of(tuned)
    for at in range(3 * STEPS):
        step(model, optimizer, at, 0, 1)
    found, state = torch.load(tmp_path / f"element-torch.float32-{3 * STEPS}.pt")
    same(found, model.state_dict())
    assert state["state"]["up.weight_values"]["step"] == 3 * STEPS


def killed_run(folder: Path) -> None:
    """Started by torchrun: six steps, a checkpoint after each. Rank 1 dies once, after its values were stepped."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    run, tuned = fresh("zoo", init_device_mesh("cpu", (world,)))
    optimizer = optimizer_of(tuned)
    done = folder / "done"
    begin = int(done.read_text()) if done.exists() else 0
    if begin:
        model_state, state = get_state_dict(run, optimizer)
        dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=folder / str(begin))
        set_state_dict(run, optimizer, model_state_dict=model_state, optim_state_dict=state)
    for at in range(begin, 6):
        if at == 3 and rank == 1 and "--kill" in sys.argv and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            sharding.write_ = lambda slots: (folder / "killed").touch() or os.kill(os.getpid(), 9)  # type: ignore
        step(run, optimizer, at, rank, world)
        model_state, state = get_state_dict(run, optimizer)
        dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder / str(at + 1))
        if rank == 0:
            done.write_text(str(at + 1))
        dist.barrier()
    found = whole(run)
    if rank == 0:
        torch.save(found, folder / "end.pt")
    dist.destroy_process_group()


@pytest.mark.compatibility("torchrun", "a rank that dies in a step, and a restart from the checkpoint", "works")
@uses_processes
def test_a_killed_rank_changes_nothing(tmp_path: Path) -> None:
    """torchrun starts again from the last checkpoint: the weights are those of an undisturbed run, bit for bit."""
    ends = []
    for arguments in ([], ["--kill"]):
        folder = tmp_path / "-".join(["run", *arguments])
        folder.mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, "--max-restarts", "1", __file__, str(folder), *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        # Else gloo finds, in a store that outlives the restart, the addresses of the dead processes.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (folder / "killed").exists() == bool(arguments)
        ends.append(torch.load(folder / "end.pt"))
    same(ends[1], ends[0], 0.0)


if __name__ == "__main__":
    killed_run(Path(sys.argv[1]))
