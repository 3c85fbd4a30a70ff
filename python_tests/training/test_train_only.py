"""train_only and the way back: what changes, what does not, and that everything is put back as it was found."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import WIDTH, Experts, Zoo, batch, ids, transformer
from samples.case import take
from torch import nn

import sparsekernels as sk
from sparsekernels import Index, Selection

HOOKS = [name for name in vars(nn.Linear(1, 1)) if "hooks" in name]


def bits(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def found(model: nn.Module, with_bits: bool = True) -> list[Any]:
    """Everything about a model that must come back: identities, order, classes, hooks, flags, bits."""
    facts: list[Any] = [list(model.state_dict())]
    for name, module in model.named_modules():
        facts.append(
            (name, type(module), sorted(vars(module)), sorted(module._non_persistent_buffers_set), module.training)
        )
        facts.append([(hook, len(getattr(module, hook))) for hook in HOOKS])
    for entries in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for n, t in entries:
            facts.append(
                (n, id(t), type(t), t.requires_grad, id(t.grad), sorted(vars(t)), bits(t) if with_bits else None)
            )
    return facts


def zoo() -> Zoo:
    """A model in a state that nobody would guess: a frozen part, a gradient left over, one module in eval mode."""
    model = Zoo()
    model.conv.requires_grad_(False)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    model.norm.eval()
    return model


def train(model: nn.Module, tuned: sk.SparseModel, steps: int = 3) -> None:
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(steps):
        model(ids(4, 7, seed=step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def some(model: nn.Module) -> Selection:
    return Selection.random(model, 0.3) | Selection({"down.weight": Index.full(model.down.weight.shape)})


def test_only_the_values_are_trainable() -> None:
    model = zoo()
    before, selection = {id(p) for p in model.parameters()}, some(model)
    tuned = sk.train_only(model, selection)
    assert tuned.model is model
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in tuned.parameters()}
    assert not before & {id(p) for p in tuned.parameters()}
    assert [name for name, _ in tuned.named_parameters()] == list(selection)
    for name, values in tuned.named_parameters():
        assert isinstance(values, nn.Parameter)
        assert values.shape == tuned.selection[name].compact_shape
        weight = dict(model.named_parameters())[name]
        assert torch.equal(values.detach(), take(weight.detach(), tuned.selection[name]))
    assert dict(tuned.selection) == dict(selection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("leave", ["restore", "context", "exception"])
def test_everything_comes_back(leave: str, dtype: torch.dtype) -> None:
    model = zoo().to(dtype)
    before = found(model)
    tuned = sk.train_only(model, some(model))
    assert found(model) != before
    if leave == "restore":
        train(model, tuned)
        assert tuned.restore() is model
    elif leave == "context":
        with tuned as entered:
            assert entered is tuned
            train(model, tuned)
    else:
        train(model, tuned)
        with pytest.raises(KeyboardInterrupt), tuned:
            raise KeyboardInterrupt
    assert found(model) == before
    tuned.restore()  # nothing happens the second time
    assert found(model) == before


@pytest.mark.parametrize("kind", ["bert-mlm", "gpt2", "llama"])
def test_everything_comes_back_in_transformers(kind: str) -> None:
    model = transformer(kind)
    before = found(model)
    with sk.train_only(model, Selection.random(model, 0.1)) as tuned:
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1)
        model(**batch(kind)).loss.backward()
        optimizer.step()
    assert found(model) == before


def test_originals_come_back_even_where_the_weight_was_written_from_outside() -> None:
    model = zoo()
    before = model.up.weight.detach().clone()
    selection = Selection.random(model, 0.3, names=["up.weight"])
    tuned = sk.train_only(model, selection)
    with torch.no_grad():
        model.up.weight.zero_()
    tuned.restore()
    index = selection["up.weight"]
    assert torch.equal(take(model.up.weight.detach(), index), take(before, index))


@pytest.mark.parametrize("optimizer", [sk.SparseAdamW, torch.optim.AdamW])
def test_merge_keeps_the_weights_and_nothing_else(optimizer: type[torch.optim.Optimizer]) -> None:
    model = zoo()
    before = found(model, with_bits=False)
    selection = some(model)
    tuned = sk.train_only(model, selection)
    step = optimizer(tuned.parameters(), lr=0.1)
    model(ids(4, 7)).square().sum().backward()
    step.step()
    trained = {name: values.detach().clone() for name, values in tuned.named_parameters()}
    assert tuned.merge() is model
    tuned.restore()  # merged: there is nothing left to restore
    for name, values in trained.items():
        assert torch.equal(take(model.get_parameter(name).detach(), selection[name]), values)
    assert found(model, with_bits=False) == before


def test_after_leaving_it_can_be_done_again() -> None:
    model = Zoo()
    for leave in ("restore", "merge", "restore"):
        tuned = sk.train_only(model, Selection.random(model, 0.1))
        train(model, tuned)
        getattr(tuned, leave)()
    # The hook on optimizer steps no longer knows the model.
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


@pytest.mark.parametrize("leave", ["restore", "merge"])
@pytest.mark.parametrize("optimizer", [sk.SparseAdamW, torch.optim.AdamW])
def test_an_optimizer_that_is_left_over_does_no_harm(optimizer: type[torch.optim.Optimizer], leave: str) -> None:
    """A step after the model was given back may be refused; it may not write into the model."""
    model = Zoo()
    tuned = sk.train_only(model, some(model))
    step = optimizer(tuned.parameters(), lr=0.1)
    for _ in range(2):  # a second time, for what an optimizer keeps from its first
        model(ids(4, 7)).square().sum().backward()
        step.step()
    getattr(tuned, leave)()
    before = found(model)
    with contextlib.suppress(RuntimeError):
        step.step()
    assert found(model) == before


def untied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def clashing(suffix: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_buffer(f"weight{suffix}", torch.zeros(2))
    return model


def transposed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.randn(4, 4).T)
    return model


def integers() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_parameter("codes", nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False))
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]], str]] = {
    "unknown name": (zoo, {"up.weight": (32, 16), "up.wait": (32, 16)}, r"lacks: up\.wait"),
    "other shape": (
        zoo,
        {"up.weight": (32, 16), "down.weight": (32, 16)},
        r"made for shape \[32, 16\].*has \[16, 32\]",
    ),
    "a buffer": (zoo, {"scale": ()}, "lacks: scale"),
    "one weight twice": (
        untied,
        {"0.weight": (4, 4), "1.weight": (4, 4)},
        "'1.weight' and '0.weight' are one tied weight",
    ),
    "not contiguous": (transposed, {"0.weight": (4, 4), "1.weight": (4, 4)}, "'1.weight' is not contiguous"),
    "integers": (integers, {"0.weight": (4, 4), "1.codes": (4,)}, "'1.codes' is torch.int8"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), {"weight": (4, 4)}, "max_norm"),
    "values there": (lambda: clashing("_values"), {"0.weight": (4, 4), "1.weight": (4, 4)}, "weight_values"),
    "out_proj of attention": (lambda: nn.MultiheadAttention(4, 2), {"out_proj.weight": (4, 4)}, "MultiheadAttention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_leaves_the_model_as_it_was(case: str) -> None:
    make, shapes, words = REFUSED[case]
    model = make()
    before = found(model)
    with pytest.raises((ValueError, KeyError), match=words):
        sk.train_only(model, Selection({name: Index.full(shape) for name, shape in shapes.items()}))
    assert found(model) == before


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_failure_half_way_leaves_the_model_as_it_was(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say, after some tensors have their values already."""
    model = zoo()
    before, selection = found(model), some(model)
    calls = itertools.count()

    def gather(*args: Any) -> torch.Tensor:
        if next(calls) == at:
            raise MemoryError
        return sk.ops.gather(*args)

    monkeypatch.setattr(sys.modules["sparsekernels.training.compact"], "gather", gather)
    with pytest.raises(MemoryError):
        sk.train_only(model, selection)
    assert found(model) == before


