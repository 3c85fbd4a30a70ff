"""Another selection in the middle of a run: what is kept goes on, what is new starts fresh, what leaves goes back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import Zoo, ids, transformer
from reselecting import SHAPES, Oracle, by_elements, pick, random_grads, selection, stepped
from samples.case import put, take
from test_train_only import found
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

UNITS: dict[str, dict[str, Any]] = {
    "rows": {"granularity": "row"},
    "columns": {"granularity": "column"},
    "blocks": {"granularity": "block", "block": (5, 3)},
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("form", "restore"), [("compact", True), ("compact", False), ("indexed", False)])
def test_every_position_is_trained_as_if_it_were_alone(form: str, amsgrad: bool, restore: bool) -> None:
    model = Zoo().double()
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.1, "amsgrad": amsgrad}
    oracle = Oracle(model, **options)
    chosen = by_elements(selection(0))
    oracle.select(chosen, restore)
    tuned = sk.train_only(model, chosen) if form == "compact" else None
    optimizer = sk.SparseAdamW(tuned.parameters() if tuned else chosen.param_groups(model), **options)
    seed = 0
    for number in range(5):
        for _ in range(3):
            if tuned:
                oracle.step(stepped(tuned, optimizer, seed))
            else:
                grads = random_grads(model, seed)
                for name, p in model.named_parameters():
                    p.grad = grads[name]
                optimizer.step()
                oracle.step(grads)
            seed += 1
            for name, expected in oracle.weights.items():
                assert torch.allclose(model.get_parameter(name), expected, rtol=1e-11, atol=1e-13), (number, name)
        chosen = by_elements(selection(number + 1))
        oracle.select(chosen, restore)
        if tuned:
            tuned.reselect(chosen, optimizer, restore=restore)
        else:
            optimizer.reselect(chosen, model)
        for name, expected in oracle.weights.items():
            assert torch.allclose(model.get_parameter(name), expected, rtol=1e-11, atol=1e-13), (number, name)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("units", UNITS)
def test_every_unit_is_trained_as_if_it_were_alone(units: str, restore: bool) -> None:
    model = Zoo().double()
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.1, "amsgrad": False}
    oracle = Oracle(model, **options)
    chosen = [
        Selection.random(SHAPES, 0.4, seed=seed, names=list(SHAPES)[seed % 2 :], **UNITS[units]) for seed in range(4)
    ]
    oracle.select(chosen[0], restore)
    tuned = sk.train_only(model, chosen[0])
    optimizer = sk.SparseAdamW(tuned.parameters(), **options)
    for number, following in enumerate([*chosen[1:], None]):
        for seed in range(3):
            oracle.step(stepped(tuned, optimizer, 3 * number + seed))
        if following is not None:
            oracle.select(following, restore)
            tuned.reselect(following, optimizer, restore=restore)
        for name, expected in oracle.weights.items():
            assert torch.allclose(model.get_parameter(name), expected, rtol=1e-11, atol=1e-13), (number, name)
    assert restore or tuned.left


def test_an_age_for_each_position_only_where_they_differ() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tuned = sk.train_only(
        model, Selection({"0.weight": Index(torch.tensor([1, 4, 9]), (3, 4)), "1.weight": Index.full((2, 3))})
    )
    optimizer = sk.SparseAdamW(tuned.parameters())
    for seed in range(2):
        stepped(tuned, optimizer, seed)
    before = {name: optimizer.state[values] for name, values in tuned.named_parameters()}

    def state(name: str, positions: list[int], rows: bool = False) -> dict[str, Tensor]:
        shape = model.get_parameter(name).shape
        tuned.reselect(
            Selection({name: Index(torch.tensor(positions), shape, "row" if rows else "element")}), optimizer
        )
        return optimizer.state[dict(tuned.named_parameters())[name]]

    twin = copy.deepcopy((tuned, optimizer))
    found = state("0.weight", [4, 9])
    assert found["step"].shape == ()
    assert int(found["step"]) == 2
    assert torch.equal(found["exp_avg"], before["0.weight"]["exp_avg"][1:])
    found = state("0.weight", [3, 4, 9, 11])
    assert found["step"].tolist() == [0, 2, 2, 0]
    assert torch.equal(found["exp_avg_sq"][[1, 2]], before["0.weight"]["exp_avg_sq"][1:])
    assert not found["exp_avg"][[0, 3]].any()
    assert state("0.weight", [4])["step"].shape == (), "all of one step count again"
    assert not state("0.weight", [5]), "nothing kept"
    assert not any(optimizer.state.values()), "state of what left is gone"

    tuned, optimizer = twin
    model = tuned.model
    found = state("1.weight", [1], rows=True)
    assert found["step"].shape == ()
    assert torch.equal(found["exp_avg"], before["1.weight"]["exp_avg"][1:])
    assert state("1.weight", [0, 1], rows=True)["step"].tolist() == [0, 2]
    assert state("1.weight", [0, 4, 5])["step"].tolist() == [0, 2, 2], "elements of rows have the step count of the row"
    with pytest.raises(ValueError, match=r"row 1 of '1\.weight' is new in part.*to_elements"):
        state("1.weight", [1], rows=True)
    assert state("1.weight", [4, 5])["step"].shape == ()


Case = tuple[torch.dtype, bool]
CASES = [(dtype, restore) for dtype in (torch.float32, torch.bfloat16) for restore in (True, False)]


@pytest.mark.parametrize(("dtype", "restore"), CASES)
@pytest.mark.parametrize("optimizer", ["SparseAdamW", "AdamW-fused"])
def test_restore_and_delta_stay_exact(optimizer: str, dtype: torch.dtype, restore: bool) -> None:
    model = Zoo().to(dtype)
    base, before = copy.deepcopy(model), found(model)
    tuned = sk.train_only(model, selection(0))
    stepper: torch.optim.Optimizer = (
        sk.SparseAdamW(tuned.parameters(), lr=0.05)
        if optimizer == "SparseAdamW"
        else torch.optim.AdamW(tuned.parameters(), lr=0.05, fused=True)
    )
    trained = Selection({})
    for number in range(5):
        model(ids(4, 7, seed=number)).float().square().sum().backward()
        stepper.step()
        trained = trained | tuned.selection
        state = copy.deepcopy(model.state_dict())
        fresh = copy.deepcopy(base)
        delta = tuned.delta()
        with delta.apply(fresh):
            assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in base.state_dict().items())
        expected = tuned.selection if restore else trained
        assert dict(by_elements(delta.selection)) == dict(by_elements(expected))
        for name, value in state.items():
            kept = put(value, trained[name], take(base.state_dict()[name], trained[name])) if name in trained else value
            assert torch.equal(kept, base.state_dict()[name]), f"{name} changed outside of all that was selected"
        # Without the state of the optimizer where rows and elements meet: their step counts would differ.
        tuned.reselect(selection(number + 1), None, restore=restore)
        assert [name for name, _ in tuned.named_parameters()] == list(selection(number + 1))
        assert dict(tuned.selection) == dict(selection(number + 1))
        now = model.state_dict()
        for name in state if not restore else ():
            assert torch.equal(now[name], state[name])
        for name in now if restore else ():
            if name not in tuned.selection:
                assert torch.equal(now[name], base.state_dict()[name])
        stepper = type(stepper)(tuned.parameters(), lr=0.05)
    assert tuned.restore() is model
    assert found(model) == before


def test_mixed_ways_of_leaving() -> None:
    """What one call left stays when the next restores, comes back with its originals, and merges as it is."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    base = model[0].weight.detach().clone()
    tuned = sk.train_only(model, pick([0, 1]))
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    stepped(tuned, optimizer, 0)
    first = model[0].weight.detach().clone()
    tuned.reselect(pick([1, 2]), optimizer, restore=False)
    stepped(tuned, optimizer, 1)
    tuned.reselect(pick([3]), optimizer)
    now = model[0].weight.detach()
    assert torch.equal(now[0, :1], first[0, :1]), "left by the first call"
    assert torch.equal(now[0, 1:], base[0, 1:]), "restored by the second"
    assert dict(tuned.delta().selection) == dict(pick([0, 3]))
    tuned.reselect(pick([0, 3]), optimizer)
    assert dict(tuned.delta().selection) == dict(pick([0, 3]))
    assert torch.equal(next(tuned.parameters())[0], first[0, 0]), "from where it stands"
    twin = copy.deepcopy(tuned)
    twin.reselect(pick([2]), restore=False)
    assert torch.equal(twin.restore()[0].weight, base)
    tuned.reselect(Selection({}), optimizer)
    assert list(tuned.parameters()) == []
    assert torch.equal(model[0].weight, base)
    assert model[0].weight.requires_grad is False
    tuned.restore()
    assert torch.equal(model[0].weight, base)
    assert model[0].weight.requires_grad


