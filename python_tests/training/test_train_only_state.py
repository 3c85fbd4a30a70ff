"""state_dict, save_pretrained and load_state_dict of a model under train_only: plain keys, and never a stale weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import TRANSFORMERS, Zoo, batch, ids, transformer
from samples.case import put, take
from torch import nn

import sparsekernels as sk
from sparsekernels import Selection

OPTIMIZERS = {
    "SparseAdamW": sk.SparseAdamW,
    "AdamW": torch.optim.AdamW,
    "AdamW-fused": lambda params, lr: torch.optim.AdamW(params, lr, fused=True),
    "SGD": torch.optim.SGD,
}


def step(model: nn.Module, tuned: sk.SparseModel, optimizer: str = "SparseAdamW") -> None:
    """One step, and nothing after it that might bring the weights up to date."""
    stepper = OPTIMIZERS[optimizer](tuned.parameters(), lr=0.1)
    model(ids(4, 7)).square().sum().backward()
    stepper.step()


def current(tuned: sk.SparseModel, dense: nn.Module) -> dict[str, torch.Tensor]:
    """What state_dict must hold: the weights of `dense`, with the values put in."""
    state = dict(dense.state_dict())
    for name, values in tuned.named_parameters():
        state[name] = put(state[name], tuned.selection[name], values.detach())
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_dict_has_the_same_keys_and_is_never_stale(optimizer: str, dtype: torch.dtype) -> None:
    model = Zoo().to(dtype)
    dense = copy.deepcopy(model)
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    assert same(model.state_dict(), dense.state_dict())
    step(model, tuned, optimizer)
    assert not same(model.state_dict(), dense.state_dict())
    assert same(model.state_dict(), current(tuned, dense))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_weights_themselves_are_never_stale(optimizer: str) -> None:
    model = Zoo()
    dense = copy.deepcopy(model)
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    step(model, tuned, optimizer)
    read = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if not name.endswith("_values")
    }
    expected = current(tuned, dense)
    assert all(torch.equal(value, expected[name]) for name, value in read.items())


@pytest.mark.parametrize("optimizer", ["SparseAdamW", "AdamW"])
def test_state_dict_of_a_part(optimizer: str) -> None:
    model = Zoo()
    dense = copy.deepcopy(model)
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    step(model, tuned, optimizer)
    expected = current(tuned, dense)
    assert same(model.up.state_dict(), {"weight": expected["up.weight"], "bias": expected["up.bias"]})
    part = model.norm.state_dict(prefix="my.")
    assert same(part, {"my.weight": expected["norm.weight"], "my.bias": expected["norm.bias"]})


@pytest.mark.parametrize("kind", ["bert-mlm", "gpt2", "llama"])
def test_tied_weights_in_state_dict(kind: str) -> None:
    """A tied weight is current under both of its names, whichever was selected."""
    model = transformer(kind)
    keys = list(model.state_dict())
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_output_embeddings().weight]
    assert len(tied) == 2
    for name in tied:
        with sk.train_only(model, Selection.random({name: model.get_parameter(name).shape}, 0.3)) as tuned:
            optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1)
            model(**batch(kind)).loss.backward()
            optimizer.step()
            state = model.state_dict()
            assert list(state) == keys
            (values,) = tuned.parameters()
            for key in tied:
                assert torch.equal(take(state[key], tuned.selection[name]), values.detach())


def test_manual_changes_of_the_values_are_seen() -> None:
    """Whoever writes the values in place, the next forward and the next state_dict have them."""
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 1.0, names=["head.bias"]))
    (values,) = tuned.parameters()
    with torch.no_grad():
        values.fill_(2.0)
    assert torch.equal(model.state_dict()["head.bias"], torch.full((5,), 2.0))
    with torch.no_grad():
        values.mul_(3.0)
    before = model(ids(2, 3))
    assert torch.equal(model.head.bias.detach(), torch.full((5,), 6.0))
    with torch.no_grad():
        values.add_(1.0)
    tuned.sync_()
    assert torch.equal(model.head.bias.detach(), torch.full((5,), 7.0))
    assert not torch.equal(model(ids(2, 3)), before)


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_state_dict(dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    """Loaded weights are there after the next step too: the values do not overwrite them."""
    torch.manual_seed(5)
    other = Zoo().to(source_dtype)
    model = Zoo().bfloat16().to(dtype)
    originals = copy.deepcopy(model.state_dict())
    selection = Selection.random(model, 0.3)
    tuned = sk.train_only(model, selection)
    step(model, tuned)
    given = {key: value.to(source_dtype) for key, value in originals.items()}
    for name, index in selection.items():
        given[name] = put(given[name], index, take(other.state_dict()[name], index))
    keys = list(given)
    assert str(model.load_state_dict(given)) == "<All keys matched successfully>"
    assert list(given) == keys, "the caller's dictionary stays as it is"
    expected = {key: value.to(dtype) for key, value in given.items()}
    assert same(model.state_dict(), expected)
    model(ids(4, 7))
    assert same(model.state_dict(), expected)
    for name, values in tuned.named_parameters():
        assert torch.equal(values.detach().to(dtype), take(expected[name], selection[name]))
    tuned.restore()
    for name, index in selection.items():
        assert torch.equal(take(model.state_dict()[name], index), take(originals[name], index))


def test_load_state_dict_in_the_middle_of_training() -> None:
    """Going back to a checkpoint and repeating a step gives the same weights."""
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    step(model, tuned)
    checkpoint = copy.deepcopy(model.state_dict())
    tuned.model.zero_grad()
    step(model, tuned)
    after = copy.deepcopy(model.state_dict())
    assert not same(after, checkpoint)
    model.load_state_dict(checkpoint)
    model.zero_grad()
    step(model, tuned)
    assert same(model.state_dict(), after)


def test_load_state_dict_that_does_not_fit() -> None:
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    step(model, tuned)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight"):
        model.load_state_dict({key: value for key, value in before.items() if key != "up.weight"})
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight"):
        model.load_state_dict({**before, "up.weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        model.load_state_dict({**before, "more": torch.zeros(3)})
    index = tuned.selection["norm.bias"]
    bias = put(before["norm.bias"], index, torch.ones(len(index)))
    report = model.load_state_dict({"norm.bias": bias}, strict=False)
    assert report.missing_keys == [key for key in before if key != "norm.bias"]
    assert report.unexpected_keys == []
    assert same(model.state_dict(), {**before, "norm.bias": bias})
    for name, values in tuned.named_parameters():
        assert torch.equal(values.detach(), take(model.state_dict()[name], tuned.selection[name]))


@pytest.mark.compatibility("transformers", "save_pretrained and from_pretrained", "works")
@pytest.mark.parametrize("optimizer", ["SparseAdamW", "AdamW"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_save_pretrained_and_from_pretrained(kind: str, optimizer: str, tmp_path: Path) -> None:
    model = transformer(kind)
    keys = list(model.state_dict())
    tuned = sk.train_only(model, Selection.random(model, 0.2))
    stepper = OPTIMIZERS[optimizer](tuned.parameters(), lr=0.1)
    model(**batch(kind)).loss.backward()
    stepper.step()
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert list(again.state_dict()) == keys
    assert same(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.train()(**batch(kind)).loss, model(**batch(kind)).loss)
    assert sk.train_only(again, tuned.selection).selection.numel == tuned.selection.numel


def test_torch_save_of_the_state(tmp_path: Path) -> None:
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    step(model, tuned, "AdamW")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    plain = Zoo()
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(plain(ids(4, 7)), model(ids(4, 7)))


def test_torch_save_of_the_whole_model(tmp_path: Path) -> None:
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    step(model, tuned)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same(again.state_dict(), model.state_dict())
    for m in (model, again):
        m.zero_grad()
        m(ids(4, 7)).square().sum().backward()
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


COPIES: dict[str, Callable] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("second", COPIES)
@pytest.mark.parametrize("first", COPIES)
def test_parameters_of_copies_are_saved_like_those_of_the_original(first: str, second: str) -> None:
    """A file of parameters holds tensors only, and needs no trust to be read."""
    model = Zoo()
    optimizer = sk.SparseAdamW(sk.train_only(model, Selection.random(model, 0.3)).parameters())
    sizes = set()
    for copied in (lambda x: x, COPIES[first], COPIES[second]):
        model, optimizer = copied((model, optimizer))
        file = io.BytesIO()
        torch.save({"named": dict(model.named_parameters()), "steps": optimizer.param_groups[0]["params"]}, file)
        sizes.add(file.tell())
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert same(loaded["named"], dict(model.named_parameters()))
    assert len(sizes) == 1
