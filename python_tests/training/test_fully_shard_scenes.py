"""What is done with a model under fully_shard (FSDP2); each function is a scene that runs in two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Zoo, ids
from processes import in_processes, uses_processes
from sharded_models import (
    ADAMW,
    BATCH,
    fresh,
    loss_of,
    made,
    optimizer_of,
    same,
    selection,
    sharded,
    train,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import sparsekernels as sk
from sparsekernels import Index, Selection


def other_optimizers(rank: int, world: int, mesh: Any) -> None:
    """Those of torch write the weights too; options of SparseAdamW; an optimizer of model.parameters()."""
    results = []
    for make in (
        lambda run, tuned: optimizer_of(tuned),
        lambda run, tuned: torch.optim.AdamW(tuned.parameters(), **ADAMW),
        lambda run, tuned: sk.SparseAdamW([p for p in run.parameters() if p.requires_grad], **ADAMW),
        lambda run, tuned: optimizer_of(tuned, fused=True, amsgrad=True),
        lambda run, tuned: torch.optim.AdamW(tuned.parameters(), **ADAMW, amsgrad=True),
        lambda run, tuned: optimizer_of(tuned, state_dtype=torch.bfloat16, stochastic_rounding=True),
    ):
        run, tuned = fresh("zoo", mesh, "block")
        train(run, tuned, make(run, tuned), rank, world)
        results.append(whole(run))
    for a, b in ((0, 1), (0, 2), (3, 4)):
        same(results[a], results[b])
    same(results[5], results[0], 1e-2)
    assert not torch.equal(results[5]["up.weight"], results[0]["up.weight"])


def after_an_evaluation(rank: int, world: int, mesh: Any) -> None:
    """A forward without backward leaves the outermost weights gathered: a step then writes the shards all the same."""
    results = []
    for evaluate in (False, True):
        run, tuned = fresh("zoo", mesh)
        optimizer = optimizer_of(tuned)
        for step in range(2):
            loss_of(run, ids(BATCH, 7, seed=step)).backward()
            if evaluate:
                with torch.no_grad():
                    run(ids(2, 7))
            optimizer.step()
            optimizer.zero_grad()
        results.append([run(ids(3, 7)), whole(run)])
    assert torch.equal(results[0][0], results[1][0])
    same(results[1][1], results[0][1], 0.0)


def states_and_deltas(rank: int, world: int, mesh: Any) -> None:
    run, tuned = fresh("zoo", mesh, "row")
    train(run, tuned, optimizer_of(tuned), rank, world)
    if rank == 0:  # no communication
        assert run.state_dict().keys() == Zoo().state_dict().keys()
    state = whole(run)
    delta = tuned.delta()
    plain = made("zoo")
    delta.apply(plain)
    same(state, plain.state_dict(), 0.0)
    other, loaded = fresh("zoo", mesh, "row")
    with torch.no_grad():
        other(ids(2, 7))  # the outermost weights are gathered when the state comes
    other.load_state_dict(run.state_dict())
    run.load_state_dict({"scale": run.state_dict()["scale"]}, strict=False)  # no weight, and the next forward runs
    run(ids(2, 7))
    for values, wanted in zip(loaded.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(values.to_local(), wanted.to_local())
    changed = {name: x.clone() for name, x in run.state_dict().items()}
    changed["down.weight"].to_local().add_(float(rank))  # on one rank alone
    before = whole(other)
    with pytest.raises(ValueError, match=r"changes [\d,]+ weights of 'down.weight' that are not selected"):
        other.load_state_dict(changed)
    same(whole(other), before, 0.0)


def refusals(rank: int, world: int, mesh: Any) -> None:
    run, tuned = fresh("zoo", mesh)
    for call in (tuned.restore, tuned.merge, lambda: tuned.reselect(selection(made("zoo"), seed=2))):
        with pytest.raises(ValueError, match="not possible under fully_shard"):
            call()
    optimizer = optimizer_of(tuned)
    loss_of(run, ids(2, 7)).backward()
    optimizer.step()
    with torch.no_grad():
        next(tuned.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"changed outside of a step; call SparseModel.sync_"):
        run(ids(2, 7))
    tuned.sync_()
    run(ids(2, 7))
    name, index = next(iter(tuned.selection.items()))
    values = next(tuned.parameters()).full_tensor()
    assert torch.equal(sk.ops.gather(whole(run)[name], index), values)

    model = made("zoo")
    tuned = sk.train_only(model, selection(model))
    early = optimizer_of(tuned)
    loss_of(sharded(model, mesh), ids(2, 7)).backward()
    with pytest.raises(ValueError, match="no longer holds, for example after fully_shard"):
        early.step()

    run, tuned = fresh("zoo", mesh)
    optimizer = optimizer_of(tuned)
    alone = sk.train_only(made("zoo"), tuned.selection)
    plain = optimizer_of(alone)
    loss_of(alone.model, ids(2, 7)).backward()
    plain.step()
    with pytest.raises(ValueError, match=r"exp_avg in the state_dict must be DTensors.*set_optimizer_state_dict"):
        optimizer.load_state_dict(plain.state_dict())
    assert not optimizer.state

    model = made("zoo")
    sharded(model, mesh)
    with pytest.raises(ValueError, match=r"fully_shard .FSDP2., with its default placement, after it"):
        sk.train_only(model, selection(made("zoo")))

    model = nn.Sequential(nn.Linear(8, 8))
    tuned = sk.train_only(model, selection(model))
    from torch.distributed.tensor import Shard

    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    with pytest.raises(ValueError, match=r"'0.weight' is sharded as .*default placement"):
        list(tuned.parameters())


def other_selections(rank: int, world: int, mesh: Any) -> None:
    """As many positions on each rank, but others: refused in the first forward, or before a step where all is one."""
    for blocks in (True, False):
        model = made("zoo")
        sk.train_only(model, selection(model, seed=rank))
        run = sharded(model, mesh) if blocks else fully_shard(model, mesh=mesh)
        before = whole(run)
        refusing = pytest.raises(ValueError, match=r"rank 1 trains other positions than rank 0.*broadcast")
        optimizer = sk.SparseAdamW([p for p in run.parameters() if p.requires_grad], **ADAMW)
        if blocks:
            with refusing:
                run(ids(2, 7))
        else:
            loss_of(run, ids(2, 7)).backward()
            with refusing:
                optimizer.step()
        same(whole(run), before, 0.0)


def other_counts(rank: int, world: int, mesh: Any) -> None:
    """More positions on one rank than on the other, all in one FSDP group: refused before FSDP2 gathers them."""
    model = made("zoo")
    some = {"up.weight": Index(torch.arange(3 + rank), model.up.weight.shape)}
    tuned = sk.train_only(model, Selection(some))
    run = fully_shard(model, mesh=mesh)
    optimizer_of(tuned)
    with pytest.raises(ValueError, match=r"rank 1 trains other positions than rank 0.*broadcast"):
        run(ids(2, 7))


def moved_by_hand(rank: int, world: int, mesh: Any) -> None:
    """Module.to makes new local tensors, where a rank has any: no rank refuses, and the next step writes all values."""
    run, tuned = fresh("zoo", mesh)
    train(run, tuned, optimizer_of(tuned), rank, world, steps=1)
    run.double().float()
    run(ids(2, 7))
    train(run, tuned, optimizer_of(tuned), rank, world, steps=1)
    for (name, values), index in zip(tuned.named_parameters(), tuned.selection.values(), strict=True):
        assert torch.equal(sk.ops.gather(whole(run)[name], index), values.full_tensor()), name


def steps_that_would_be_half_done(rank: int, world: int, mesh: Any) -> None:
    """torch cannot step sharded and plain Parameters together with foreach=True: refused before anything changes."""
    run, tuned = fresh("zoo", mesh)
    head, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    fully_shard(head, mesh=mesh)
    params = [*tuned.parameters(), *head.parameters(), *plain.parameters()]
    optimizer = sk.SparseAdamW(params, **ADAMW, foreach=True)
    before = whole(run)
    loss_of(run, ids(2, 7)).backward()
    (head(torch.ones(1, 4)).sum() + plain(torch.ones(1, 4)).sum()).backward()
    with pytest.raises(ValueError, match=r"is sharded and .* is not, and foreach=True cannot step both"):
        optimizer.step()
    assert not optimizer.state
    same(whole(run), before, 0.0)


def errors_are_not_hidden(rank: int, world: int, mesh: Any) -> None:
    """restore() is not possible under fully_shard, so a with block that fails raises its own error."""

    def shard_within(error: Exception | None) -> None:
        model = made("zoo")
        with sk.train_only(model, selection(model)):
            sharded(model, mesh)
            if error is not None:
                raise error

    with pytest.raises(KeyError, match="mine"):
        shard_within(KeyError("mine"))
    with pytest.raises(ValueError, match=r"restore\(\) is not possible under fully_shard"):
        shard_within(None)


def ranks_without_positions(rank: int, world: int, mesh: Any) -> None:
    """Rows of one rank alone, a tensor with fewer rows than ranks, one position in all; as many rows as experts."""
    results = []
    for shard in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(1, 3))
        rows = Index(torch.arange(2), (8, 4), "row")
        chosen = {"0.weight": rows, "1.weight": Index(torch.tensor([3]), (1, 8)), "2.bias": Index.full((3,))}
        tuned = sk.train_only(model, Selection(chosen))
        run = fully_shard(model, mesh=mesh) if shard else model
        optimizer = optimizer_of(tuned)
        for _ in range(3):
            run(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(whole(run))
    same(results[1], results[0])
    results = []
    for shard in (False, True):
        model = made("zoo")
        rows = Index(torch.arange(3), model.experts.weight.shape, "row")
        tuned = sk.train_only(model, Selection({"experts.weight": rows}))
        run = sharded(model, mesh) if shard else model
        train(run, tuned, optimizer_of(tuned), rank if shard else 0, world if shard else 1)
        results.append(whole(run))
    same(results[1], results[0])


def in_part_and_copied(rank: int, world: int, mesh: Any) -> None:
    """Sharded are two layers alone, of a copy of the model; it is evaluated between backward and its first step."""
    model = made("zoo")
    sk.train_only(model, selection(model))
    wanted = copy.deepcopy(model)
    run = copy.deepcopy(model)
    fully_shard(run.up, mesh=mesh)
    fully_shard(run.experts, mesh=mesh)
    whole_too = sharded(copy.deepcopy(model), mesh)
    for each in (wanted, run, whole_too):
        optimizer = sk.SparseAdamW([p for p in each.parameters() if p.requires_grad], **ADAMW)
        loss_of(each, ids(4, 7)).backward()
        with torch.no_grad():
            each(ids(2, 7))
        optimizer.step()
        same(whole(each), wanted.state_dict())

    model = made("zoo")
    tuned = sk.train_only(model, selection(model))
    fully_shard(model.up, mesh=mesh)
    loss_of(model, ids(4, 7)).backward()
    optimizer_of(tuned).step()
    plain = made("zoo")
    tuned.delta().apply(plain)
    same(plain.state_dict(), whole(model), 0.0)


def half_precision(rank: int, world: int, mesh: Any) -> None:
    """bf16 while gathered, by MixedPrecisionPolicy: shards, values and moments stay fp32. Then weights in bf16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype, options in ((torch.float32, {"mp_policy": policy}), (torch.bfloat16, {})):
        model = made("llama").to(dtype)
        before = whole(model)
        tuned = sk.train_only(model, selection(model, "column"))
        run = sharded(model, mesh, **options)
        optimizer = sk.SparseAdamW(tuned.parameters(), **{**ADAMW, "eps": 1e-8})
        train(run, tuned, optimizer, rank, world)
        after = whole(run)
        for (name, values), index in zip(tuned.named_parameters(), tuned.selection.values(), strict=True):
            assert values.dtype == optimizer.state[values]["exp_avg"].dtype == torch.float32
            weight = after[name]
            assert weight.dtype == dtype
            assert torch.equal(sk.ops.gather(weight, index), values.full_tensor().to(dtype)), name
            assert torch.equal(weight[~index.mask()], before[name][~index.mask()]), name
            moved = (values.full_tensor() - sk.ops.gather(before[name], index).float()).abs().max()
            assert 1e-3 < moved < 1.2e-2, name  # five steps of 1e-3 at most each, and the decay


