"""What a re-selection does to the groups of an optimizer, and what it refuses before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Zoo, ids, transformer
from reselecting import by_elements, pick, selection, stepped
from test_train_only import found
from torch import nn

import sparsekernels as sk
from sparsekernels import Index, Selection


def test_places_in_the_groups() -> None:
    """In the order of the selection, options and strangers where they were, names along."""
    model = Zoo()
    stranger, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    names = ["up.weight", "norm.bias", "up.bias", "norm.weight", "head.bias"]
    full = {name: Index.full(model.get_parameter(name).shape) for name in names}

    def chosen(*names: str) -> Selection:
        return Selection({name: full[name] for name in names})

    tuned = sk.train_only(model, chosen("up.weight", "norm.bias", "up.bias"))
    values = dict(tuned.named_parameters())
    optimizer = sk.SparseAdamW(
        [
            {"params": [("stranger", stranger)], "lr": 0.5},
            {"params": [("a", values["up.weight"]), ("b", values["up.bias"])], "lr": 0.1},
            {"params": [("c", values["norm.bias"]), ("other", other)], "lr": 0.2},
        ]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def groups() -> list[list[str]]:
        known = {id(p): name for name, p in tuned.named_parameters()} | {id(stranger): "stranger", id(other): "other"}
        for group in optimizer.param_groups:
            assert len(group["params"]) == len(group["param_names"])
        return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    def step() -> None:
        optimizer.zero_grad()
        model(ids(2, 3)).square().sum().backward()
        stranger.grad = other.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()

    step()
    tuned.reselect(chosen("head.bias", "norm.bias", "up.bias", "up.weight"), optimizer)
    assert groups() == [["stranger"], ["head.bias", "up.bias", "up.weight"], ["norm.bias", "other"]]
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["stranger"],
        ["head.bias", "b", "a"],
        ["c", "other"],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05, 0.1]
    step()
    tuned.reselect(chosen("norm.bias", "norm.weight"), optimizer)
    assert groups() == [["stranger"], ["norm.weight"], ["norm.bias", "other"]]
    step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0625, 0.0125, 0.025]
    tuned.reselect(Selection({}), optimizer)
    assert groups() == [["stranger"], [], ["other"]]
    tuned.reselect(chosen("up.bias"), optimizer)
    assert groups() == [["stranger", "up.bias"], [], ["other"]], "nothing of the model left: the first group"
    step()
    assert set(optimizer.state) == {stranger, other, *tuned.parameters()}


def unfit(model: nn.Module, chosen: dict[str, Index]) -> Selection:
    return Selection({"up.bias": Index.full((32,)), **chosen})


REFUSED: dict[str, tuple[Callable[[nn.Module], Selection], str]] = {
    "no such name": (lambda m: unfit(m, {"nothing": Index.full((2,))}), "lacks: nothing"),
    "another shape": (lambda m: unfit(m, {"up.weight": Index.full((2, 2))}), r"up\.weight.*shape \[2, 2\]"),
    "values": (
        lambda m: unfit(m, {"norm.bias_values": Index.full(m.norm.bias_values.shape)}),
        r"norm\.bias_values.*compact Parameter",
    ),
    "max_norm": (lambda m: unfit(m, {"limited.weight": Index.full((3, 2))}), r"limited\.weight.*max_norm"),
    "rows new in part": (
        lambda m: unfit(m, {"up.weight": Index.full((32, 16))}),
        r"of 'up\.weight' is new in part",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case: str) -> None:
    make, words = REFUSED[case]
    model = Zoo()
    model.limited = nn.Embedding(3, 2, max_norm=1.0)
    tuned = sk.train_only(model, by_elements(selection(1)))
    optimizer = sk.SparseAdamW(tuned.named_parameters())
    stepped(tuned, optimizer, 0)
    untouched(model, tuned, optimizer, lambda: tuned.reselect(make(model), optimizer), words)


def untouched(
    model: nn.Module,
    tuned: sk.SparseModel | None,
    optimizer: torch.optim.Optimizer,
    act: Callable[[], None],
    words: str,
    error: type[Exception] = ValueError,
) -> None:
    def facts() -> list[Any]:
        state = {id(p): {key: id(value) for key, value in entry.items()} for p, entry in optimizer.state.items()}
        groups = [
            (list(map(id, group["params"])), group.get("param_names"), list(map(id, group.get("indices") or ())))
            for group in optimizer.param_groups
        ]
        return [found(model), state, groups, dict(tuned.slots) if tuned else None]

    before = copy.copy(facts())
    with pytest.raises(error, match=words):
        act()
    assert facts() == before


def test_optimizers_that_are_refused() -> None:
    model = Zoo()
    tuned = sk.train_only(model, selection(3))
    optimizer = sk.SparseAdamW(list(tuned.parameters())[1:])
    stepped(tuned, optimizer, 0)
    name = next(iter(tuned.slots))
    untouched(
        model,
        tuned,
        optimizer,
        lambda: tuned.reselect(selection(2), optimizer),
        f"'{name}' is not among the parameters",
    )
    untouched(
        model,
        tuned,
        optimizer,
        lambda: tuned.reselect(selection(2), model),
        "must be a torch.optim.Optimizer",
        TypeError,
    )
    other = torch.optim.Adafactor(tuned.parameters())
    stepped(tuned, other, 0)
    untouched(model, tuned, other, lambda: tuned.reselect(selection(2), other), "cannot be divided.*new Adafactor")

    def inference() -> None:
        with torch.inference_mode():
            tuned.reselect(selection(2))

    untouched(model, tuned, other, inference, "inference_mode")
    tuned.restore()
    with pytest.raises(RuntimeError, match="this SparseModel is closed"):
        tuned.reselect(selection(2))


def test_through_the_wrapper_of_accelerate() -> None:
    from accelerate import Accelerator

    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    tuned = sk.train_only(model, pick([0, 1]))
    optimizer = Accelerator(cpu=True).prepare(sk.SparseAdamW(tuned.parameters()))
    stepped(tuned, optimizer, 0)
    tuned.reselect(pick([1, 2]), optimizer)
    stepped(tuned, optimizer, 1)
    (state,) = optimizer.state.values()
    assert state["step"].tolist() == [2, 1]


def test_indices_of_dense_parameters() -> None:
    """Groups, names and state follow; weights do not move; parameters without indices stay as they are."""
    model = Zoo()
    (group,) = pick([1, 4, 9], (32, 16), "up.weight").param_groups(model)
    group["params"] = [("up.weight", model.up.weight)]
    optimizer = sk.SparseAdamW([{"params": [("head.bias", model.head.bias)]}, group])
    model(ids(2, 3)).square().sum().backward()
    optimizer.step()
    before = {p: dict(state) for p, state in optimizer.state.items()}
    weights_before = copy.deepcopy(model.state_dict())
    chosen = pick([3], (16,), "norm.bias") | pick([4, 5], (32, 16), "up.weight")
    optimizer.reselect(chosen, model)
    dense, indexed = optimizer.param_groups
    assert dense["params"] == [model.head.bias]
    assert optimizer.state[model.head.bias] == before[model.head.bias]
    assert [id(p) for p in indexed["params"]] == [id(model.get_parameter(name)) for name in chosen]
    assert indexed["indices"] == list(chosen.values())
    assert indexed["param_names"] == list(chosen)
    state = optimizer.state[model.up.weight]
    assert state["step"].tolist() == [1, 0]
    assert state["exp_avg"].tolist() == [float(before[model.up.weight]["exp_avg"][1]), 0.0]
    assert all(torch.equal(value, weights_before[name]) for name, value in model.state_dict().items())
    model.zero_grad()
    model(ids(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.reselect(pick([3], (16,), "norm.bias"), model)
    assert [id(p) for p in indexed["params"]] == [id(model.norm.bias)]
    assert model.up.weight not in optimizer.state
    optimizer.reselect(Selection({}), model)
    assert indexed["params"] == []
    optimizer.step()
    optimizer.reselect(chosen, model)
    assert len(indexed["params"]) == 2


def test_a_group_whose_indices_are_none_has_none() -> None:
    model = Zoo()
    (group,) = pick([1, 4, 9], (32, 16), "up.weight").param_groups(model)
    optimizer = sk.SparseAdamW([{"params": [model.head.bias], "indices": None}, group])
    optimizer.reselect(pick([4, 5], (32, 16), "up.weight"), model)
    assert [group["indices"] for group in optimizer.param_groups] == [None, [Index(torch.tensor([4, 5]), (32, 16))]]
    before = model.head.bias.detach().clone()
    model(ids(2, 3)).square().sum().backward()
    optimizer.step()
    assert (model.head.bias != before).all()


def test_what_is_refused_for_dense_parameters() -> None:
    model = Zoo()
    (group,) = by_elements(selection(1)).param_groups(model)
    optimizer = sk.SparseAdamW([{"params": [model.head.bias]}, group])
    model(ids(2, 3)).square().sum().backward()
    optimizer.step()

    def refused(chosen: Selection, words: str, of: sk.SparseAdamW = optimizer) -> None:
        untouched(model, None, of, lambda: of.reselect(chosen, model), words)

    refused(pick([1], (5,), "head.bias"), "'head.bias' is in a group without indices")
    refused(pick([1], (5,), "nothing"), "lacks: nothing")
    refused(pick([1], (7,), "norm.bias"), r"norm\.bias.*shape \[7\]")
    refused(Selection({"up.weight": Index.full((32, 16))}), "of 'up.weight' is new in part")
    refused(pick([1], (16,), "norm.bias"), "no parameter group with indices", sk.SparseAdamW([model.head.bias]))
    model.down.weight = nn.Parameter(model.down.weight.detach().T.contiguous().T)
    refused(pick([1], (16, 32), "down.weight"), "'down.weight' must be floating point and contiguous")
    with sk.train_only(model, pick([1], (5,), "head.bias")):
        refused(selection(2), "trains a selection")
    tied = transformer("gpt2")
    names = [n for n, p in tied.named_parameters(remove_duplicate=False) if p is tied.get_output_embeddings().weight]
    index = Index(torch.tensor([1]), tied.get_output_embeddings().weight.shape)
    stepper = sk.SparseAdamW(Selection({names[0]: index}).param_groups(tied))
    with pytest.raises(ValueError, match="one tied weight"):
        stepper.reselect(Selection(dict.fromkeys(names, index)), tied)
