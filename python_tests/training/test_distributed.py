"""DistributedDataParallel over gloo: two processes on half a batch each are one process on the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from processes import in_processes, uses_processes
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch.nn.parallel import DistributedDataParallel

import sparsekernels as sk
from sparsekernels import Index, Selection
from sparsekernels.training.replicas import before_forward

STEPS, BATCH = 3, 8


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def selection(of: nn.Module) -> Selection:
    rows = Selection({"0.weight": Index(torch.arange(0, 13, 2), (13, 8), granularity="row")})
    return rows | Selection.random(of, 0.3, names=["1.weight", "2.weight", "3.weight", "3.bias"])


def inputs(step: int) -> Tensor:
    return torch.randint(0, 13, (BATCH,), generator=torch.Generator().manual_seed(step))


def train(run: nn.Module, tuned: sk.SparseModel, rank: int, world: int, forwards: int) -> None:
    """`forwards`: how many micro-batches go into one loss, so into one backward."""
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(STEPS):
        mine = inputs(step).chunk(world)[rank]
        loss = sum(run(part).square().sum() for part in mine.chunk(forwards)) / mine.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank: int, world: int, folder: str) -> None:
    for forwards in (1, 2):
        tuned = sk.train_only(model(), selection(model()))
        train(DistributedDataParallel(tuned.model), tuned, rank, world, forwards)
        torch.save(tuned.model.state_dict(), f"{folder}/rank{rank}-{forwards}.pt")


@pytest.mark.compatibility("DistributedDataParallel", "two processes on CPUs, with gloo", "works")
@uses_processes
def test_two_processes(tmp_path: Path) -> None:
    """Also with two forwards before a backward: what DDP sends round between them is no change of the weights."""
    in_processes(work, tmp_path)
    for forwards in (1, 2):
        tuned = sk.train_only(model(), selection(model()))
        train(tuned.model, tuned, 0, 1, forwards)
        states = [torch.load(tmp_path / f"rank{rank}-{forwards}.pt", weights_only=True) for rank in range(2)]
        for key, value in tuned.model.state_dict().items():
            assert torch.equal(states[0][key], states[1][key]), f"{key} differs between the processes"
            assert torch.allclose(states[0][key], value, rtol=1e-5, atol=1e-6), key


def own_selections(rank: int, world: int, folder: str) -> None:
    """Each process selects as many weights as the others, but others. torch.compile wraps what is raised in its own."""
    for options, compiled in (({}, False), ({"broadcast_buffers": False}, False), ({}, True)):
        net = model()
        mine = Selection.random(net, 0.3, seed=rank, names=["1.weight", "3.weight"])
        positions = {name: index.positions.clone() for name, index in mine.items()}
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        tuned = sk.train_only(net, mine)
        run = DistributedDataParallel(net, **options)
        if compiled:
            run = torch.compile(run, backend="aot_eager")
        for _ in range(2):
            with pytest.raises(
                (ValueError, InternalTorchDynamoError),
                match=r"'1.weight': rank 1 trains other positions.*broadcast\(src=0\)",
            ):
                run(inputs(rank))
        assert all(torch.equal(index.positions, positions[name]) for name, index in mine.items())
        tuned.restore()
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def shared_selection(rank: int, world: int, folder: str) -> None:
    net = model()
    mine = Selection.random(net, 0.3, seed=rank, names=["1.weight", "3.weight"])
    positions = {name: index.positions.clone() for name, index in mine.items()}
    shared = mine.broadcast(src=1)
    assert dict(shared) == dict(Selection.random(net, 0.3, seed=1, names=["1.weight", "3.weight"]))
    assert all(torch.equal(index.positions, positions[name]) for name, index in mine.items())
    tuned = sk.train_only(net, shared)
    train(DistributedDataParallel(net), tuned, rank, world, 1)
    tuned.reselect(mine)
    with pytest.raises(ValueError, match="trains other positions"):
        DistributedDataParallel(net)(inputs(rank))
    tuned.reselect(mine.broadcast())
    DistributedDataParallel(net)(inputs(rank))


class Branches(nn.Module):
    """A batch of one process may pass a selected layer by."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.layers[2](self.layers[chosen](x))