def test_values_are_kept_wider_than_their_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).to(torch.bfloat16)
    tuned = sk.train_only(model, pick([0, 1]))
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=1e-5)
    stepped(tuned, optimizer, 0)
    (before,) = tuned.parameters()
    assert not torch.equal(before, before.bfloat16().float())
    before.requires_grad_(False)
    tuned.reselect(pick([1, 3]), optimizer)
    (after,) = tuned.parameters()
    assert torch.equal(after[0], before[1])
    assert after.dtype == torch.float32
    assert not after.requires_grad, "who froze the values meant the new ones, too"


def test_values_changed_by_hand_are_written_first() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    tuned = sk.train_only(model, pick([0, 1]))
    with torch.no_grad():
        next(tuned.parameters()).copy_(torch.tensor([5.0, 6.0]))
    tuned.reselect(pick([1, 2]), restore=False)
    assert model.state_dict()["0.weight"][0, :2].tolist() == [5.0, 6.0]


@pytest.mark.parametrize("gradual", [False, True])
def test_only_what_changes_is_exchanged(gradual: bool) -> None:
    """A loss of the last iteration that is still around disturbs nothing."""
    model = Zoo()
    first = selection(1)
    second = Selection({**first, "up.weight": selection(2)["up.weight"]})
    tuned = sk.train_only(model, first)
    optimizer = sk.SparseAdamW(tuned.parameters())
    before = dict(tuned.named_parameters())
    loss = model(ids(4, 7)).square().sum()
    loss.backward()
    if gradual:
        optimizer.step()
    tuned.reselect(second, optimizer if gradual else None)
    after = dict(tuned.named_parameters())
    assert [name for name in after if after[name] is not before[name]] == ["up.weight"]
    assert all((values.grad is None) == (name == "up.weight") for name, values in after.items())
    model(ids(4, 7)).square().sum().backward()
    assert after["up.weight"].grad is not None
    assert after["up.weight"].grad.shape == second["up.weight"].compact_shape
    assert loss is not None
    # Whoever goes on with the optimizer of before steps values that no weight listens to any more.
    old = before["up.weight"]
    weight = model.up.weight.detach().clone()
    old.grad = torch.ones_like(old)
    sk.SparseAdamW([old], lr=1.0).step()
    assert torch.equal(model.up.weight, weight)


