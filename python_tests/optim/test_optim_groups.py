"""Parameter groups of SparseAdamW: what may be in one, what may be left out of a step, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim_state import FORMS, chosen, model, prepared, same_weights, train
from torch import nn

import sparsekernels as sk
from sparsekernels import Index, Selection


def groups_of(form: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model and two groups, of one parameter each."""
    m = model()
    selection = chosen(m)
    if form == "compact":
        tuned = sk.train_only(m, selection)
        return m, [{"params": [tuned.slots[name].values]} for name in ("0.weight", "2.weight")]
    groups: list[dict[str, Any]] = [{"params": [m.get_parameter(name)]} for name in ("0.weight", "2.weight")]
    if form == "indexed":
        for group, name in zip(groups, ("0.weight", "2.weight"), strict=True):
            group["indices"] = [selection[name]]
    return m, groups


@pytest.mark.parametrize("form", FORMS)
def test_param_groups_with_options_of_their_own(form: str) -> None:
    """Two groups of one optimizer are two optimizers; the second group comes after the first step."""
    options = ({"lr": 0.3, "weight_decay": 0.0}, {"lr": 0.01, "betas": (0.5, 0.6), "amsgrad": True})
    m, groups = groups_of(form)
    together = sk.SparseAdamW([{**groups[0], **options[0]}], eps=1e-6)
    twin, others = groups_of(form)
    apart = [sk.SparseAdamW([{**group, **option}], eps=1e-6) for group, option in zip(others, options, strict=True)]
    for step in range(3):
        if step == 1:
            together.add_param_group({**groups[1], **options[1]})
        x = torch.randn(4, 6)
        for net in (m, twin):
            net.zero_grad()
            net(x).square().sum().backward()
        together.step()
        for optimizer in apart[: 1 + (step > 0)]:
            optimizer.step()
    assert same_weights(m, twin)
    assert [len(state) for state in together.state.values()] == [3, 4]


def test_three_kinds_in_one_optimizer() -> None:
    m = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    tuned = sk.train_only(m[0], Selection.random(m[0], 0.5))
    selection = Selection.random(m[1], 0.5)
    groups = [{"params": [*tuned.parameters(), *m[2].parameters()]}, *selection.param_groups(m[1])]
    optimizer = sk.SparseAdamW(groups, lr=0.1)
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    x = torch.randn(3, 4)
    m[2](m[1](m[0](x))).square().sum().backward()
    optimizer.step()
    for name, p in m.named_parameters():
        assert not torch.equal(p.detach(), before[name]), name
    changed = {name: int((p != before[name]).sum()) for name, p in m.named_parameters()}
    assert changed["0.weight"] <= tuned.selection["weight"].numel
    assert changed["1.weight"] <= selection["weight"].numel
    assert changed["2.weight"] == 16


@pytest.mark.parametrize("form", FORMS)
def test_parameters_without_gradients_are_passed_over(form: str) -> None:
    """Frozen ones, and ones that a step left out: no state, no decay, no step counted."""
    m, optimizer = prepared(form)
    params = optimizer.param_groups[0]["params"]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer.add_param_group({"params": [frozen]})
    optimizer.step()  # nothing has a gradient yet
    assert not optimizer.state
    train(m, optimizer, 0, 1)
    last = params[-1]
    kept = last.detach().clone()
    optimizer.zero_grad()
    m(torch.randn(4, 6)).square().sum().backward()
    last.grad = None
    optimizer.step()
    assert torch.equal(last.detach(), kept)
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0] * (len(params) - 1) + [1.0]
    train(m, optimizer, 1, 2)
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0] * (len(params) - 1) + [2.0]
    assert torch.equal(frozen, torch.ones(3))
    assert frozen not in optimizer.state


def index(*shape: int) -> Index:
    return Index(torch.zeros(1, dtype=torch.int64), shape)


BAD_GROUPS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "count": (
        lambda: {"params": list(model().parameters()), "indices": [index(5, 6)]},
        ValueError,
        "one Index for each",
    ),
    "type": (
        lambda: {"params": [nn.Parameter(torch.ones(3))], "indices": [torch.tensor([1])]},
        TypeError,
        "got Tensor",
    ),
    "shape": (lambda: {"params": [nn.Parameter(torch.ones(3))], "indices": [index(4)]}, ValueError, r"\[4\].*\[3\]"),
    "strides": (
        lambda: {"params": [nn.Parameter(torch.ones(3, 2).T)], "indices": [index(2, 3)]},
        ValueError,
        "contiguous",
    ),
    "differentiable": (
        lambda: {"params": [nn.Parameter(torch.ones(3))], "indices": [index(3)], "differentiable": True},
        ValueError,
        "differentiable",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups(case: str) -> None:
    make, kind, words = BAD_GROUPS[case]
    with pytest.raises(kind, match=words):
        sk.SparseAdamW([make()])
    _, optimizer = prepared("dense")
    with pytest.raises(kind, match=words):
        optimizer.add_param_group(make())
    assert len(optimizer.param_groups) == 1


def test_differentiable_with_compact_parameters() -> None:
    m, optimizer = prepared("compact", differentiable=True)
    m(torch.randn(4, 6)).square().sum().backward()
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in m.state_dict().items())


def test_one_index_and_one_tensor_need_no_lists() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = sk.SparseAdamW([{"params": parameter, "indices": Index(torch.tensor([1, 3]), (4,))}], lr=0.1)
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert (parameter == 1).tolist() == [True, False, True, False]
    named = sk.SparseAdamW([{"params": [("w", parameter)], "indices": [Index(torch.tensor([1]), (4,))]}])
    assert named.param_groups[0]["param_names"] == ["w"]


def test_indexed_gradient_need_not_be_contiguous() -> None:
    weight = torch.randn(4, 6)
    grad = torch.randn(6, 4).T
    runs = []
    for g in (grad, grad.contiguous()):
        parameter = nn.Parameter(weight.clone())
        chosen_here = Index(torch.arange(0, 24, 5), (4, 6))
        optimizer = sk.SparseAdamW([{"params": [parameter], "indices": [chosen_here]}], lr=0.1)
        parameter.grad = g
        optimizer.step()
        runs.append(parameter.detach())
    assert torch.equal(*runs)


def test_step_inside_compiled_code_breaks_the_graph() -> None:
    model = torch.nn.Linear(6, 5)
    tuned = sk.train_only(model, Selection.random(model, 0.5))
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    model(torch.randn(3, 6)).sum().backward()
    before = model.weight.detach().clone()
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()
    assert not torch.equal(model.weight, before)
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_groups_that_change_are_stepped_as_they_are() -> None:
    """A plan of an earlier step must not outlive the parameters it was made for."""
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = sk.SparseAdamW([{"params": [a]}, {"params": [b]}], lr=0.1)
    a.grad = b.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups.pop(0)
    kept = a.detach().clone()
    optimizer.step()
    assert torch.equal(a, kept)
    assert optimizer.state[b]["step"] == 2
    optimizer.param_groups[0]["params"] = [a]
    optimizer.step()
    assert not torch.equal(a, kept)


def test_cleared_state_starts_afresh() -> None:
    model = torch.nn.Linear(6, 5)
    tuned = sk.train_only(model, Selection.random(model, 0.5))
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())
