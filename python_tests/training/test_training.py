"""Whole training loops: frozen weights keep their bits, and what people build around a loop works as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import Zoo, batch, ids, transformer
from samples.case import put, take
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from trainers import trainer

import sparsekernels as sk
from sparsekernels import Index, Selection

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SparseAdamW": sk.SparseAdamW,
    "AdamW": torch.optim.AdamW,
    "AdamW-fused": lambda *args, **more: torch.optim.AdamW(*args, fused=True, **more),
}


def loss_of(model: nn.Module, seed: int) -> Tensor:
    return model(ids(4, 7, seed=seed)).float().square().mean()


def assert_only_selected_changed(model: nn.Module, before: dict[str, Tensor], selection: Selection) -> None:
    """Outside of the selection every bit is as it was; inside, every tensor moved."""
    for name, now in model.state_dict().items():
        if name not in selection:
            assert torch.equal(now, before[name]), name
            continue
        index = selection[name]
        assert torch.equal(put(now, index, take(before[name], index)), before[name]), f"{name} changed outside"
        assert not torch.equal(now, before[name]), f"{name} did not train"


GRAINS: dict[str, dict[str, Any]] = {
    "elements": {},
    "rows": {"granularity": "row"},
    "columns": {"granularity": "column"},
    "blocks": {"granularity": "block", "block": (5, 3)},
}


def mixed(model: nn.Module) -> Selection:
    """Elements, rows, columns and blocks in turn."""
    each = [Selection.random(model, 0.2, **units) for units in GRAINS.values()]
    return Selection({name: each[i % len(each)][name] for i, name in enumerate(each[0])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_unselected_weights_keep_their_bits(optimizer: str, dtype: torch.dtype) -> None:
    model = Zoo().to(dtype)
    before, selection = copy.deepcopy(model.state_dict()), mixed(model)
    tuned = sk.train_only(model, selection)
    stepper = OPTIMIZERS[optimizer](tuned.parameters(), lr=0.05, weight_decay=0.5)
    first = loss_of(model, 0).item()
    for seed in range(8):
        loss_of(model, seed).backward()
        stepper.step()
        stepper.zero_grad()
    assert_only_selected_changed(model, before, selection)
    assert loss_of(model, 0).item() < first
    tuned.merge()
    assert_only_selected_changed(model, before, selection)


@pytest.mark.compatibility("Any torch optimizer", "over `SparseModel.parameters()`", "works")
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW-fused"])
def test_any_optimizer_trains_the_same_model(optimizer: str) -> None:
    """SparseAdamW is AdamW on the same compact Parameters."""
    model = Zoo().double()
    twin = copy.deepcopy(model)
    for m, name in ((model, "SparseAdamW"), (twin, optimizer)):
        tuned = sk.train_only(m, mixed(m))
        stepper = OPTIMIZERS[name](tuned.parameters(), lr=0.05, weight_decay=0.1)
        for seed in range(5):
            loss_of(m, seed).backward()
            stepper.step()
            stepper.zero_grad()
    for key, value in model.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[key], rtol=1e-9, atol=1e-12), key


def test_all_positions_are_dense_fine_tuning() -> None:
    model = Zoo().double()
    dense = copy.deepcopy(model)
    tuned = sk.train_only(model, Selection({name: Index.full(p.shape) for name, p in model.named_parameters()}))
    runs = (
        (model, sk.SparseAdamW(tuned.parameters(), lr=0.02)),
        (dense, torch.optim.AdamW(dense.parameters(), lr=0.02)),
    )
    for m, stepper in runs:
        for seed in range(20):
            loss_of(m, seed).backward()
            stepper.step()
            stepper.zero_grad()
    for key, value in dense.state_dict().items():
        assert torch.allclose(value, model.state_dict()[key], rtol=1e-6, atol=1e-9), key


@pytest.mark.parametrize("units", GRAINS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_is_dense_training_with_masked_gradients(kind: str, units: str) -> None:
    """The oracle: torch's AdamW over whole weights whose gradients are masked; moments stay zero elsewhere."""
    model = transformer(kind).double()
    dense = copy.deepcopy(model)
    selection = Selection.random(model, 0.3, **GRAINS[units])
    tuned = sk.train_only(model, selection)
    own = sk.SparseAdamW(tuned.parameters(), lr=0.01, weight_decay=0.0)
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(4):
        for m, stepper in ((model, own), (dense, theirs)):
            stepper.zero_grad()
            (100 * m(**batch(kind)).loss).backward()
        for name, p in dense.named_parameters():
            p.grad.mul_(put(torch.zeros_like(p), selection[name], torch.ones(selection[name].compact_shape)))
        own.step()
        theirs.step()
    for name, p in dense.named_parameters():
        assert torch.allclose(model.get_parameter(name), p, rtol=1e-8, atol=1e-11), name


