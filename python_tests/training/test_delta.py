"""Delta: what it writes, what it refuses, and that it goes back to the last bit."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from deltas import State, mixed, trained, zoo
from models import Zoo, batch, ids, transformer
from safetensors import safe_open
from samples.case import take
from torch import nn

import sparsekernels as sk
from sparsekernels import Delta, Index, Selection
from sparsekernels.training.fingerprint import fingerprint


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("optimizer", [sk.SparseAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_save_load_apply_revert(dtype: torch.dtype, optimizer: type, tmp_path: Path) -> None:
    delta, expected = trained(mixed(zoo()), dtype, optimizer)
    delta.save(tmp_path / "delta.safetensors")
    again = Delta.load(tmp_path / "delta.safetensors")
    assert dict(again.selection) == dict(mixed(zoo()))
    assert (
        again.nbytes
        == delta.nbytes
        == sum(
            len(i) * 4 + i.compact_shape.numel() * torch.empty(0, dtype=dtype).element_size()
            for i in again.selection.values()
        )
    )
    model = zoo(dtype)
    applied = again.apply(model)
    assert same(model.state_dict(), expected)
    assert applied.revert() is model
    assert same(model.state_dict(), zoo(dtype).state_dict())
    applied.revert()  # the second time nothing happens
    assert same(model.state_dict(), zoo(dtype).state_dict())


def test_as_a_context_manager() -> None:
    delta, expected = trained(mixed(zoo()))
    model = zoo()
    with delta.apply(model):
        assert same(model.state_dict(), expected)
    assert same(model.state_dict(), zoo().state_dict())
    with pytest.raises(KeyboardInterrupt), delta.apply(model):
        raise KeyboardInterrupt
    assert same(model.state_dict(), zoo().state_dict())


def test_the_file_is_what_it_says(tmp_path: Path) -> None:
    """Positions and absolute values in the dtype of the weight, under the names of the checkpoint."""
    delta, expected = trained(mixed(zoo()), torch.bfloat16)
    delta.save(tmp_path / "d")
    with safe_open(str(tmp_path / "d"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for name, index in mixed(zoo()).items():
        assert torch.equal(tensors.pop(f"{name}.indices"), index.positions)
        values = tensors.pop(f"{name}.values")
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, take(expected[name], index))
    assert not tensors


def test_a_delta_does_not_follow_the_training() -> None:
    """What was taken stays as it was taken, while the model trains on, is restored, or goes away."""
    model = zoo()
    tuned = sk.train_only(model, Selection.random(model, 1.0, names=["head.bias"]))
    before = tuned.delta().changes["head.bias"].values.clone()
    delta = tuned.delta()
    with torch.no_grad():
        next(tuned.parameters()).add_(1)  # by hand: the weight has it not yet, the next delta has it
    assert torch.equal(delta.changes["head.bias"].values, before)
    assert torch.equal(tuned.delta().changes["head.bias"].values, before + 1)
    tuned.restore()
    applied = delta.apply(model)
    with torch.no_grad():
        model.head.bias.add_(1)
    applied.revert()
    assert torch.equal(model.head.bias.detach(), zoo().head.bias.detach())


def spoilt(how: str) -> nn.Module:
    model = zoo()
    with torch.no_grad():
        if how == "one selected weight":
            at = int(mixed(zoo())["up.weight"].positions[3])
            model.up.weight.view(-1)[at] += 1e-6
        elif how == "a sign of zero":
            model.norm.bias.zero_().neg_()
        elif how == "other model":
            torch.manual_seed(1)
            model = Zoo()
        elif how == "other dtype":
            model = model.to(torch.bfloat16)
        elif how == "other shape":
            model.up = nn.Linear(16, 33)
        elif how == "missing":
            del model.conv
        elif how == "trains a selection":
            sk.train_only(model, Selection.random(model, 0.1, names=["head.weight"]))
    return model


REFUSED = {
    "one selected weight": "another base: 'up.weight'",
    "a sign of zero": "another base: 'norm.bias'",
    "other model": "another base",
    "other dtype": "is torch.bfloat16, the delta was made for torch.float32",
    "other shape": r"'up.weight'.*\[33, 16\]",
    "missing": "lacks: conv.weight",
    "trains a selection": "trains a selection",
}


@pytest.mark.parametrize("how", REFUSED)
def test_another_model_is_refused_and_left_alone(how: str) -> None:
    delta, _ = trained(mixed(zoo()))
    model = spoilt(how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED[how]):
        delta.apply(model)
    assert same(model.state_dict(), before)


def test_any_selected_weight_counts() -> None:
    """Each byte of each of them is in the fingerprint."""
    delta, _ = trained(mixed(zoo()))
    model = zoo()
    for name, index in mixed(zoo()).items():
        weight = model.get_parameter(name).detach().view(-1)
        for at in index.to_elements().positions.tolist():
            bits = weight.view(torch.uint8)[4 * at : 4 * at + 4]
            for byte in range(4):
                bits[byte] ^= 1
                with pytest.raises(ValueError, match=f"another base: '{name}'"):
                    delta.apply(model)
                bits[byte] ^= 1
    assert same(model.state_dict(), zoo().state_dict())
    delta.apply(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (2,), (7, 3), (100_003,)])
def test_fingerprint_covers_all_of_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape).to(dtype)
    raw = values.view(-1).view(torch.uint8)
    size = len(raw)
    assert fingerprint(values) == fingerprint(values.clone())
    changed = []
    for byte in sorted({0, size // 4, size // 2 - 1, size // 2, 3 * size // 4, size - 2, size - 1}):
        raw[byte] ^= 1
        changed.append(fingerprint(values))
        raw[byte] ^= 1
    changed += [fingerprint(values), fingerprint(values.view(1, *shape)), fingerprint(values.view(torch.uint8))]
    assert len(set(changed)) == len(changed)


@pytest.mark.parametrize("change", ["apply", "revert"])
def test_a_backward_over_weights_that_changed_meanwhile_raises(change: str) -> None:
    """It would mix the activations of one model with the weights of another."""
    delta, _ = trained(Selection.random(zoo(), 0.1, names=["down.weight"]))
    model = zoo()
    if change == "revert":
        applied = delta.apply(model)
    loss = model(ids(4, 7)).square().sum()
    if change == "apply":
        delta.apply(model)
    else:
        applied.revert()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unselected_weights_may_differ() -> None:
    """The fingerprint covers the selected positions only."""
    delta, expected = trained(mixed(zoo()))
    model = zoo()
    with torch.no_grad():
        model.head.bias.add_(1)
    delta.apply(model)
    assert torch.equal(model.up.weight.detach(), expected["up.weight"])


def test_a_fresh_head_is_replaced_whole() -> None:
    """A head starts from random weights, other ones each time: all of it is in the delta, so no base is asked for."""
    selection = mixed(zoo()) | Selection({"head.weight": Index.full((5, 16)), "head.bias": Index.full((5,))})
    delta, expected = trained(selection)
    model = zoo()
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.bias.normal_()
    before = copy.deepcopy(model.state_dict())
    applied = delta.apply(model)
    assert same(model.state_dict(), expected)
    applied.revert()
    assert same(model.state_dict(), before)


def test_twice_is_refused() -> None:
    delta, expected = trained(mixed(zoo()))
    model = zoo()
    applied = delta.apply(model)
    with pytest.raises(ValueError, match="another base"):
        delta.apply(model)
    assert same(model.state_dict(), expected)
    applied.revert()
    assert same(model.state_dict(), zoo().state_dict())


def disjoint() -> tuple[Delta, Delta]:
    a = Selection.random(zoo(), 0.1, names=["up.weight", "norm.bias"])
    b = Selection.random(zoo(), 0.3, names=["up.weight", "down.weight"]) - a
    return trained(a)[0], trained(b)[0]


def test_deltas_that_do_not_overlap_combine_in_any_order() -> None:
    a, b = disjoint()
    assert a.overlap(b).numel == 0
    states = []
    for first, second in ((a, b), (b, a)):
        model = zoo()
        handles = [first.apply(model), second.apply(model)]
        states.append(copy.deepcopy(model.state_dict()))
        for handle in handles:
            handle.revert()
        assert same(model.state_dict(), zoo().state_dict())
    assert same(*states)


def test_merge() -> None:
    a, _ = trained(Selection.random(zoo(), 0.1, names=["up.weight", "norm.bias"]))
    b, _ = trained(Selection.random(zoo(), 0.1, names=["down.weight"]))
    one, two = zoo(), zoo()
    applied = a.merge(b).apply(one)
    a.apply(two)
    b.apply(two)
    assert same(one.state_dict(), two.state_dict())
    applied.revert()
    assert same(one.state_dict(), zoo().state_dict())


def test_merge_within_one_tensor_is_refused() -> None:
    """Each tensor has one fingerprint of its base: two sets of positions in it stay two deltas."""
    a, b = disjoint()
    with pytest.raises(ValueError, match=r"both deltas change 'up\.weight'; apply them one after the other"):
        a.merge(b)


def test_overlap() -> None:
    a, _ = trained(Selection({"up.weight": Index(torch.tensor([1, 5, 9]), (32, 16))}))
    b, _ = trained(Selection({"up.weight": Index(torch.tensor([0]), (32, 16), granularity="row")}))
    assert a.overlap(b)["up.weight"].positions.tolist() == [1, 5, 9]
    for x, y in itertools.permutations((a, b)):
        with pytest.raises(ValueError, match=r"overlap in 3 positions, first in 'up\.weight'"):
            x.merge(y)


def test_swap() -> None:
    a, state_a = trained(mixed(zoo(), seed=1))
    b, state_b = trained(mixed(zoo(), seed=2))
    model = zoo()
    applied = a.apply(model)
    assert same(model.state_dict(), state_a)
    applied = applied.swap(b)
    assert same(model.state_dict(), state_b)
    stranger = Delta({name: type(c)(c.index, c.values, "other") for name, c in a.changes.items()})
    with pytest.raises(ValueError, match="another base"):
        applied.swap(stranger)
    assert same(model.state_dict(), state_b), "the delta that was in place stays"
    applied.revert()
    assert same(model.state_dict(), zoo().state_dict())


def test_swap_to_the_same_selection_many_times() -> None:
    a, state_a = trained(mixed(zoo()))
    b, state_b = trained(mixed(zoo()), optimizer=torch.optim.SGD)
    model = zoo()
    applied = a.apply(model)
    for delta, state in [(b, state_b), (a, state_a)] * 3:
        applied = applied.swap(delta)
        assert same(model.state_dict(), state)
    assert same(applied.revert().state_dict(), zoo().state_dict())


@pytest.mark.parametrize("kind", ["bert-mlm", "gpt2", "llama"])
def test_tied_weights(kind: str, tmp_path: Path) -> None:
    model = transformer(kind)
    tuned = sk.train_only(model, Selection.random(model, 0.05))
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    model(**batch(kind)).loss.backward()
    optimizer.step()
    expected = copy.deepcopy(model.state_dict())
    tuned.delta().save(tmp_path / "d")
    fresh = transformer(kind)
    with Delta.load(tmp_path / "d").apply(fresh):
        assert same(fresh.state_dict(), expected)
        assert torch.equal(fresh(**batch(kind)).logits, model(**batch(kind)).logits)
    assert same(fresh.state_dict(), transformer(kind).state_dict())


def test_empty_selections(tmp_path: Path) -> None:
    for selection in (Selection({}), Selection({"up.weight": Index(torch.zeros(0, dtype=torch.int32), (32, 16))})):
        delta, expected = trained(selection, optimizer=sk.SparseAdamW) if selection else (Delta({}), zoo().state_dict())
        delta.save(tmp_path / "d")
        model = zoo()
        Delta.load(tmp_path / "d").apply(model).revert()
        assert same(model.state_dict(), zoo().state_dict())
        assert same(expected, zoo().state_dict())


def test_one_index_for_many_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared = Index(torch.tensor([1, 7], dtype=torch.int32), (4, 4))
    with sk.train_only(model, Selection({"0.weight": shared, "1.weight": shared})) as tuned:
        tuned.delta().save(tmp_path / "d")
    assert dict(Delta.load(tmp_path / "d").selection) == {"0.weight": shared, "1.weight": shared}
