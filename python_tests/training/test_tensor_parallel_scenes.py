"""What is done with a model under tensor parallelism; each function is a scene that runs in two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import ids
from parallel_models import PLAN, net, parallel, parallelised, sharded_part, step
from processes import in_processes, uses_processes
from sharded_models import ADAMW, BATCH, loss_of, optimizer_of, same, selection, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import sparsekernels as sk
from sparsekernels import Index, Selection


def other_optimizers(rank: int, world: int, mesh: Any) -> None:
    """Those of torch write the weights too; options of SparseAdamW; a step in bf16."""
    results = []
    for make in (
        lambda tuned: optimizer_of(tuned),
        lambda tuned: torch.optim.AdamW(tuned.parameters(), **ADAMW),
        lambda tuned: optimizer_of(tuned, amsgrad=True),
        lambda tuned: torch.optim.AdamW(tuned.parameters(), **ADAMW, amsgrad=True),
    ):
        model, tuned = parallel(mesh, "block")
        optimizer = make(tuned)
        for seed in range(3):
            step(model, optimizer, seed)
        results.append(whole(model))
    same(results[1], results[0])
    same(results[3], results[2])

    model, tuned = parallel(mesh, "column", torch.bfloat16)
    before = whole(model)
    step(model, optimizer_of(tuned))
    after = whole(model)
    for (name, values), index in zip(tuned.named_parameters(), tuned.selection.values(), strict=True):
        assert values.dtype == torch.float32
        assert torch.equal(after[name][~index.mask()], before[name][~index.mask()]), name
    assert not torch.equal(after["up.weight"], before["up.weight"])


def given_back(rank: int, world: int, mesh: Any) -> None:
    """restore() and merge(); values changed by hand are in the weights at the next forward, and in the state_dict."""
    for give_back in ("restore", "merge"):
        model, tuned = parallel(mesh)
        before = whole(model)
        optimizer = optimizer_of(tuned)
        step(model, optimizer)
        with torch.no_grad():
            next(tuned.parameters()).add_(1)
            model(ids(2, 7))
        changed = whole(model)
        assert (changed["words.weight"] - before["words.weight"]).abs().max() > 0.9
        getattr(tuned, give_back)()
        same(whole(model), before if give_back == "restore" else changed, 0.0)
        assert type(model.up) is nn.Linear


def checkpoints(rank: int, world: int, mesh: Any) -> None:
    """By state_dict and load_state_dict, and the optimizer's: the same continuation."""
    model, tuned = parallel(mesh, "row")
    optimizer = optimizer_of(tuned)
    step(model, optimizer)
    saved = [{name: x.clone() for name, x in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())]
    step(model, optimizer, 1)

    other, again = parallel(mesh, "row")
    resumed = optimizer_of(again)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    step(other, resumed, 1)
    same(whole(other), whole(model), 0.0)
    for found, wanted in zip(again.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(sharded_part(found), sharded_part(wanted))

    before = whole(other)
    changed = {name: x.clone() for name, x in saved[0].items()}
    changed["down.bias"] = changed["down.bias"] + 1.0
    with pytest.raises(ValueError, match=r"changes [\d,]+ weights of 'down.bias' that are not selected"):
        other.load_state_dict(changed)
    same(whole(other), before, 0.0)
    wrong = sk.train_only(parallelised(mesh), selection(net(), "row", seed=2))
    with pytest.raises(ValueError, match="made for another selection"):
        optimizer_of(wrong).load_state_dict(saved[1])


def ways_to_run(rank: int, world: int, mesh: Any) -> None:
    """Checkpointed layers, autocast, and norms in sequence parallelism, whose gradients are partial sums."""
    results = []
    for way in ("plain", "checkpointed", "sequence"):
        plan = PLAN
        if way == "sequence":
            plan = {
                "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "vectors": ColwiseParallel(output_layouts=Shard(1)),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1)),
                "norm": SequenceParallel(),
                "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
            }
        model = net()
        parallelize_module(model, mesh, plan)
        tuned = sk.train_only(model, selection(net(), "column"))
        if way == "checkpointed":
            up = model.up.forward
            model.up.forward = lambda x, up=up: checkpoint(up, x, use_reentrant=False)  # type: ignore[method-assign]
        optimizer = optimizer_of(tuned)
        for seed in range(2):
            batch = ids(BATCH, 6, seed=seed)
            loss_of(model, batch).backward()
            sk.clip_grad_norm_(tuned.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        results.append(whole(model))
    same(results[1], results[0], 0.0)
    same(results[2], results[0])

    results = []
    for run in (net(), parallelised(mesh)):
        tuned = sk.train_only(run, selection(net(), "column"))
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(run, ids(BATCH, 7)).backward()
        optimizer_of(tuned).step()
        results.append(whole(run))
    same(results[1], results[0], 1e-2)


def no_gradient_is_communicated(rank: int, world: int, mesh: Any) -> None:
    """A step has the collectives of one forward and backward of the frozen model, and no other."""
    counts = []
    for trained in (True, False):
        model = parallelised(mesh)
        if trained:
            tuned = sk.train_only(model, selection(net(), "element"))
            optimizer = optimizer_of(tuned)
            step(model, optimizer)  # the first step compares the selections
        else:
            model.requires_grad_(False)
            model.words.weight.requires_grad_()
        with CommDebugMode() as found:
            loss_of(model, ids(BATCH, 7)).backward()
            if trained:
                optimizer.step()
        counts.append(found.get_comm_counts())
    assert counts[0] == counts[1]


def changed_without_a_version(rank: int, world: int, mesh: Any) -> None:
    """Steps by hand through `.data`, also of values that load_state_dict(assign=True) replaced."""
    results = []
    for run in (net(), parallelised(mesh)):
        tuned = sk.train_only(run, selection(net()))
        run.load_state_dict({name: x.clone() for name, x in run.state_dict().items()}, assign=True)
        for seed in range(3):
            loss_of(run, ids(BATCH, 7, seed=seed)).backward()
            for p in tuned.parameters():
                p.data.add_(p.grad.data, alpha=-0.5)
                p.grad = None
        run(ids(2, 7))
        results.append(whole(run))
    same(results[1], results[0])
    run.load_state_dict({name: x.clone() for name, x in run.state_dict().items()}, assign=True)
    optimizer = sk.SparseAdamW([p for p in run.parameters() if p.requires_grad], **ADAMW)
    step(run, optimizer)
    for (_, values), slot in zip(tuned.named_parameters(), tuned.slots.values(), strict=True):
        held = values if slot.parallel is None else slot.parallel.compact(values.detach().to_local())
        assert torch.equal(sk.ops.gather(sharded_part(slot.weight.detach()), slot.index), held), slot.label
    assert all("positions" in state for state in optimizer.state_dict()["state"].values())


def a_step_between_forward_and_backward(rank: int, world: int, mesh: Any) -> None:
    """Fails as in one process: the gradient of the input would be that of other weights."""
    model, tuned = parallel(mesh)
    optimizer = optimizer_of(tuned)
    loss = loss_of(model, ids(BATCH, 7))
    loss_of(model, ids(BATCH, 7)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def columns_of_one_rank(rank: int, world: int, mesh: Any) -> None:
    """Where one rank alone narrows its input, and the input is not laid out as the weight is: no rank waits."""
    results = []
    for placement in (None, Shard(0)):
        torch.manual_seed(3)
        model, x = nn.Linear(8, 6), torch.randn(4, 8)
        if placement is not None:
            model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(1)]))
            model.bias = nn.Parameter(distribute_tensor(model.bias.detach(), mesh, [Replicate()]))
            x = distribute_tensor(x, mesh, [placement])
        tuned = sk.train_only(model, Selection({"weight": Index(torch.tensor([0, 1]), (6, 8), "column")}))
        model(x).square().sum().backward()
        optimizer_of(tuned).step()
        results.append(whole(model))
    same(results[1], results[0])