@pytest.mark.parametrize("optimizer", ["SparseAdamW", "AdamW"])
def test_bf16_weights_follow_an_fp32_run(optimizer: str) -> None:
    """The fp32 master keeps every update: steps far below the resolution of bf16 add up."""
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    wide = nn.Linear(8, 8, bias=False)
    wide.load_state_dict(model.state_dict())
    tuned = sk.train_only(model, Selection.random(model, 0.5))
    (index,) = tuned.selection.values()
    master = sk.train_only(wide, Selection(dict(tuned.selection)))
    steppers = [OPTIMIZERS[optimizer](t.parameters(), lr=1e-5, weight_decay=0.0) for t in (tuned, master)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        grad = torch.randn(len(index), generator=generator) + 3
        for t, stepper in zip((tuned, master), steppers, strict=True):
            next(t.parameters()).grad = grad.clone()
            stepper.step()
    (ours,), (theirs,) = tuned.parameters(), master.parameters()
    assert torch.equal(ours.detach(), theirs.detach())
    assert torch.equal(model.weight.detach(), wide.weight.detach().to(torch.bfloat16))
    moved = take(model.weight.detach(), index) != next(iter(tuned.slots.values())).originals
    assert moved.float().mean() > 0.9  # 200 steps of 1e-5; a single one would round to nothing


@pytest.mark.compatibility("torch", "clip_grad_norm_", "works")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradient_clipping(optimizer: str) -> None:
    model = Zoo()
    tuned = sk.train_only(model, mixed(model))
    stepper = OPTIMIZERS[optimizer](tuned.parameters(), lr=0.05)
    loss_of(model, 0).backward()
    expected = torch.stack([values.grad.norm() for values in tuned.parameters()]).norm()
    assert torch.allclose(clip_grad_norm_(model.parameters(), 0.01), expected)
    clipped = torch.stack([values.grad.norm() for values in tuned.parameters()]).norm()
    assert torch.allclose(clipped, torch.tensor(0.01), rtol=1e-3)
    stepper.step()


@pytest.mark.compatibility("torch", "GradScaler", "works")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grad_scaler(optimizer: str) -> None:
    """A scaled run is the run without scaling; a step with infinite gradients is left out."""
    model = Zoo()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    tuned, other = sk.train_only(model, mixed(model)), sk.train_only(plain, mixed(plain))
    stepper, plain_stepper = (OPTIMIZERS[optimizer](t.parameters(), lr=0.05) for t in (tuned, other))
    for seed in range(4):
        scaler.scale(loss_of(model, seed)).backward()
        scaler.unscale_(stepper)
        clip_grad_norm_(tuned.parameters(), 1.0)
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad()
        loss_of(plain, seed).backward()
        clip_grad_norm_(other.parameters(), 1.0)
        plain_stepper.step()
        plain_stepper.zero_grad()
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, model.state_dict()[key], rtol=1e-4, atol=1e-6), key

    before, steps = copy.deepcopy(model.state_dict()), [int(s["step"]) for s in stepper.state.values()]
    (scaler.scale(loss_of(model, 0)) * float("inf")).backward()
    scaler.step(stepper)
    scaler.update()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [int(s["step"]) for s in stepper.state.values()] == steps
    assert scaler.get_scale() == 512.0


@pytest.mark.compatibility("Trainer", "gradient accumulation and clipping, with its own AdamW too", "works")
@pytest.mark.compatibility("Trainer", "resume_from_checkpoint", "works")
@pytest.mark.parametrize("units", GRAINS)
@pytest.mark.parametrize("optimizer", ["Trainer's own", "SparseAdamW"])
def test_hugging_face_trainer(optimizer: str, units: str, tmp_path: Path) -> None:
    """Trains, clips, saves plain checkpoints, and goes on from one as if it had never stopped."""

    def prepared() -> tuple[nn.Module, sk.SparseModel, torch.optim.Optimizer | None]:
        model = transformer("bert")
        names = [n for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n]
        tuned = sk.train_only(model, Selection.random(model, 0.1, names=names, **GRAINS[units]))
        own = sk.SparseAdamW(tuned.parameters(), lr=0.02, weight_decay=0.1) if optimizer == "SparseAdamW" else None
        return model, tuned, own

    model, tuned, own = prepared()
    before = copy.deepcopy(model.state_dict())
    trainer(model, tmp_path, own, gradient_accumulation_steps=2, max_grad_norm=0.5).train()
    assert_only_selected_changed(model, before, tuned.selection)

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6").train()
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())

    again, _, own = prepared()
    more = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "save_strategy": "no"}
    trainer(again, tmp_path, own, **more).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key, value in model.state_dict().items():
        assert torch.allclose(value, again.state_dict()[key], rtol=1e-5, atol=1e-7), key


@pytest.mark.compatibility("Trainer", "`bf16=True` with gradient checkpointing", "works")
def test_trainer_with_checkpointing_and_bf16(tmp_path: Path) -> None:
    model = transformer("bert")
    selection = Selection.random(
        model, 0.1, names=[n for n, p in model.named_parameters() if "layer" in n and p.dim() == 2]
    )
    before = copy.deepcopy(model.state_dict())
    tuned = sk.train_only(model, selection)
    own = sk.SparseAdamW(tuned.parameters(), lr=0.02)
    model.gradient_checkpointing_enable()
    trainer(model, tmp_path, own, bf16=True, max_steps=2, save_strategy="no").train()
    assert_only_selected_changed(model, before, selection)