def ways_to_run(rank: int, world: int, mesh: Any) -> None:
    """Gradient checkpointing, where a block is gathered and run again in backward; compiled; with offloaded shards."""
    results = []
    for way in ("plain", "checkpointed", "gathered", "offloaded", "compiled"):
        model = made("llama")
        tuned = sk.train_only(model, selection(model, "column"))
        options: dict[str, Any] = {"reshard_after_forward": way != "gathered"}
        if way == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if way == "offloaded":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for block in model.model.layers if way == "compiled" else ():
            block.compile(backend="aot_eager", fullgraph=True)
        run = sharded(model, mesh, **options)
        train(run, tuned, optimizer_of(tuned), rank, world)
        results.append(whole(run))
    for other in results[1:-1]:
        same(other, results[0], 0.0)
    same(results[-1], results[0])


def meta_device(rank: int, world: int, mesh: Any) -> None:
    """A model too large for one process: made without memory, sharded, then loaded from one rank or from all."""
    run, tuned = fresh("zoo", mesh)
    base = whole(run)
    with torch.device("meta"):
        model = Zoo()
    early = sk.train_only(model, selection(made("zoo")))
    sharded(model, mesh)
    with pytest.raises(ValueError, match=r"meta device: make the optimizer after to_empty\(\)"):
        list(early.parameters())
    train(run, tuned, optimizer_of(tuned), rank, world)
    trained = whole(run)
    for from_one in (False, True):
        with torch.device("meta"):
            model = Zoo()
        tuned = sk.train_only(model, selection(made("zoo")))
        run = sharded(model, mesh)
        run.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_one)
        set_model_state_dict(run, {} if from_one and rank else dict(base), options=options)
        train(run, tuned, optimizer_of(tuned), rank, world)
        same(whole(run), trained, 0.0)


