"""Stop, save, load, go on, with sparse gradients, narrow moments and stochastic rounding: to the last bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from test_resume import same, through_file
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
V, D = 40, 4
MORE: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"sparse_bias_correction": "row", "sparse_decay": "catch_up"},
]
ROUNDED = {"state_dtype": BF16, "stochastic_rounding": True, "seed": 3}


def table(dtype: torch.dtype) -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(V, D, sparse=True).to(dtype)


def train(embedding: nn.Embedding, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for seed in range(first, last):
        optimizer.zero_grad()
        ids = torch.randint(0, V, (6,), generator=torch.Generator().manual_seed(seed))
        embedding(ids).float().square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("rounding", [{}, {"state_dtype": BF16}, ROUNDED], ids=["wide", "bf16", "stochastic"])
@pytest.mark.parametrize("more", MORE, ids=str)
@pytest.mark.parametrize("state", ["seen", "all"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_state_of_sparse_gradients(
    dtype: torch.dtype, state: str, more: dict[str, Any], rounding: dict[str, Any]
) -> None:
    """Row numbers stay whole, moments keep their dtype; the file says what the options were."""
    embedding = table(dtype)
    optimizer = sk.SparseAdamW(embedding.parameters(), lr=0.1, sparse_state=state, **more, **rounding)
    train(embedding, optimizer, 0, 3)
    weights, saved = through_file(embedding.state_dict()), through_file(optimizer.state_dict())
    assert saved["state"][0]["exp_avg"].dtype == rounding.get("state_dtype", FP32)
    train(embedding, optimizer, 3, 6)
    again = table(dtype)
    other = sk.SparseAdamW(again.parameters())
    other.load_state_dict(saved)
    again.load_state_dict(weights)
    loaded = other.state_dict()["state"][0]
    assert all(torch.equal(loaded[name], value) for name, value in saved["state"][0].items())
    train(again, other, 3, 6)
    assert torch.equal(embedding.weight, again.weight)
    assert same(optimizer.state[embedding.weight], other.state[again.weight])


class Elements:
    """A Linear with all three: compact Parameters or indices for its weight, dense steps for its bias."""

    def __init__(self, form: str, dtype: torch.dtype, **options: Any) -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
        chosen = Selection({"0.weight": Index(torch.arange(0, 30, 2), (5, 6))})
        groups: list[dict[str, Any]] = [{"params": [self.model[0].bias]}]
        if form == "compact":
            groups.append({"params": list(sk.train_only(self.model, chosen).parameters())})
            self.model[0].bias.requires_grad_(True)
        else:
            groups += chosen.param_groups(self.model)
        self.optimizer = sk.SparseAdamW(groups, lr=0.05, weight_decay=0.1, **options)

    def train(self, first: int, last: int) -> None:
        for seed in range(first, last):
            self.optimizer.zero_grad()
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)).to(self.model[0].bias.dtype)
            self.model(x).float().square().sum().backward()
            self.optimizer.step()

    def everything(self) -> dict[str, Tensor]:
        found = {name: p.detach() for name, p in self.model.named_parameters()}
        for i, state in enumerate(self.optimizer.state.values()):
            found |= {f"{name} {i}": value for name, value in state.items()}
        return found


@pytest.mark.parametrize("rounding", [{"state_dtype": BF16}, ROUNDED, {**ROUNDED, "amsgrad": True}], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("form", ["compact", "indexed"])
def test_narrow_moments_and_rounding(form: str, dtype: torch.dtype, rounding: dict[str, Any]) -> None:
    run = Elements(form, dtype, **rounding)
    run.train(0, 3)
    saved = through_file({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})
    assert saved["optimizer"]["state"][1]["exp_avg"].dtype == BF16
    run.train(3, 6)
    twin = Elements(form, dtype)
    twin.optimizer.load_state_dict(saved["optimizer"])
    twin.model.load_state_dict(saved["model"])
    loaded = twin.optimizer.state_dict()["state"]
    assert all(same(loaded[key], entry) for key, entry in saved["optimizer"]["state"].items())
    twin.train(3, 6)
    assert same(run.everything(), twin.everything())
    plain = Elements(form, dtype, amsgrad=rounding.get("amsgrad", False))
    plain.train(0, 6)
    assert not same(run.everything(), plain.everything()), "the options change nothing, else"


@pytest.mark.parametrize("state", ["seen", "all"])
@pytest.mark.parametrize("narrow", [None, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_sparse_adam_goes_on_as_sparse_adamw(dtype: torch.dtype, narrow: torch.dtype | None, state: str) -> None:
    """Its moments, of the dtype of the table, become what ours are, and stay that through the next file."""
    embedding = table(dtype)
    sparse_adam = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    train(embedding, sparse_adam, 0, 3)
    saved = through_file(sparse_adam.state_dict())
    options = {"weight_decay": 0.0, "sparse_state": state, "state_dtype": narrow}
    optimizer = sk.SparseAdamW(embedding.parameters(), **options)
    optimizer.load_state_dict(saved)
    entry = optimizer.state[embedding.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(entry[name], saved["state"][0][name].to(narrow or FP32))
        assert entry[name].dtype == (narrow or FP32)
    before = embedding.weight.detach().float().clone()
    weights = through_file(embedding.state_dict())
    train(embedding, optimizer, 3, 5)
    assert float(entry["step"]) == 5

    expected = table(FP32)
    expected.load_state_dict(weights)
    reference = torch.optim.SparseAdam(expected.parameters())
    reference.load_state_dict(saved)
    train(expected, reference, 3, 5)
    moved, wanted = embedding.weight.detach().float() - before, expected.weight.detach() - before
    assert (wanted != 0).any()
    atol = 1e-6 if dtype == FP32 and narrow is None else 0.02
    torch.testing.assert_close(moved, wanted, rtol=0, atol=atol)

    middle, weights = through_file(optimizer.state_dict()), through_file(embedding.state_dict())
    train(embedding, optimizer, 5, 7)
    again = table(dtype)
    again.load_state_dict(weights)
    other = sk.SparseAdamW(again.parameters())
    other.load_state_dict(middle)
    train(again, other, 5, 7)
    assert torch.equal(embedding.weight, again.weight)
    assert same(optimizer.state[embedding.weight], other.state[again.weight])


@pytest.mark.parametrize("number", [False, True])
@pytest.mark.parametrize("state", ["seen", "all"])
def test_dense_gradients_find_the_moments_that_torch_wants(state: str, number: bool) -> None:
    """bf16 for a bf16 parameter, in a group that may hold tables as well, and from files of old with a plain number."""
    p = nn.Parameter(torch.ones(V, D, dtype=BF16))
    p.grad = torch.full_like(p, 0.5)
    adamw = torch.optim.AdamW([p])
    adamw.step()
    q = copy.deepcopy(p)
    q.grad = p.grad
    optimizer = sk.SparseAdamW([q], sparse_state=state)
    saved = through_file(adamw.state_dict())
    if number:
        saved["state"][0]["step"] = 1.0
    optimizer.load_state_dict(saved)
    assert optimizer.state[q]["exp_avg"].dtype == BF16
    adamw.step()
    optimizer.step()
    assert torch.equal(p, q)
    assert same(optimizer.state[q], adamw.state[p])


def test_a_file_holds_no_room_for_rows_to_come() -> None:
    p = nn.Parameter(torch.zeros(5000, 64))
    optimizer = sk.SparseAdamW([p], sparse_decay="catch_up", sparse_bias_correction="row")

    def step(first: int, last: int) -> None:
        p.grad = torch.sparse_coo_tensor(
            torch.arange(first, last)[None], torch.ones(last - first, 64), p.shape, check_invariants=True
        )
        optimizer.step()

    step(0, 1000)
    step(1000, 1010)
    entry = optimizer.state[p]
    assert entry["exp_avg"].untyped_storage().nbytes() > 1.9 * 1010 * 64 * 4, "else this shows nothing"
    file = io.BytesIO()
    state = optimizer.state_dict()
    torch.save(state, file)
    assert file.tell() < 1.02 * sum(x.numel() * x.itemsize for x in entry.values()) + 5000
    assert same(state["state"][0], entry)


def test_rows_that_another_optimizer_rounded_are_refused() -> None:
    embedding = table(BF16)
    optimizer = sk.SparseAdamW(embedding.parameters())
    train(embedding, optimizer, 0, 2)
    other = torch.optim.AdamW(embedding.parameters())
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another optimizer changed this state.*bfloat16"):
        optimizer.load_state_dict(other.state_dict())