def momentum(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, momentum])
def test_other_optimizers_keep_what_is_shaped_like_the_values(make: Callable) -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    tuned = sk.train_only(model, pick([0, 1]))
    optimizer = make(tuned.parameters())
    for seed in range(2):
        stepped(tuned, optimizer, seed)
    (before,) = (dict(state) for state in optimizer.state.values())
    tuned.reselect(pick([1, 2]), optimizer)
    (after,) = optimizer.state.values()
    (values,) = tuned.parameters()
    assert optimizer.state[values] is after
    assert after.keys() == before.keys()
    for key, value in before.items():
        if value.dim():
            assert after[key].tolist() == [float(value[1]), 0.0]
        else:
            assert torch.equal(after[key], value)
    weight = model[0].weight.detach().clone()
    stepped(tuned, optimizer, 3)
    assert torch.equal(model[0].weight != weight, torch.tensor([[False, True, True, False]]))


def test_a_skipped_step_leaves_the_ages() -> None:
    """An infinite gradient under GradScaler: no position grows older."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    tuned = sk.train_only(model, pick([0, 1]))
    optimizer = sk.SparseAdamW(tuned.parameters(), fused=True)
    stepped(tuned, optimizer, 0)
    tuned.reselect(pick([1, 2]), optimizer)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, step_counts in ((float("inf"), [1, 0]), (1.0, [2, 1])):
        optimizer.zero_grad()
        (scaler.scale(model(torch.ones(1, 4)).sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        (state,) = optimizer.state.values()
        assert state["step"].tolist() == step_counts
        assert torch.equal(model[0].weight, before["0.weight"]) == (factor > 1)


def test_a_tied_weight_under_its_other_name() -> None:
    model = transformer("gpt2")
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_output_embeddings().weight]
    base, before = copy.deepcopy(model), found(model)
    shape = model.get_output_embeddings().weight.shape

    def rows(name: str, *positions: int) -> Selection:
        return Selection({name: Index(torch.tensor(positions), shape, granularity="row")})

    tuned = sk.train_only(model, rows(names[0], 1, 3))
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    next(tuned.parameters()).grad = torch.ones(2, shape[1])
    optimizer.step()
    tuned.reselect(rows(names[1], 3, 5), optimizer, restore=False)
    assert list(tuned.selection) == [names[1]]
    (state,) = optimizer.state.values()
    assert state["step"].tolist() == [1, 0]
    assert torch.equal(next(tuned.parameters())[0], model.get_output_embeddings().weight[3])
    assert not torch.equal(model.get_output_embeddings().weight[3], base.get_output_embeddings().weight[3])
    other = {
        "state": {0: {**state, "positions": torch.tensor([0, 1])}},
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    with pytest.raises(ValueError, match=f"'{names[1]}'.*other positions"):
        optimizer.load_state_dict(other)
    delta = tuned.delta()
    assert dict(delta.selection) == dict(rows(names[1], 1, 3, 5))
    delta.apply(base)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
    tuned.restore()
    assert found(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_is_reselected_by_itself(copied: Callable) -> None:
    model = Zoo()
    base = copy.deepcopy(model.state_dict())
    tuned = sk.train_only(model, by_elements(selection(0)))
    optimizer = sk.SparseAdamW(tuned.parameters())
    stepped(tuned, optimizer, 0)
    tuned.reselect(by_elements(selection(1)), optimizer, restore=False)
    before = found(model)
    other, stepper = copied((tuned, optimizer))
    other.reselect(by_elements(selection(2)), stepper)
    stepped(other, stepper, 1)
    assert found(model) == before
    assert all(torch.equal(value, base[name]) for name, value in other.restore().state_dict().items())
    tuned.reselect(by_elements(selection(2)), optimizer)
    stepped(tuned, optimizer, 1)
    assert all(torch.equal(value, base[name]) for name, value in tuned.restore().state_dict().items())
