"""A weight that changes between a forward and its backward is an error, never a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Zoo, full_names, ids
from torch import nn

import sparsekernels as sk
from sparsekernels import Selection

MESSAGE = "modified by an inplace operation"


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def stepped(optimizer: Callable) -> Callable[[nn.Module, sk.SparseModel], None]:
    def change(model: nn.Module, tuned: sk.SparseModel) -> None:
        step = optimizer(tuned.parameters(), lr=0.1)
        for values in tuned.parameters():
            values.grad = torch.ones_like(values)
        step.step()

    return change


def in_place(model: nn.Module, tuned: sk.SparseModel) -> None:
    with torch.no_grad():
        model[1].weight.mul_(2)


def synced(model: nn.Module, tuned: sk.SparseModel) -> None:
    with torch.no_grad():
        for values in tuned.parameters():
            values.add_(1)
    model(torch.ones(1, 6))  # a forward brings the weights up to date


CHANGES: dict[str, Callable[[nn.Module, sk.SparseModel], object]] = {
    "SparseAdamW": stepped(sk.SparseAdamW),
    "AdamW": stepped(torch.optim.AdamW),
    "AdamW fused": stepped(lambda params, lr: torch.optim.AdamW(params, lr, fused=True)),
    "SGD": stepped(torch.optim.SGD),
    "next forward": synced,
    "restore": lambda model, tuned: tuned.restore(),
    "load_state_dict": lambda model, tuned: model.load_state_dict(model.state_dict()),
    "in place": in_place,
}


@pytest.mark.parametrize("names", [["0.weight", "1.weight"], ["0.weight", "1.weight", "1.bias"]], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_backward_after_a_change_raises(change: str, names: list[str]) -> None:
    model = two_layers()
    tuned = sk.train_only(model, Selection.random(model, 0.5, names=names))
    loss = model(torch.randn(3, 6)).square().sum()
    CHANGES[change](model, tuned)
    with pytest.raises(RuntimeError, match=MESSAGE):
        loss.backward()


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_trained_layer_may_change(change: str) -> None:
    """Its gradient is made of activations alone, so the weight may change, as it may under torch's own Linear."""
    x = torch.randn(3, 6)
    model = two_layers()
    selection = Selection.random(model, 0.5, names=["1.weight"])
    tuned = sk.train_only(model, selection)
    (values,) = tuned.parameters()
    (expected,) = torch.autograd.grad(model(x).square().sum(), values)
    loss = model(x).square().sum()
    CHANGES[change](model, tuned)
    (found,) = torch.autograd.grad(loss, values)
    assert torch.equal(found, expected)


def test_gathered_form_too() -> None:
    """Dense parameters with indices are mutated by an op of ours: their version must tell."""
    model = two_layers()
    stepper = sk.SparseAdamW(Selection.random(model, 0.5).param_groups(model))
    model(torch.randn(3, 6)).square().sum().backward()
    loss = model(torch.randn(3, 6, requires_grad=True)).square().sum()
    stepper.step()
    with pytest.raises(RuntimeError, match=MESSAGE):
        loss.backward()


def test_delta_apply_and_revert_too() -> None:
    model = two_layers()
    with sk.train_only(model, Selection.random(model, 0.5)) as tuned:
        delta = tuned.delta()
    loss = model(torch.randn(3, 6)).square().sum()
    applied = delta.apply(model)
    with pytest.raises(RuntimeError, match=MESSAGE):
        loss.backward()
    loss = model(torch.randn(3, 6)).square().sum()
    applied.revert()
    with pytest.raises(RuntimeError, match=MESSAGE):
        loss.backward()


@pytest.mark.parametrize("optimizer", [sk.SparseAdamW, torch.optim.AdamW])
def test_the_usual_order_does_not_raise(optimizer: type) -> None:
    """Two forwards, two backwards, a step, evaluation, and again: nothing of it is a change in between."""
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    stepper = optimizer(tuned.parameters(), lr=0.01)
    for seed in range(3):
        losses = [model(ids(2, 5, seed=seed + i)).square().sum() for i in range(2)]
        for loss in losses:
            loss.backward()
        stepper.step()
        stepper.zero_grad()
        with torch.no_grad():
            model(ids(2, 5))
        model.state_dict()


def test_values_read_out_of_a_graph_stay_as_they_were() -> None:
    """Reading state, a delta or the parameters in between is harmless."""
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    loss = model(ids(2, 5)).square().sum()
    model.state_dict()
    tuned.delta()
    tuned.sync_()
    list(tuned.parameters())
    loss.backward()
    assert all(values.grad is not None for values in tuned.parameters())


def test_values_changed_through_data_after_a_backward() -> None:
    """Which counts up no version, as a loop by hand and DeepSpeed's optimizers of half precision do it."""
    model, oracle = Zoo(), Zoo()
    oracle.load_state_dict(model.state_dict())
    selection = Selection.random(model, 0.3, names=full_names(model))
    tuned, plain = sk.train_only(model, selection), sk.train_only(oracle, selection)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.125)
    for step in range(3):
        for part in range(2):  # a second forward before the step
            losses = [m(ids(4, 7, seed=2 * step + part)).square().mean() for m in (model, oracle)]
            assert torch.equal(*losses)
            for loss in losses:
                loss.backward()
        for values in tuned.parameters():
            values.data -= 0.125 * values.grad
        sgd.step()
        for values in (*tuned.parameters(), *plain.parameters()):
            values.grad = None
    state, expected = model.state_dict(), oracle.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_nothing_is_written_between_the_backwards_of_one_step() -> None:
    model = Zoo()
    sk.train_only(model, Selection.random(model, 0.3, names=full_names(model)))
    versions = [p._version for p in model.parameters()]
    for part in range(3):
        model(ids(4, 7, seed=part)).square().mean().backward()
    assert versions == [p._version for p in model.parameters()]
