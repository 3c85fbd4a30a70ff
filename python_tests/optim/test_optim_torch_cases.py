"""The cases of torch's own optimizer suite (test/test_optim.py), numbers and errors, for all kinds of parameter.

torch's suite asks that the loss falls. Here every case is also held against torch.optim.AdamW: dense ones to the last
bit, compact and indexed ones, over all positions, to a few roundings.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples.case import put, take
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch_cases import (
    FORMS,
    Problem,
    assert_same,
    elements,
    error_inputs,
    groups_of,
    optimizer_inputs,
    optimizer_of,
    parameters_of,
    train,
)

import sparsekernels as sk
from sparsekernels import Index, Selection

SCHEDULERS: dict[str, list[Callable[..., Any]]] = {
    "none": [],
    "as in torch's suite": [lambda o: StepLR(o, gamma=0.9, step_size=10), lambda o: ReduceLROnPlateau(o)],
    "chained": [lambda o: ExponentialLR(o, 0.99), lambda o: LinearLR(o, 0.4, total_iters=4)],
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("form", FORMS)
def test_goes_the_right_direction_and_the_way_of_adamw(form: str, schedule: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        problem, other = Problem(device), Problem(device)
        ours = optimizer_of(form, problem, **options)
        theirs = torch.optim.AdamW(other.parameters(), **copy.deepcopy(options))
        runs = [(p, o, [make(o) for make in SCHEDULERS[schedule]]) for p, o in ((problem, ours), (other, theirs))]
        first = problem.loss().item()
        for _ in range(20):
            for p, optimizer, schedulers in runs:
                train(p, optimizer, 1)
                for scheduler in schedulers:
                    scheduler.step(*((p.loss().item(),) if isinstance(scheduler, ReduceLROnPlateau) else ()))
            assert float(ours.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"]), what
        assert (problem.loss().item() > first) == options.get("maximize", False), what
        assert_same(problem, other, form, what)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case", ["lr of the second", "lr of both", "lr=0 outside", "decay of the first", "decay of both"]
)
def test_options_of_groups(case: str, form: str, device: torch.device) -> None:
    first, second, outside = {
        "lr of the second": ({}, {"lr": 1e-2}, {}),
        "lr of both": ({"lr": 0.03}, {"lr": 1e-2}, {"lr": 7.0}),
        "lr=0 outside": ({}, {"lr": 1e-2}, {"lr": 0.0}),
        "decay of the first": ({"weight_decay": 0.5}, {}, {"weight_decay": 0.0}),
        "decay of both": ({"weight_decay": 0.5}, {"weight_decay": 0.0}, {"weight_decay": 0.1}),
    }[case]
    for what, options in optimizer_inputs(device):
        problem, other = Problem(device), Problem(device)
        before = other.weight.detach().clone()
        options = {**options, **outside}
        pairs = []
        for p, cls, kind in ((problem, sk.SparseAdamW, form), (other, torch.optim.AdamW, "dense")):
            a, b = groups_of(kind, p)
            optimizer = cls([{**a, **first}, {**b, **second}], **copy.deepcopy(options))
            train(p, optimizer, 10)
            pairs.append([(float(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups])
        assert pairs[0] == pairs[1], what
        assert_same(problem, other, form, what)
        assert torch.equal(problem.weight, before) == (case == "lr=0 outside"), what


@pytest.mark.parametrize("dims", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_tensor_lr(form: str, dims: int, device: torch.device) -> None:
    """A tensor lr of one element, of any shape, is the number in it; a scheduler changes it in place."""
    for what, options in optimizer_inputs(device):
        if options.get("foreach") and not options.get("capturable"):
            continue  # an error input of torch
        runs = []
        for lr in (torch.full((1,) * dims, 0.01), 0.01):
            problem = Problem(device)
            optimizer = optimizer_of(form, problem, **{**options, "lr": lr})
            kept, schedulers = optimizer.param_groups[0]["lr"], [make(optimizer) for make in SCHEDULERS["chained"]]
            for _ in range(8):
                train(problem, optimizer, 1)
                for scheduler in schedulers:
                    scheduler.step()
            assert not isinstance(lr, Tensor) or optimizer.param_groups[0]["lr"] is kept, what
            runs.append(problem)
        assert_same(*runs, "rounded", what)


def _params_in(form: str, params: Any, device: torch.device) -> Any:
    """The params of an error input with its parameters turned into those of `form`."""
    if params is None:
        params = [nn.Parameter(torch.randn(1, device=device))]
    if form == "dense" or isinstance(params, Tensor):
        return params
    if form == "indexed":
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        groups = [{**group, "params": _listed(group["params"])} for group in groups]
        return [{**g, "indices": [Index.full(_bare(p).shape) for p in g["params"]]} for g in groups]
    turned: dict[int, Tensor] = {}

    def turn(x: Any) -> Any:
        if isinstance(x, dict):
            return {**x, "params": turn(x["params"])}
        if isinstance(x, (list, tuple)):
            return type(x)(turn(entry) for entry in x)
        if isinstance(x, Tensor) and id(x) not in turned:
            problem = Problem(device, shape=tuple(x.shape) if x.dim() else (1,))
            (turned[id(x)],) = sk.train_only(problem, Selection({"weight": elements(problem.weight)})).parameters()
        return turned[id(x)] if isinstance(x, Tensor) else x

    return turn(params)


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _bare(entry: Any) -> Tensor:
    return entry[1] if isinstance(entry, tuple) else entry


@pytest.mark.parametrize("form", FORMS)
def test_errors_are_those_of_torch(form: str, device: torch.device) -> None:
    cases = error_inputs(device)
    assert len(cases) >= (12 if device.type == "cpu" else 2)
    for what, params, options, kind in cases:
        given = [_params_in(form, params, device), _params_in("dense", params, device)]
        found = []
        for cls, its in zip((sk.SparseAdamW, torch.optim.AdamW), given, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                with pytest.raises(kind) as error:
                    cls(its, **copy.deepcopy(options))
            found.append((error.type, str(error.value)))
        assert found[0] == found[1], what


@pytest.mark.parametrize("form", FORMS)
def test_a_step_without_gradients_is_no_step(form: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        problem, before = Problem(device), Problem(device)
        optimizer = optimizer_of(form, problem, **options)
        optimizer.step()
        assert_same(problem, before, "dense", what)
        assert not optimizer.state, what


@pytest.mark.parametrize("form", FORMS)
def test_a_step_over_zero_gradients_leaves_the_weights(form: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        problem, before = Problem(device), Problem(device)
        optimizer = optimizer_of(form, problem, **{**options, "weight_decay": 0.0})
        for p in parameters_of(optimizer):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert_same(problem, before, "dense", what)
        assert all(float(state["step"]) == 1 for state in optimizer.state.values()), what
        assert len(optimizer.state) == 2, what


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_read_only(form: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        optimizer = optimizer_of(form, Problem(device), **options)
        for p in parameters_of(optimizer):
            p.grad = torch.randn_like(p)
        kept = [(p.grad, p.grad._version, p.grad.clone()) for p in parameters_of(optimizer)]
        for _ in range(3):
            optimizer.step()
        for p, (grad, version, value) in zip(parameters_of(optimizer), kept, strict=True):
            assert p.grad is grad, what
            assert grad._version == version, what
            assert torch.equal(grad, value), what


def test_the_unselected_stay_through_every_input(device: torch.device) -> None:
    """What torch's suite cannot ask: over some positions, the others keep their bits."""
    index = Index(torch.tensor([1, 4, 7]), (10, 5), granularity="row")
    for what, options in optimizer_inputs(device):
        for form in ("compact", "indexed"):
            problem, before = Problem(device), Problem(device).weight.detach()
            chosen = Selection({"weight": index})
            if form == "compact":
                optimizer = sk.SparseAdamW(sk.train_only(problem, chosen).parameters(), **copy.deepcopy(options))
            else:
                optimizer = sk.SparseAdamW(chosen.param_groups(problem), **copy.deepcopy(options))
            train(problem, optimizer, 3)
            now = problem.weight.detach()
            assert torch.equal(put(now, index, take(before, index)), before.cpu()), f"{form}, {what}"
            assert (take(now, index) != take(before, index)).any(dim=1).all(), f"{form}, {what}"
