"""Ctrl-C in the middle of a training step: no Parameter is lost, and a parameter group is stepped or is not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupting import interrupt, lines_of
from models import Zoo, full_names, ids
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Selection


def everything(model: nn.Module) -> Selection:
    return Selection.random(model, density=0.3, names=full_names(model))


def held(model: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters()}


def test_an_interrupt_of_forward_or_backward_loses_no_parameter() -> None:
    model = Zoo()
    before = copy.deepcopy(model.state_dict())
    tuned = sk.sparsify(model, everything(model))
    parameters = held(model)

    def train() -> None:
        for values in tuned.parameters():
            values.grad = None
        model(ids(2, 3)).square().sum().backward()

    train()
    expected = [values.grad.clone() for values in tuned.parameters()]
    lines = lines_of(train)
    assert lines > 200, "a poor test"
    for line in range(1, lines + 1, 5):
        assert interrupt(train, line)
        assert held(model) == parameters, line
        train()
        assert all(torch.equal(p.grad, g) for p, g in zip(tuned.parameters(), expected, strict=True)), line
    assert interrupt(train, lines // 2)
    tuned.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(getattr(module, name) is p for module in model.modules() for name, p in module._parameters.items())


class Breaking(nn.Module):
    """Interrupted as long as it has to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))
        self.interrupted = True

    def forward(self, x: Tensor) -> Tensor:
        if self.interrupted:
            raise KeyboardInterrupt
        return x * self.weight


def broken() -> tuple[Breaking, sk.SparseModel]:
    model = Breaking()
    tuned = sk.sparsify(model, Selection.random(model, density=0.5))
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 5))
    model.interrupted = False
    return model, tuned


def of_its_own(model: Breaking) -> bool:
    return model.weight is model._parameters["weight"]


@pytest.mark.parametrize(
    "clean",
    [
        lambda model, _: model(torch.ones(5)),
        lambda model, _: model.state_dict(),
        lambda model, _: model.load_state_dict(model.state_dict(), assign=True),
        lambda _, tuned: tuned.restore(),
        lambda _, tuned: tuned.merge(),
    ],
    ids=["forward", "state_dict", "assign", "restore", "merge"],
)
def test_what_is_read_after_an_interrupt(clean: Callable[[Breaking, sk.SparseModel], Any]) -> None:
    """Until something takes the view away it is current: steps write its storage."""
    model, tuned = broken()
    assert model.weight.data_ptr() == model._parameters["weight"].data_ptr()
    with torch.no_grad():
        next(tuned.parameters()).fill_(7)
    tuned.sync_()
    assert model.weight.eq(7).any()
    clean(model, tuned)
    assert of_its_own(model)


@pytest.mark.parametrize("change", [nn.Module.double, lambda model: model.to(torch.float64)], ids=["double", "to"])
def test_forward_after_an_interrupt_and_a_move(change: Callable[[nn.Module], nn.Module]) -> None:
    model, tuned = broken()
    change(model)
    (values,) = tuned.parameters()
    model(torch.ones(5, dtype=torch.float64)).sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    assert of_its_own(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_after_an_interrupt(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = broken()
    other = copied(model)
    other(torch.ones(5)).sum().backward()
    assert of_its_own(other)
    assert torch.equal(other.weight_values.grad, torch.ones_like(other.weight_values))
    assert model.weight_values.grad is None


@pytest.mark.parametrize("interrupted", [False, True])
def test_compiled(interrupted: bool) -> None:
    """One graph, whatever an interrupt left before it was made, and the right gradients from the first call on."""
    torch._dynamo.reset()
    model, tuned = broken()
    if not interrupted:
        model.state_dict()
    (values,) = tuned.parameters()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        values.grad = None
        run(torch.ones(5)).sum().backward()
        assert torch.equal(values.grad, torch.ones_like(values))
        assert of_its_own(model)
