"""Selected weights that a step cannot train are named, once."""

from __future__ import annotations

import re
import warnings

import peft
import pytest
import torch
from models import batch, mamba, transformer
from torch import nn

import sparsekernels as sk
from sparsekernels import Selection

OPTIMIZERS = [sk.SparseAdamW, torch.optim.AdamW, torch.optim.SGD]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "llama") -> list[str]:
    """The names in the warnings of one step."""
    model(**batch(kind)).loss.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    optimizer.zero_grad()
    found = [re.search(r"so not trained: (.*?)\. Either", str(w.message)) for w in caught]
    return [name for match in found if match for name in match[1].split(", ")]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_weights_that_another_module_reads_are_named(make: type[torch.optim.Optimizer]) -> None:
    """Mamba's mixer reads the weights of its convolution and of dt_proj itself, so their modules never run."""
    model = mamba(layers=1)
    mixer = "backbone.layers.0.mixer"
    names = [f"{mixer}.conv1d.weight", f"{mixer}.dt_proj.weight", f"{mixer}.x_proj.weight"]
    tuned = sk.train_only(model, Selection.random(model, 0.3, names=names))
    optimizer = make(tuned.parameters(), lr=1e-2)
    assert step(model, optimizer) == names[:2]
    assert step(model, optimizer) == []


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_frozen_values_are_named(make: type[torch.optim.Optimizer]) -> None:
    """peft freezes all that is not its own."""
    model = transformer("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tuned = sk.train_only(model, Selection.random(model, 0.3, names=[name]))
    optimizer = make(tuned.parameters(), lr=1e-2)
    assert step(model, optimizer) == []
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert step(wrapped, optimizer) == [f"{name} (requires_grad is False)"]
    assert step(wrapped, optimizer) == []


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_what_has_trained_before_may_pause(make: type[torch.optim.Optimizer]) -> None:
    """An expert without a token in one batch is nothing to warn of."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tuned = sk.train_only(model, Selection.random(model, 0.5, names=["0.weight", "1.weight"]))
    optimizer = make(tuned.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for used in (model, model[:1], model[1:]):
            sum(layer(torch.ones(1, 4)).sum() for layer in used).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_warning_points_at_the_call(make: type[torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = make(sk.train_only(model, Selection.random(model, 0.5)).parameters(), lr=1e-2)
    with pytest.warns(RuntimeWarning, match="not trained") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_values_that_another_parameter_replaced(make: type[torch.optim.Optimizer], zeroed: bool) -> None:
    """After load_state_dict(assign=True) the optimizer steps what no forward reads."""
    model = nn.Sequential(nn.Linear(4, 4))
    tuned = sk.train_only(model, Selection.random(model, 0.5))
    optimizer = make(tuned.parameters(), lr=1e-2)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    if zeroed:
        optimizer.zero_grad()
    model.load_state_dict(model.state_dict(), assign=True)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"'0.weight': .*make a new optimizer of SparseModel.parameters\(\)"):
        optimizer.step()
    optimizer = make(tuned.parameters(), lr=1e-2)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
