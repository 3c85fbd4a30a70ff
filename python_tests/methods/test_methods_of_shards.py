"""Methods on a model under fully_shard (FSDP2): on four ranks they select what they select in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids
from processes import in_processes, uses_processes
from sharded_models import BATCH, UNITS, loss_of, made, same, sharded, whole
from torch.distributed.device_mesh import init_device_mesh

import sparsekernels as sk
from sparsekernels import Index, Selection
from sparsekernels.methods import ks_lottery

WORLD = 4
TABLE = "model.embed_tokens.weight"


def sift_of_shards(rank: int, world: int, mesh: Any) -> None:
    """Each rank with its part of the batches: the Selection of one process with all of them, and its report."""
    batches = [{"input_ids": ids(BATCH, 7, seed=seed), "labels": ids(BATCH, 7, seed=seed)} for seed in range(2)]
    mine = [{name: x.chunk(world)[rank] for name, x in batch.items()} for batch in batches]
    for units in ({}, {"granularity": "row"}, {"granularity": "column", "share_inputs": True}, UNITS["block"]):
        for count in (1, 2):
            options = {**units, "density": 0.1, "num_batches": count, "progress": False}
            model = made("llama").double()
            wanted = sk.methods.sift(model, batches, **options)
            run = sharded(model, mesh)
            found = sk.methods.sift(run, mine, **options)
            assert found == wanted, options
            curves = [torch.tensor(each.report["curve"]) for each in (found, wanted)]
            assert torch.allclose(*curves, rtol=1e-9)
            assert all(p.grad is None for p in run.parameters())
    for p in run.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen: under fully_shard"):
        sk.methods.sift(run, mine, progress=False)


def ks_lottery_of_shards(rank: int, world: int, mesh: Any) -> None:
    """A table of 61 rows, of which the last rank has fewer; `after` as sharded weights or the values trained."""
    results = []
    for shard in (False, True):
        model = made("llama")
        tuned = sk.train_only(model, Selection({TABLE: Index.full(model.get_parameter(TABLE).shape)}))
        run = sharded(model, mesh) if shard else model
        optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1, weight_decay=0.0)
        before = run.get_parameter(TABLE).detach().clone()
        for seed in range(3):
            batch = ids(BATCH, 7, seed=seed)
            loss_of(run, batch.chunk(world)[rank] if shard else batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = whole(run)[TABLE]
        results.append(
            [
                ks_lottery.select(before, model, 0.2),
                ks_lottery.select(before, tuned, 0.2, "bh"),
                ks_lottery.select(before, model, 1e-9),  # none: the ticket is chosen by size
                ks_lottery.by_shift(before, model, k=7),
            ]
        )
        # The training of several ranks differs in rounding: the oracle tests the same tables in one process.
        plain = getattr(before, "full_tensor", lambda before=before: before)()
        wanted = [
            ks_lottery.select(plain, after, 0.2, name=TABLE),
            ks_lottery.select(plain, after, 0.2, "bh", name=TABLE),
            ks_lottery.select(plain, after, 1e-9, name=TABLE),
            ks_lottery.by_shift(plain, after, k=7, name=TABLE),
        ]
        for found, oracle in zip(results[-1], wanted, strict=True):
            assert found == oracle
            assert found.report.keys() == oracle.report.keys()
            for key, value in oracle.report.items():
                assert torch.equal(torch.as_tensor(found.report[key]), torch.as_tensor(value)), key
        assert 0 < len(wanted[0][TABLE]) < 61
    assert results[0] == results[1]
    with pytest.raises(ValueError, match=r"must both be .* as it is sharded: clone the DTensor before tuning"):
        ks_lottery.select(plain, model)
    broken = before.clone()
    if rank == 1:
        broken.to_local()[2, 3] = torch.nan
    with pytest.raises(ValueError, match="has NaN in row 18, before or after"):
        ks_lottery.select(broken, model)


def fish_of_shards(rank: int, world: int, mesh: Any) -> None:
    """All ranks with the same samples. In fp64, since one process squares a batch at once, in another order."""
    samples = [{"input_ids": ids(3, 7, seed=seed), "labels": ids(3, 7, seed=seed)} for seed in range(2)]
    for units in UNITS.values():
        model = made("llama").double()
        wanted = sk.methods.fish(model, samples, 0.1, num_samples=5, progress=False, **units)
        run = sharded(model, mesh)
        before = whole(run)
        found = sk.methods.fish(run, samples, 0.1, num_samples=5, progress=False, **units)
        assert found == wanted, units
        assert found.report["samples"] == 5
        assert found.report["carried"] == pytest.approx(wanted.report["carried"], rel=1e-9)
        assert all(p.grad is None for p in run.parameters())
        same(whole(run), before, 0.0)
    model = made("gpt2").double()
    wanted = sk.fisher_diagonal(model, samples, progress=False)
    found = sk.fisher_diagonal(sharded(model, mesh), samples, progress=False)
    same({name: x.full_tensor() for name, x in found.items()}, wanted, 1e-9)

    mine = [{name: x.roll(rank, 0) for name, x in batch.items()} for batch in samples]
    with pytest.raises(ValueError, match=r"rank 1 has others than rank 0.*without a DistributedSampler"):
        sk.fisher_diagonal(run, mine, progress=False)
    with pytest.raises(ValueError, match="labels='expected' is not possible under fully_shard"):
        sk.fisher_diagonal(run, samples, labels="expected")
    with pytest.raises(ValueError, match="selection is not possible under fully_shard"):
        sk.fisher_diagonal(run, samples, selection=Selection.random(run, 0.1))
    next(run.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is frozen"):
        sk.fisher_diagonal(run, samples)
    next(run.parameters()).requires_grad_(True)
    weighted = [{**batch, "weight": torch.tensor([1.0, 1.0, 1.0])} for batch in samples]
    weighted[1]["weight"][1] = torch.inf
    with pytest.raises(ValueError, match="the gradient of sample 1 in batch 1 is not finite"):
        sk.fisher_diagonal(run, weighted, loss=weighted_squares, progress=False)
    assert all(p.grad is None for p in run.parameters())


def weighted_squares(model: Any, batch: Any) -> torch.Tensor:
    squares: torch.Tensor = model(batch["input_ids"]).logits.square().flatten(1).mean(1) * batch["weight"]
    return squares


def scenes(rank: int, world: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for scene in (sift_of_shards, fish_of_shards, ks_lottery_of_shards):
        scene(rank, world, mesh)


@pytest.mark.compatibility("FSDP", "`methods.sift`, `fish` and `ks_lottery.select` of a model under FSDP2", "works")
@uses_processes
def test_ranks_select_as_one_process(tmp_path: Path) -> None:
    in_processes(scenes, tmp_path, WORLD)
