"""Checkpoints of transformers' Trainer and of accelerate: bf16 weights go on from their fp32 master, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from models import transformer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from trainers import Lines, trainer

import sparsekernels as sk
from sparsekernels import Selection

CASES = [("compact", torch.bfloat16), ("indexed", torch.bfloat16), ("dense", torch.float32)]


def prepared(form: str, dtype: torch.dtype) -> tuple[nn.Module, sk.SparseAdamW]:
    model = transformer("bert").to(dtype)
    if form == "dense":
        return model, sk.SparseAdamW(model.parameters(), lr=0.001, weight_decay=0.1)
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    chosen = Selection.random(model, 0.1, names=names)
    params = sk.train_only(model, chosen).parameters() if form == "compact" else chosen.param_groups(model)
    return model, sk.SparseAdamW(params, lr=0.001, weight_decay=0.1)


def assert_same(a: tuple[nn.Module, sk.SparseAdamW], b: tuple[nn.Module, sk.SparseAdamW]) -> None:
    for (name, ours), theirs in zip(a[0].named_parameters(), b[0].parameters(), strict=True):  # compact ones, too
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(a[1].state.values(), b[1].state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.compatibility("Trainer", "resume_from_checkpoint", "works")
@pytest.mark.parametrize(("form", "dtype"), CASES)
def test_trainer(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = prepared(form, dtype)
    trainer(whole[0], tmp_path, whole[1], max_steps=4, save_steps=2).train()
    again = prepared(form, dtype)
    more = {"max_steps": 4, "save_strategy": "no"}
    trainer(again[0], tmp_path, again[1], **more).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(whole, again)


@pytest.mark.compatibility("accelerate", "save_state and load_state, bf16 weights too", "works")
@pytest.mark.parametrize(("form", "dtype"), CASES)
def test_accelerate(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def run(first: int, last: int, save_after: int | None = None) -> tuple[nn.Module, sk.SparseAdamW]:
        accelerator = Accelerator(cpu=True)
        whole = prepared(form, dtype)
        model, optimizer = accelerator.prepare(*whole)
        scheduler = accelerator.prepare(LambdaLR(whole[1], lambda step: 1.0 / (1 + step)))
        if first:
            accelerator.load_state(str(tmp_path))
        for step in range(first, last):
            batch = {key: value[None] for key, value in Lines()[step].items()}
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step + 1 == save_after:
                accelerator.save_state(str(tmp_path))
        return whole

    assert_same(run(0, 4, save_after=2), run(2, 4))