def test_twice_is_refused() -> None:
    model = zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.1, names=["up.weight"]))
    before = found(model)
    with pytest.raises(ValueError, match="already trains a selection"):
        sk.train_only(model, Selection.random({"down.weight": (16, 32)}, 0.1))
    assert found(model) == before
    tuned.restore()


def test_weights_in_a_shared_module_and_under_parametrized_names() -> None:
    """One module object in two places is one weight."""
    shared = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(shared, nn.Tanh(), shared, Experts())
    before = found(model)
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    assert list(tuned.slots) == ["0.weight", "0.bias", "3.weight"]
    model(torch.randn(3, WIDTH)).sum().backward()
    assert all(values.grad is not None for values in tuned.parameters())
    tuned.restore()
    assert found(model) == before


def test_an_empty_selection_freezes() -> None:
    model = zoo()
    before = found(model)
    tuned = sk.train_only(model, Selection({}))
    assert not any(p.requires_grad for p in model.parameters())
    assert not list(tuned.parameters())
    tuned.restore()
    assert found(model) == before


def test_an_exception_in_forward_leaves_the_parameters_in_place() -> None:
    """Hooked modules hold views of their weights only while their forward runs."""
    model = zoo()
    sk.train_only(model, some(model))
    weight = model.norm.weight
    with pytest.raises(RuntimeError):
        model.norm(torch.randn(2, WIDTH + 1))
    assert model.norm.weight is weight
    assert [n for n, _ in model.norm.named_parameters()] == ["weight", "bias", "weight_values", "bias_values"]


def test_deepcopy_of_a_train_only_model() -> None:
    """The copy trains by itself, and neither sees the other."""
    model = Zoo()
    tuned = sk.train_only(model, some(model))
    train(model, tuned)
    again = copy.deepcopy(tuned)
    twin = again.model
    assert twin is not model
    state = copy.deepcopy(model.state_dict())
    train(twin, again)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    train(model, tuned)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, state[key]) for key, value in model.state_dict().items())
    again.restore()
    tuned.restore()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert [type(m) for m in twin.modules()] == [type(m) for m in Zoo().modules()]


def test_deepcopy_of_the_model_alone() -> None:
    model = Zoo()
    tuned = sk.train_only(model, some(model))
    train(model, tuned, steps=5)
    twin = copy.deepcopy(model)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    assert len(parameters) == len(list(tuned.parameters()))
    for m, trained in ((model, list(tuned.parameters())), (twin, parameters)):
        optimizer = sk.SparseAdamW(trained, lr=0.1)
        for seed in range(5):
            m(ids(4, 7, seed=seed)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, dict(twin.named_parameters())[name]), f"{name} is stale when read directly"