def half_compiled(rank: int, world: int, mesh: Any) -> None:
    """Two layers of different placement, and plain norms; torch.compile makes their attributes symbols."""
    results = []
    for compiled in (False, True):
        model, tuned = parallel(mesh, "column")
        for layer in (model.up, model.down, model.norm) if compiled else ():
            layer.compile(backend="aot_eager")
        optimizer = optimizer_of(tuned)
        for seed in range(2):
            step(model, optimizer, seed)
        results.append(whole(model))
    same(results[1], results[0])


def refusals(rank: int, world: int, mesh: Any) -> None:
    _, tuned = parallel(mesh)
    with pytest.raises(ValueError, match=r"reselect\(\) is not possible with tensor parallelism"):
        tuned.reselect(selection(net(), seed=2))
    other = sk.train_only(parallelised(mesh), selection(net(), seed=rank))
    before = whole(other.model)
    optimizer = optimizer_of(other)
    loss_of(other.model, ids(2, 7)).backward()
    with pytest.raises(ValueError, match=r"rank 1 trains other positions than rank 0"):
        optimizer.step()
    same(whole(other.model), before, 0.0)
    later = sk.train_only(net(), selection(net()))
    parallelize_module(later.model, mesh, {"up": ColwiseParallel()})
    for call in (later.restore, lambda: list(later.parameters())):
        with pytest.raises(ValueError, match=r"is sharded.*call parallelize_module before train_only"):
            call()
    weird = nn.Linear(4, 4)
    weird.weight = nn.Parameter(
        distribute_tensor(weird.weight.detach(), init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)])
    )
    with pytest.raises(ValueError, match=r"'weight' is sharded as .*which is not supported"):
        sk.train_only(weird, Selection({"weight": Index(torch.arange(3), (4, 4))}))


SCENES = (
    other_optimizers,
    given_back,
    checkpoints,
    ways_to_run,
    no_gradient_is_communicated,
    changed_without_a_version,
    a_step_between_forward_and_backward,
    columns_of_one_rank,
    half_compiled,
    refusals,
)


def scenes(rank: int, world: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for scene in SCENES:
        scene(rank, world, mesh)
        dist.barrier()


@uses_processes
def test_two_processes(tmp_path: Path) -> None:
    in_processes(scenes, tmp_path)
