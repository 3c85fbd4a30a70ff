"""SparseAdamW inside the loops of accelerate and transformers: what these do with an optimizer leaves its numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from models import transformer
from samples.case import put, take
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch_cases import FORMS
from trainers import Lines

import sparsekernels as sk
from sparsekernels import Selection

DECAY = {"lr": 0.02, "weight_decay": 0.1}


def prepared(form: str, seed: int = 0) -> tuple[nn.Module, Selection | None, Any]:
    """A tiny model, what is selected of it, and the params of an optimizer that trains that."""
    model = transformer("bert")
    if form == "dense":
        return model, None, model.parameters()
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    chosen = Selection.random(model, 0.1, names=names, seed=seed)
    if form == "indexed":
        return model, chosen, chosen.param_groups(model)
    return model, chosen, sk.train_only(model, chosen).parameters()


def assert_only_selected_moved(model: nn.Module, before: dict[str, Tensor], chosen: Selection | None) -> None:
    for name, now in model.state_dict().items():
        if chosen is not None and name in chosen:
            assert torch.equal(put(now, chosen[name], take(before[name], chosen[name])), before[name]), name
            assert not torch.equal(now, before[name]), name
        elif chosen is not None:
            assert torch.equal(now, before[name]), name


def assert_equal_weights(a: nn.Module, b: nn.Module, exact: bool) -> None:
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        if exact:
            assert torch.equal(ours, theirs), name
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


def decay_later(step: int) -> float:
    return 1.0 / (1 + step)


@pytest.mark.compatibility("accelerate", "gradient accumulation, clipping and a scheduler", "works")
@pytest.mark.parametrize("form", FORMS)
def test_accelerate(form: str) -> None:
    """Prepared, accumulated over two micro-batches, clipped, scheduled: the loop written out, to the last bit."""
    batches = torch.utils.data.DataLoader(Lines(), batch_size=3)

    model, chosen, params = prepared(form)
    before = copy.deepcopy(model.state_dict())
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = sk.SparseAdamW(params, **DECAY)
    schedule = LambdaLR(optimizer, decay_later)
    wrapped, prepared_optimizer, loader, scheduler = accelerator.prepare(model, optimizer, batches, schedule)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
            prepared_optimizer.step()
            scheduler.step()
            prepared_optimizer.zero_grad()
    assert not prepared_optimizer.step_was_skipped
    assert_only_selected_moved(model, before, chosen)
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {4.0}
    if form == "indexed":
        assert all(group["indices"] for group in optimizer.param_groups)

    twin, _, params = prepared(form)
    plain = sk.SparseAdamW(params, **DECAY)
    schedule = LambdaLR(plain, decay_later)
    for number, batch in enumerate(batches, 1):
        (twin(**batch).loss / 2).backward()
        if number % 2 == 0:
            clip_grad_norm_(twin.parameters(), 0.5)
            plain.step()
            schedule.step()
            plain.zero_grad()
    assert plain.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_equal_weights(model, twin, exact=True)


def trainer(model: nn.Module, folder: Path, **more: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=5,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=0.01,
        weight_decay=0.1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=Lines(), **more)


@pytest.mark.compatibility("Trainer", "`optimizers=(SparseAdamW, scheduler)`", "works")
@pytest.mark.parametrize("form", FORMS)
def test_trainer_with_optimizer_and_scheduler(form: str, tmp_path: Path) -> None:
    """optimizers=(SparseAdamW, scheduler): as with torch.optim.AdamW over the same weights, where it can train them."""
    model, chosen, params = prepared(form)
    before = copy.deepcopy(model.state_dict())
    own = sk.SparseAdamW(params, **DECAY)
    schedule = LambdaLR(own, decay_later)
    trainer(model, tmp_path, optimizers=(own, schedule)).train()
    assert_only_selected_moved(model, before, chosen)
    assert {float(state["step"]) for state in own.state.values()} == {5.0}
    assert own.param_groups[0]["lr"] == pytest.approx(0.02 / 6)

    # torch's AdamW trains dense parameters as they are, and the other two as compact Parameters: but the clipped
    # norm of indexed ones is that of all gradients, so that form is held against its own loop above.
    if form != "indexed":
        twin, _, params = prepared(form)
        plain = torch.optim.AdamW(params, **DECAY)
        trainer(twin, tmp_path, optimizers=(plain, LambdaLR(plain, decay_later))).train()
        assert_equal_weights(model, twin, exact=form == "dense")


@pytest.mark.compatibility("Trainer", "`optimizer_cls_and_kwargs=(SparseAdamW, ...)`", "works")
@pytest.mark.parametrize("form", ["compact", "dense"])
def test_trainer_with_class_and_options(form: str, tmp_path: Path) -> None:
    """optimizer_cls_and_kwargs: Trainer makes the groups, with decay and without, out of what trains."""
    runs = []
    for cls in (sk.SparseAdamW, torch.optim.AdamW):
        model, chosen, _ = prepared(form)
        before = copy.deepcopy(model.state_dict())
        made = trainer(model, tmp_path, optimizer_cls_and_kwargs=(cls, {"lr": 0.03, "betas": (0.8, 0.9)}))
        made.train()
        groups = made.optimizer.param_groups
        assert type(made.optimizer.optimizer) is cls
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert groups[0]["betas"] == (0.8, 0.9)
        assert_only_selected_moved(model, before, chosen)
        runs.append((model, [len(group["params"]) for group in groups]))
    assert runs[0][1] == runs[1][1]
    assert sum(runs[0][1]) == len([p for p in runs[0][0].parameters() if p.requires_grad])
    assert_equal_weights(runs[0][0], runs[1][0], exact=form == "dense")


def test_trainer_decays_compact_parameters_of_weights(tmp_path: Path) -> None:
    """Trainer leaves out of the decay what its own rule names: compact Parameters of matrices are not among them."""
    model, chosen, _ = prepared("compact")
    assert chosen is not None
    made = trainer(model, tmp_path, optimizer_cls_and_kwargs=(sk.SparseAdamW, {}))
    decayed = set(made.get_decay_parameter_names(model))
    assert {name + "_values" for name in chosen} <= decayed


@pytest.mark.compatibility("Trainer", "indexed parameters: `params` in `optimizer_cls_and_kwargs`", "works")
def test_trainer_takes_groups_with_indices_among_the_options(tmp_path: Path) -> None:
    """`params` in the options replaces the groups that Trainer would make."""
    model, chosen, groups = prepared("indexed")
    before = copy.deepcopy(model.state_dict())
    trainer(model, tmp_path, optimizer_cls_and_kwargs=(sk.SparseAdamW, {"params": groups, **DECAY})).train()
    assert_only_selected_moved(model, before, chosen)
    twin, _, groups = prepared("indexed")
    trainer(twin, tmp_path, optimizers=(sk.SparseAdamW(groups, **DECAY), None)).train()
    assert_equal_weights(model, twin, exact=True)
