"""SparseAdamW as a torch optimizer: state_dict, groups, hooks, closures, schedulers, copies and errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection
from sparsekernels.optim.options import DEFAULTS

FORMS = ("compact", "indexed", "dense")
Run = tuple[nn.Module, sk.SparseAdamW]


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def chosen(of: nn.Module, seed: int = 0) -> Selection:
    rows = Selection({"2.weight": Index(torch.tensor([0, 2]), (3, 5), granularity="row")})
    return Selection.random(of, 0.4, seed=seed, names=["0.weight", "0.bias"]) | rows


def prepared(form: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Run:
    m = model(dtype)
    selection = chosen(m, seed)
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    if form == "compact":
        return m, sk.SparseAdamW(sk.train_only(m, selection).parameters(), **options)
    if form == "indexed":
        return m, sk.SparseAdamW(selection.param_groups(m), **options)
    return m, sk.SparseAdamW(m.parameters(), **options)


def train(m: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for seed in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        m(x.to(next(m.parameters()).dtype)).square().sum().backward()
        optimizer.step()


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_going_on_from_a_file(form: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Three steps, save, three steps = three steps, load into fresh objects, three steps. To the last bit."""
    if form == "dense" and options.get("capturable"):
        pytest.skip("torch itself wants dense capturable parameters on a GPU")
    m, optimizer = prepared(form, dtype, **options)
    train(m, optimizer, 0, 3)
    weights, state = copy.deepcopy(m.state_dict()), through_file(optimizer.state_dict())
    train(m, optimizer, 3, 6)

    # A fresh optimizer with other options: all of them come out of the file.
    again, other = prepared(form, dtype, **{**options, "lr": 7.0, "weight_decay": 0.7})
    again.load_state_dict(weights)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.05
    train(again, other, 3, 6)
    assert same_weights(m, again)
    for ours, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert set(ours) == set(theirs)
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            assert torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize("form", FORMS)
def test_going_back_within_a_run(form: str) -> None:
    """The optimizer that loads has stepped already: what it kept from those steps must not be used any more."""
    m, optimizer = prepared(form)
    train(m, optimizer, 0, 3)
    weights, state = copy.deepcopy(m.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(m, optimizer, 3, 6)
    expected = copy.deepcopy(m.state_dict())
    m.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(m, optimizer, 3, 6)
    assert all(torch.equal(value, expected[key]) for key, value in m.state_dict().items())
    assert all(float(entry["step"]) == 6 for entry in optimizer.state.values())


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_has_the_layout_of_adamw(form: str) -> None:
    m, optimizer = prepared(form)
    train(m, optimizer, 0, 1)
    plain = torch.optim.AdamW(model().parameters())
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    ours, theirs = set(state["param_groups"][0]), set(plain.state_dict()["param_groups"][0])
    assert theirs <= ours
    assert ours - theirs == set(DEFAULTS)
    more = set() if form == "dense" else {"positions"}
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} | more for entry in state["state"].values())


def test_dense_state_goes_to_torch_and_back() -> None:
    m, optimizer = prepared("dense")
    train(m, optimizer, 0, 2)
    twin = copy.deepcopy(m)
    plain = torch.optim.AdamW(twin.parameters())
    plain.load_state_dict(through_file(optimizer.state_dict()))  # torch would share the tensors otherwise
    train(m, optimizer, 2, 4)
    train(twin, plain, 2, 4)
    assert same_weights(m, twin)
    optimizer.load_state_dict(through_file(plain.state_dict()))
    train(m, optimizer, 4, 5)
    train(twin, plain, 4, 5)
    assert same_weights(m, twin)


MISMATCHES: dict[str, tuple[str, Callable[[], Run], str]] = {
    "other selection of another size": ("compact", lambda: prepared_with("compact", 0.7), "another selection"),
    "indexed, another size": ("indexed", lambda: prepared_with("indexed", 0.7), "other indices|another selection"),
    "indexed, the same size": ("indexed", lambda: prepared("indexed", seed=5), "other indices|another selection"),
    "dense into compact": ("dense", lambda: prepared("compact"), "doesn't match|another selection"),
    "compact into dense": ("compact", lambda: prepared("dense"), "doesn't match|another selection"),
}


def prepared_with(form: str, density: float) -> Run:
    m = model()
    selection = Selection.random(m, density, names=["0.weight", "0.bias", "2.weight"])
    if form == "compact":
        return m, sk.SparseAdamW(sk.train_only(m, selection).parameters())
    return m, sk.SparseAdamW(selection.param_groups(m))


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_state_dict_that_does_not_fit_changes_nothing(case: str) -> None:
    form, other, words = MISMATCHES[case]
    m, optimizer = prepared(form)
    train(m, optimizer, 0, 2)
    state = optimizer.state_dict()
    m, optimizer = other()
    train(m, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())
    train(m, optimizer, 2, 3)


@pytest.mark.parametrize("form", FORMS)
def test_closure_hooks_and_scheduler(form: str) -> None:
    m, optimizer = prepared(form)
    twin, other = prepared(form)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    x = torch.randn(4, 6)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = m(x).square().sum()
        loss.backward()
        return loss

    for epoch in range(3):
        expected = m(x).square().sum().detach()
        loss = optimizer.step(closure)
        assert torch.equal(loss.detach(), expected)
        scheduler.step()
        for group in other.param_groups:
            group["lr"] = 0.05 * 0.5**epoch
        other.zero_grad()
        twin(x).square().sum().backward()
        other.step()
    assert seen == ["before", "after"] * 3
    assert same_weights(m, twin)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("registered", [["before"], ["after"], ["before", "after"]], ids="-".join)
def test_global_hooks_are_called_once(registered: list[str], form: str) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    register = {"before": register_optimizer_step_pre_hook, "after": register_optimizer_step_post_hook}
    seen: list[str] = []
    handles = [register[what](lambda *_, what=what: seen.append(what)) for what in registered]
    try:
        train(*prepared(form), 0, 2)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == registered * 2
    train(*prepared(form), 0, 2)
    assert seen == registered * 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer(form: str, copied: Callable) -> None:
    m, optimizer = prepared(form)
    train(m, optimizer, 0, 2)
    twin, other = copied((m, optimizer))
    state = copy.deepcopy(m.state_dict())
    train(twin, other, 2, 4)
    assert all(torch.equal(value, state[key]) for key, value in m.state_dict().items()), (
        "the copy wrote into the original"
    )
    train(m, optimizer, 2, 4)
    assert same_weights(m, twin)


def test_tensor_lr_may_change_in_place() -> None:
    lr = torch.tensor(0.1)
    m, optimizer = prepared("compact", lr=lr)
    twin, other = prepared("compact", lr=0.1)
    train(m, optimizer, 0, 1)
    train(twin, other, 0, 1)
    lr.mul_(0.5)
    other.param_groups[0]["lr"] = 0.05
    train(m, optimizer, 1, 2)
    train(twin, other, 1, 2)
    for a, b in zip(m.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
