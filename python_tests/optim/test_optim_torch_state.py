"""The cases of torch's own optimizer suite (test/test_optim.py) about state_dict, hooks and copies, for all kinds."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_cases import (
    FORMS,
    Problem,
    assert_same,
    groups_of,
    later_flags,
    optimizer_inputs,
    optimizer_of,
    parameters_of,
    together,
    train,
)

import sparsekernels as sk


def named(groups: list[dict[str, Any]], names: tuple[str, ...] = ("weight", "bias")) -> list[dict[str, Any]]:
    """The groups as one, with names."""
    (group,) = together(groups)
    return [{**group, "params": list(zip(names, group["params"], strict=True))}]


def assert_equal_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer, what: str) -> None:
    for p, q in zip(parameters_of(a), parameters_of(b), strict=True):
        assert set(a.state[p]) == set(b.state[q]) >= {"step", "exp_avg", "exp_avg_sq"}, what
        for key, value in a.state[p].items():
            assert value.dtype == b.state[q][key].dtype, f"{what}: {key}"
            assert torch.equal(value, b.state[q][key]), f"{what}: {key}"


@pytest.mark.parametrize(("first_named", "second_named"), [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_state_goes_on_as_the_run_it_came_from(
    form: str, first_named: bool, second_named: bool, device: torch.device
) -> None:
    """Two optimizers over equal weights, the second with the state of the first: the same steps, to the last bit."""
    first = named if first_named else together
    second = partial(named, names=("w", "b")) if second_named else together
    for what, options in optimizer_inputs(device):
        problem = Problem(device)
        optimizer = sk.SparseAdamW(first(groups_of(form, problem)), **copy.deepcopy(options))
        train(problem, optimizer, 3)
        twin = Problem(device)
        twin.load_state_dict(problem.state_dict())
        other = sk.SparseAdamW(second(groups_of(form, twin)), lr=9.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        plain = [torch.optim.AdamW(n([{"params": list(Problem(device).parameters())}])) for n in (first, second)]
        plain[1].load_state_dict(plain[0].state_dict())
        assert other.param_groups[0].get("param_names") == plain[1].param_groups[0].get("param_names"), what
        train(problem, optimizer, 3)
        train(twin, other, 3)
        assert_same(problem, twin, "dense", what)
        assert_equal_state(optimizer, other, what)
        for key, value in options.items():
            assert other.param_groups[0][key] == value, f"{what}: {key}"


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_through_a_file_read_with_weights_only(form: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        problem = Problem(device)
        optimizer = optimizer_of(form, problem, **options)
        train(problem, optimizer, 3)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = optimizer_of(form, Problem(device), lr=9.0)
        again.load_state_dict(torch.load(file, weights_only=True))
        assert_equal_state(optimizer, again, what)
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"], what


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_older_than_some_options(form: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        if options.get("maximize") or options.get("capturable"):
            continue  # the older file would not say so
        problem = Problem(device)
        optimizer = optimizer_of(form, problem, **options)
        train(problem, optimizer, 2)
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for flag in later_flags(device):
                del group[flag]
        twin = Problem(device)
        twin.load_state_dict(problem.state_dict())
        other = optimizer_of(form, twin)
        other.load_state_dict(state)
        train(problem, optimizer, 2)
        train(twin, other, 2)
        # torch picks foreach or fused by itself where the file does not say.
        assert_same(problem, twin, "rounded", what)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_a_plain_number(form: str, device: torch.device) -> None:
    """As optimizers of torch before 1.12 saved it."""
    for what, options in optimizer_inputs(device):
        problem = Problem(device)
        optimizer = optimizer_of(form, problem, **options)
        train(problem, optimizer, 2)
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            entry["step"] = entry["step"].item()
        optimizer.load_state_dict(state)
        assert all(isinstance(entry["step"], Tensor) for entry in optimizer.state.values()), what
        train(problem, optimizer, 1)
        assert [float(entry["step"]) for entry in optimizer.state.values()] == [3.0, 3.0], what


def test_a_state_of_adam_does_not_undo_the_decoupling(device: torch.device) -> None:
    problem, other = Problem(device), Problem(device)
    adam = torch.optim.Adam(problem.parameters(), lr=0.1, weight_decay=0.5)
    train(problem, adam, 2)
    other.load_state_dict(problem.state_dict())
    twin = copy.deepcopy(other)
    state = adam.state_dict()
    assert not state["param_groups"][0]["decoupled_weight_decay"]
    runs = []
    for p, cls in ((other, sk.SparseAdamW), (twin, torch.optim.AdamW)):
        optimizer = cls(p.parameters())
        optimizer.load_state_dict(copy.deepcopy(state))
        assert optimizer.param_groups[0]["decoupled_weight_decay"]
        train(p, optimizer, 2)
        runs.append(p)
    assert_same(*runs, "dense", "after Adam")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("form", FORMS)
def test_copies_have_all_public_attributes(form: str, copied: Any, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        problem = Problem(device)
        optimizer = optimizer_of(form, problem, **options)
        train(problem, optimizer, 1)
        twin_problem, twin = copied((problem, optimizer))
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        assert public == {name for name in vars(twin) if not name.startswith("_")}, what
        assert twin.defaults == optimizer.defaults, what
        train(problem, optimizer, 2)
        train(twin_problem, twin, 2)
        assert_same(problem, twin_problem, "dense", what)


@pytest.mark.parametrize("form", FORMS)
def test_can_be_printed(form: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        optimizer = optimizer_of(form, Problem(device), **options)
        plain = torch.optim.AdamW(Problem(device).parameters(), **copy.deepcopy(options))
        lines = str(plain).splitlines()
        assert lines[0] == "AdamW ("
        assert str(optimizer).startswith("SparseAdamW ("), what
        assert set(lines[1:]) <= set(str(optimizer).splitlines()), what


def test_step_hooks_are_called_as_those_of_torch(device: torch.device) -> None:
    """In what order, with which arguments, how often; a pre-hook may exchange the closure."""
    logs = []
    for cls in (sk.SparseAdamW, torch.optim.AdamW):
        log: list[Any] = []

        def note(what: str, log: list[Any] = log) -> Any:
            return lambda _, args, kwargs: log.append((what, len(args), sorted(kwargs)))

        problem = Problem(device)
        optimizer = cls(problem.parameters(), lr=0.01)
        handles = [
            register_optimizer_step_pre_hook(note("global before")),
            optimizer.register_step_pre_hook(note("before")),
            register_optimizer_step_post_hook(note("global after")),
            optimizer.register_step_post_hook(note("after")),
        ]
        try:
            problem.loss().backward()
            log.append(optimizer.step())
            log.append(optimizer.step(lambda: 5))
            swap = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7), {}))
            log.append(optimizer.step())
            swap.remove()
            swap = optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "closure": lambda: 8}))
            log.append(optimizer.step())
            swap.remove()
            wrong = optimizer.register_step_pre_hook(lambda *_: 3)
            with pytest.raises(RuntimeError, match="must return None or a tuple"):
                optimizer.step()
            wrong.remove()
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        logs.append(log)
    assert logs[0] == logs[1]
    assert [entry for entry in logs[0] if not isinstance(entry, tuple)] == [None, 5, 7, 8]
    assert len(logs[0]) == 4 + 4 * 4 + 2


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_hooks(form: str, device: torch.device) -> None:
    problem = Problem(device)
    optimizer = optimizer_of(form, problem)
    train(problem, optimizer, 1)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("second"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("first"), prepend=True)

    def mark(o: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        assert set(state["state"][0]) >= {"step", "exp_avg", "exp_avg_sq"}
        state["mark"] = 1

    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mark": state["mark"] + 1})
    optimizer.register_state_dict_post_hook(mark, prepend=True)
    assert optimizer.state_dict()["mark"] == 2
    assert seen == ["first", "second"]


@pytest.mark.parametrize("form", FORMS)
def test_load_state_dict_hooks(form: str, device: torch.device) -> None:
    """A pre-hook may translate the state before anything looks at it; post-hooks meet the state as it will be used."""
    problem = Problem(device, torch.bfloat16)
    optimizer = optimizer_of(form, problem)
    train(problem, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    foreign = {**saved, "state": {k: {"of another library": entry} for k, entry in saved["state"].items()}}
    other = optimizer_of(form, Problem(device, torch.bfloat16))
    seen: list[str] = []

    def translate(o: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("second")
        return {**state, "state": {k: entry["of another library"] for k, entry in state["state"].items()}}

    other.register_load_state_dict_pre_hook(translate)
    other.register_load_state_dict_pre_hook(lambda o, state: seen.append("first"), prepend=True)
    found: list[torch.dtype] = []
    other.register_load_state_dict_post_hook(lambda o: found.extend(s["exp_avg"].dtype for s in o.state.values()))
    other.load_state_dict(foreign)
    assert seen == ["first", "second"]
    assert found == [torch.bfloat16 if form == "dense" else torch.float32] * 2
    assert_equal_state(optimizer, other, "translated")


@pytest.mark.parametrize("form", FORMS)
def test_names_of_parameters(form: str, device: torch.device) -> None:
    problem = Problem(device)
    optimizer = sk.SparseAdamW(named(groups_of(form, problem)))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    if form == "compact":
        tuned = sk.train_only(Problem(device), sk.Selection({"weight": sk.Index.full((10, 5))}))
        assert sk.SparseAdamW(tuned.named_parameters()).param_groups[0]["param_names"] == ["weight"]
    train(problem, optimizer, 2)
    other = Problem(device)
    train(other, torch.optim.AdamW(other.named_parameters()), 2)
    assert_same(problem, other, form, "named")