def not_in_every_forward(rank: int, world: int, folder: str) -> None:
    """Nothing is compared where one process evaluates alone, or is at another layer first."""
    torch.manual_seed(3)
    net = Branches()
    sk.train_only(net, Selection.random(net, 0.5, names=["layers.0.weight", "layers.1.weight"]))
    net.layers[2].weight.requires_grad_(True)  # trained beside, so that a process may pass all selected layers by
    run = DistributedDataParallel(net, find_unused_parameters=True, broadcast_buffers=False)
    if rank == 0:
        with torch.no_grad():
            run(torch.ones(2, 4), 0)
    for step in range(2):
        run(torch.ones(2, 4), 2 * rank * (1 - step)).sum().backward()
    run = DistributedDataParallel(copy.deepcopy(net), find_unused_parameters=True, broadcast_buffers=False)
    for step in range(2):
        run(torch.ones(2, 4), (rank + step) % 2).sum().backward()


@uses_processes
def test_processes_that_run_different_layers(tmp_path: Path) -> None:
    in_processes(not_in_every_forward, tmp_path)


def compared(rank: int, world: int, folder: str) -> None:
    own_selections(rank, world, folder)
    shared_selection(rank, world, folder)


@pytest.mark.compatibility("DistributedDataParallel", "replicas that train different positions", "refused")
@pytest.mark.compatibility("DistributedDataParallel", "`Selection.broadcast`, then re-selection", "works")
@uses_processes
def test_replicas_must_train_the_same_positions(tmp_path: Path) -> None:
    """Whatever DDP broadcasts, and after a re-selection; a broadcast selection is the same, and leaves its source."""
    in_processes(compared, tmp_path)


def test_broadcast_needs_processes() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        selection(model()).broadcast()


def pipelined(rank: int, world: int, folder: str) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    whole = model()
    part = whole[:2] if rank == 0 else whole[2:]
    tuned = sk.train_only(part, Selection.random(part, 0.3, seed=rank))
    stage = PipelineStage(part, rank, world, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda out, _: out.square().sum())
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(STEPS):
        schedule.step(*([inputs(step)] if rank == 0 else []), target=torch.zeros(BATCH) if rank else None)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(part.state_dict(), f"{folder}/stage{rank}.pt")


@pytest.mark.compatibility("Pipeline parallelism", "stages in two processes, each with its own selection", "works")
@uses_processes
def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    in_processes(pipelined, tmp_path)
    whole = model()
    stages = whole[:2], whole[2:]
    tuned = [sk.train_only(part, Selection.random(part, 0.3, seed=rank)) for rank, part in enumerate(stages)]
    optimizer = sk.SparseAdamW([p for each in tuned for p in each.parameters()], lr=0.05, weight_decay=0.1)
    for step in range(STEPS):
        for micro in inputs(step).chunk(2):
            (whole(micro).square().sum() / 2).backward()  # a schedule averages over the micro-batches
        optimizer.step()
        optimizer.zero_grad()
    for rank, part in enumerate(stages):
        found = torch.load(tmp_path / f"stage{rank}.pt")
        for key, value in part.state_dict().items():
            assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-7), key


def gated_work(rank: int, world: int, folder: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    gates = sk.methods.gates.attach(net, 0.4, 20)
    run = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-2))
    torch.manual_seed(rank)  # each its own texts and noise
    for _ in range(20):
        (run(torch.randn(5, 8)).square().mean() + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
    torch.save([net.state_dict(), gates.state_dict(), gates.removed()], f"{folder}/gates{rank}.pt")


@pytest.mark.compatibility("DistributedDataParallel", "`methods.gates`", "works")
@uses_processes
def test_gates_of_two_processes_agree(tmp_path: Path) -> None:
    """And go on after they are frozen."""
    in_processes(gated_work, tmp_path)
    (model, state, removed), (other, other_state, _) = (
        torch.load(tmp_path / f"gates{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert state["frozen"]
    assert removed >= 0.4
    for ours, theirs in ((model, other), (state, other_state)):
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.child = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)


def test_a_model_that_loses_its_own_slot_compares_before_its_forward() -> None:
    net = Own()
    watched = lambda: list(net._forward_pre_hooks.values()).count(before_forward)  # noqa: E731
    tuned = sk.train_only(net, Selection.random(net, 0.5, names=["weight", "child.weight"]))
    assert watched() == 0
    for _ in range(2):
        tuned.reselect(Selection.random(net, 0.5, names=["child.weight"]))
        assert watched() == 1
    tuned.restore()
    assert watched() == 0
