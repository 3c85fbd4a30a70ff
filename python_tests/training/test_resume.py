"""Stop, save, load, go on: to the last bit the run that never stopped. And state that belongs elsewhere is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resuming
import torch
from processes import in_another_process, uses_processes
from resuming import STEPS, Case, Run
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

CASES = list(resuming.cases())
FORMS = ("compact", "indexed", "dense")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


pytestmark = uses_processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case is stopped here and saved; one new process goes on with all of them."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        run = Run(case)
        run.train(0, case.stop)
        torch.save(run.checkpoint(), folder / f"{case}.checkpoint")
    in_another_process(resuming.resume_all, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_new_process_goes_on_as_if_nothing_had_been(case: Case, results: Path) -> None:
    run = Run(case)
    run.train(0, STEPS)
    expected, found = run.everything(), torch.load(results / f"{case}.result")
    different = [key for key in expected if key not in found or not torch.equal(expected[key], found[key])]
    assert not different
    assert same(expected, found)
    if run.tuned is not None:
        assert all(torch.equal(found[f"base {name}"], value) for name, value in run.base.items())


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_holds_nothing_but_plain_things(form: str) -> None:
    run = Run(Case(form, "bfloat16", amsgrad=True))
    run.train(0, 2)

    def check(x: Any) -> None:
        if isinstance(x, dict):
            assert type(x) is dict
            for key, value in x.items():
                check(key)
                check(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                check(value)
        else:
            assert x is None or type(x) in (Tensor, int, float, bool, str)

    state = run.optimizer.state_dict()
    check(state)
    extra = {"compact": {"positions", "master"}, "indexed": {"positions"}, "dense": set()}[form]
    for entry in state["state"].values():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} | extra
    assert all("positions" not in entry for entry in run.optimizer.state.values()), "kept only in the file"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_saves_what_its_original_would(form: str, copied: Callable) -> None:
    """Asked at once, before any forward could tell the copied Parameters what they are."""
    run = Run(Case(form, "bfloat16"))
    run.train(0, 3)
    twin = copied(run)
    ours, theirs = run.optimizer.state_dict(), twin.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert all(same(ours["state"][key], theirs["state"][key]) for key in ours["state"])
    twin.optimizer.load_state_dict(through_file(ours))
    twin.train(3, STEPS)
    run.train(3, STEPS)
    assert same(run.everything(), twin.everything())


def plain(index: Index | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, sk.SparseModel]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    return model, sk.train_only(model, Selection({"0.weight": index or Index(torch.tensor([1, 4, 9]), (5, 6))}))


def stepped(tuned: sk.SparseModel, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    for p in tuned.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


@pytest.mark.parametrize("form", ["compact", "indexed"])
@pytest.mark.parametrize("named", [False, True])
def test_other_positions_of_the_same_size_are_refused(form: str, named: bool) -> None:
    runs = []
    for positions in ([1, 4, 9], [1, 4, 10]):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(6, 5))
        chosen = Selection({"0.weight": Index(torch.tensor(positions), (5, 6))})
        if form == "compact":
            tuned = sk.train_only(model, chosen)
            optimizer = sk.SparseAdamW(tuned.named_parameters() if named else tuned.parameters())
        else:
            (group,) = chosen.param_groups(model)
            if named:
                group["params"] = [("0.weight", model[0].weight)]
            optimizer = sk.SparseAdamW([group])
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        runs.append((model, optimizer))
    (_, saved), (model, optimizer) = runs
    weights, before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError,
        match=r"0\.weight.*same size but with other positions.*reselect"
        if named or form == "compact"
        else r"params\[0\].*same size but with other positions.*reselect",
    ):
        optimizer.load_state_dict(saved.state_dict())
    assert same(weights, model.state_dict())
    assert same(before["state"][0], optimizer.state_dict()["state"][0])
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_state_dict_of_something_else_is_refused() -> None:
    _, tuned = plain()
    optimizer = sk.SparseAdamW(tuned.parameters())
    stepped(tuned, optimizer)
    good = copy.deepcopy(optimizer.state_dict())
    for change, words in (
        ({"step": torch.ones(2)}, "another selection: step"),
        ({"master": torch.ones(2)}, "another selection: master"),
        ({"positions": torch.tensor([1, 4])}, "other positions"),
    ):
        bad = {**good, "state": {0: {**good["state"][0], **change}}}
        with pytest.raises(ValueError, match=rf"0\.weight.*{words}"):
            optimizer.load_state_dict(bad)
        assert same(good["state"][0], optimizer.state_dict()["state"][0])
    without = {key: value for key, value in good["state"][0].items() if key != "step"}
    with pytest.raises(ValueError, match="not a state_dict of AdamW"):
        optimizer.load_state_dict({**good, "state": {0: without}})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**good, "param_groups": good["param_groups"] * 2})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_master_comes_with_the_optimizer(dtype: torch.dtype) -> None:
    """Loaded alone it writes the weight; a model loaded afterwards takes from it what its weights rounded off."""
    model, tuned = plain(dtype=dtype)
    optimizer = sk.SparseAdamW(tuned.parameters())
    stepped(tuned, optimizer)
    (values,) = tuned.parameters()
    assert not torch.equal(values, values.to(dtype).float()), "else this shows nothing"
    again, other = plain(dtype=dtype)
    (theirs,) = other.parameters()
    loader = sk.SparseAdamW(other.parameters())
    loader.load_state_dict(through_file(optimizer.state_dict()))
    assert torch.equal(theirs, values)
    assert torch.equal(again[0].weight, model[0].weight)
    again.load_state_dict(through_file(model.state_dict()))
    assert torch.equal(theirs, values)

    # Where the weights are others, they win, one by one; so does the sign of a zero.
    state = copy.deepcopy(model.state_dict())
    state["0.weight"].view(-1)[4] = 3.0
    again.load_state_dict(state)
    assert torch.equal(theirs[[0, 2]], values[[0, 2]])
    assert theirs.tolist()[1] == 3.0
    with torch.no_grad():
        theirs[1] = -1e-30
    state["0.weight"].view(-1)[4] = 0.0
    again.load_state_dict(state)
    assert not torch.signbit(theirs[1])


def test_values_go_with_exact_weights_into_a_narrow_model() -> None:
    """A checkpoint in fp32 says more than the values of a bf16 model do."""
    model, tuned = plain(dtype=torch.bfloat16)
    (values,) = tuned.parameters()
    wide = {key: value.float() * 1.001 for key, value in model.state_dict().items()}
    model.load_state_dict(wide)
    assert torch.equal(values, wide["0.weight"].view(-1)[[1, 4, 9]])


@pytest.mark.parametrize("fused", [False, True])
def test_torch_goes_on_with_compact_state_and_back(fused: bool) -> None:
    """AdamW over the same compact Parameters reads our state_dict, and we read its."""
    _, tuned = plain()
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    stepped(tuned, optimizer)
    _, other = plain()
    with torch.no_grad():
        for p, value in zip(other.parameters(), tuned.parameters(), strict=True):
            p.copy_(value)
    adamw = torch.optim.AdamW(other.parameters(), fused=fused)
    adamw.load_state_dict(through_file(optimizer.state_dict()))
    assert adamw.param_groups[0]["lr"] == 0.1
    for seed in range(1, 4):
        stepped(tuned, optimizer, seed)
        stepped(other, adamw, seed)
    for p, q in zip(tuned.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)

    state = through_file(adamw.state_dict())  # with positions that torch made floats of
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    _, elsewhere = plain(Index(torch.tensor([1, 4, 10]), (5, 6)))
    with pytest.raises(ValueError, match="other positions"):
        sk.SparseAdamW(elsewhere.parameters()).load_state_dict(state)

    fresh = torch.optim.AdamW(other.parameters(), lr=0.3, amsgrad=True)
    stepped(other, fresh)
    optimizer.load_state_dict(through_file(fresh.state_dict()))  # one that never knew of positions
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["amsgrad"]) == (0.3, True)
    stepped(tuned, optimizer)
    assert float(optimizer.state_dict()["state"][0]["step"]) == 2


def test_options_that_a_file_lacks_stay_as_the_optimizer_has_them() -> None:
    model = nn.Linear(3, 2)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.3)
    optimizer = sk.SparseAdamW(model.parameters(), sparse_decay="catch_up", weight_decay=0.7)
    state = adamw.state_dict()
    del state["param_groups"][0]["weight_decay"]
    optimizer.load_state_dict(state)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["sparse_decay"]) == (0.3, 0.7, "catch_up")
    back = torch.optim.AdamW(model.parameters())
    back.load_state_dict(optimizer.state_dict())
    model(torch.ones(3)).sum().backward()
    back.step()


def test_hooks_see_and_may_replace_what_is_saved_and_loaded() -> None:
    _, tuned = plain(dtype=torch.bfloat16)
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    stepped(tuned, optimizer)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(
        lambda _, state: seen.append("saved " + " ".join(sorted({"positions", "master"} & set(state["state"][0]))))
    )
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {"state": {}, "param_groups": state["param_groups"]})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(f"loaded {len(o.state)}"))
    optimizer.load_state_dict(state)
    assert seen == ["before saving", "saved master positions", "loaded 0"]