def skipped_steps(rank: int, world: int, mesh: Any) -> None:
    """GradScaler: a gradient that is infinite on one rank skips the step on all of them."""
    run, tuned = fresh("zoo", mesh)
    optimizer, scaler = optimizer_of(tuned), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        before = whole(run)
        loss = loss_of(run, ids(4, 7, seed=step)) * (float("inf") if step == rank == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(whole(run)["up.weight"], before["up.weight"]) == (step == 1)
    assert scaler.get_scale() == 512.0


SCENES = (
    other_optimizers,
    after_an_evaluation,
    states_and_deltas,
    refusals,
    other_selections,
    other_counts,
    moved_by_hand,
    steps_that_would_be_half_done,
    errors_are_not_hidden,
    ranks_without_positions,
    in_part_and_copied,
    half_precision,
    ways_to_run,
    meta_device,
    skipped_steps,
)


def scenes(rank: int, world: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for scene in SCENES:
        scene(rank, world, mesh)
        dist.barrier()


@pytest.mark.compatibility("FSDP", "FSDP2 with MixedPrecisionPolicy, CPUOffloadPolicy, bf16 weights", "works")
@pytest.mark.compatibility("FSDP", "FSDP2 with gradient checkpointing, compiled blocks, GradScaler", "works")
@pytest.mark.compatibility("FSDP", "FSDP2 of a model on the meta device, loaded afterwards", "works")
@pytest.mark.compatibility("FSDP", "FSDP2 and ranks that train different positions", "refused")
@pytest.mark.compatibility("FSDP", "FSDP2 before `train_only`", "refused")
@uses_processes
def test_two_processes_with_shards(tmp_path: Path) -> None:
    in_processes(scenes, tmp_path)
