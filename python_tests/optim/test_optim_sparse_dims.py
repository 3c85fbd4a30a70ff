"""Sparse gradients with another number of sparse dimensions than one, as `p.grad.to_sparse()` has: SparseAdam's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk

SHAPES = [((7, 5), 2), ((4, 3, 5), 1), ((4, 3, 5), 2), ((4, 3, 5), 3), ((11,), 1), ((), 0), ((4, 3), 0), ((0, 3), 2)]


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype))


def gradient(shape: tuple[int, ...], sparse_dim: int, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Duplicates, now and then nothing at all, and places that never occur."""
    generator = torch.Generator().manual_seed(step)
    count = 0 if step == 2 or 0 in shape else 6
    indices = [torch.randint(0, max(1, n - 1), (count,), generator=generator) for n in shape[:sparse_dim]]
    stacked = torch.stack(indices) if indices else torch.zeros(0, count, dtype=torch.int64)
    values = torch.randn(count, *shape[sparse_dim:], generator=generator, dtype=torch.float64).to(dtype)
    return torch.sparse_coo_tensor(stacked, values, shape, check_invariants=True)


def train(optimizer: Any, p: nn.Parameter, sparse_dim: int, steps: range, dtype: torch.dtype = torch.float64) -> None:
    for step in steps:
        p.grad = gradient(tuple(p.shape), sparse_dim, step, dtype)
        optimizer.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "maximize": {"maximize": True, "lr": 0.05},
    "tensor lr": {"lr": torch.tensor(0.02, dtype=torch.float64)},
    "all": {"sparse_state": "all", "betas": (0.7, 0.9)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("shape", "sparse_dim"), SHAPES, ids=str)
def test_is_sparse_adam(shape: tuple[int, ...], sparse_dim: int, options: dict[str, Any]) -> None:
    p, q = parameter(shape), parameter(shape)
    train(sk.SparseAdamW([p], weight_decay=0, **options), p, sparse_dim, range(6))
    torchs = {name: value for name, value in options.items() if name != "sparse_state"}
    train(torch.optim.SparseAdam([q], **torchs), q, sparse_dim, range(6))
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)
    if p.numel() > 2:
        assert not torch.equal(p.detach(), parameter(shape).detach()), "a poor test"


@pytest.mark.parametrize(("shape", "sparse_dim"), [((7, 5), 2), ((4, 3, 5), 2)])
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.3},
        {"amsgrad": True},
        {"sparse_bias_correction": "row"},
        {"sparse_decay": "catch_up", "weight_decay": 0.1},
        {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("sparse_state", ["seen", "all"])
def test_is_a_step_of_the_rows_of_a_flat_table(
    shape: tuple[int, ...], sparse_dim: int, options: dict[str, Any], sparse_state: str
) -> None:
    """Bit for bit: with decay, step counts, amsgrad and rounding, all of which the row form is tested for."""
    dtype = torch.float32
    p, flat = parameter(shape, dtype), nn.Parameter(parameter(shape, dtype).detach().flatten(0, sparse_dim - 1))
    first, second = (sk.SparseAdamW([x], 0.1, sparse_state=sparse_state, **options) for x in (p, flat))
    size = flat.shape[0]
    for step in range(5):
        p.grad = gradient(shape, sparse_dim, step, dtype)
        ids = torch.arange(size).view(shape[:sparse_dim])[tuple(p.grad._indices())]
        flat.grad = torch.sparse_coo_tensor(ids[None], p.grad._values(), flat.shape, check_invariants=True)
        first.step()
        second.step()
    assert torch.equal(p.detach().view_as(flat), flat.detach())


@pytest.mark.parametrize("sparse_state", ["seen", "all"])
@pytest.mark.parametrize(("shape", "sparse_dim"), [((7, 5), 2), ((4, 3, 5), 2), ((), 0), ((4, 3), 0)], ids=str)
def test_a_state_dict_goes_on_bit_for_bit(shape: tuple[int, ...], sparse_dim: int, sparse_state: str) -> None:
    options: dict[str, Any] = {"lr": 0.1, "sparse_state": sparse_state}
    p = parameter(shape, torch.float32)
    optimizer = sk.SparseAdamW([p], **options)
    train(optimizer, p, sparse_dim, range(3), torch.float32)
    q = nn.Parameter(p.detach().clone())
    other = sk.SparseAdamW([q], **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, p, sparse_dim, range(3, 7), torch.float32)
    train(other, q, sparse_dim, range(3, 7), torch.float32)
    assert torch.equal(p, q)
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, other.state[q][name])


@pytest.mark.parametrize("sparse_state", ["seen", "all"])
@pytest.mark.parametrize(("shape", "sparse_dim"), [((7, 5), 2), ((4, 3, 5), 2), ((11,), 1), ((), 0)], ids=str)
def test_from_sparse_adam_and_back(shape: tuple[int, ...], sparse_dim: int, sparse_state: str) -> None:
    p = parameter(shape)
    expected = torch.optim.SparseAdam([p], 0.1)
    train(expected, p, sparse_dim, range(3))
    q = nn.Parameter(p.detach().clone())
    found = sk.SparseAdamW([q], 0.1, weight_decay=0, sparse_state=sparse_state)
    found.load_state_dict(copy.deepcopy(expected.state_dict()))
    train(expected, p, sparse_dim, range(3, 6))
    train(found, q, sparse_dim, range(3, 6))
    torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-12, atol=1e-14)
    if sparse_state == "all":
        back = torch.optim.SparseAdam([q], 0.1)
        back.load_state_dict(copy.deepcopy(found.state_dict()))
        train(expected, p, sparse_dim, range(6, 9))
        train(back, q, sparse_dim, range(6, 9))
        # SparseAdam computes with the step as it finds it: ours is an fp32 tensor.
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"sparse_state": "all", "sparse_bias_correction": "row"}, {"sparse_decay": "catch_up"}], ids=str
)
def test_another_number_of_sparse_dimensions_is_refused(before: int, after: int, options: dict[str, Any]) -> None:
    shape = (4, 3, 5)
    p = parameter(shape)
    optimizer = sk.SparseAdamW([("w", p)], **options)
    train(optimizer, p, before, range(1))
    kept, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    p.grad = gradient(shape, after, 1)
    with pytest.raises(ValueError, match=rf"'w': its gradient has {after} sparse dimensions.*sparse_state='all'"):
        optimizer.step()
    assert torch.equal(p, kept)
    assert all(torch.equal(state[name], value) for name, value in optimizer.state[p].items())


def test_with_state_for_all_the_number_may_change() -> None:
    shape = (4, 3, 5)
    p, q = parameter(shape), parameter(shape)
    found = sk.SparseAdamW([p], 0.1, weight_decay=0, sparse_state="all")
    expected = torch.optim.SparseAdam([q], 0.1)
    for step in range(6):
        p.grad = gradient(shape, 1 + step % 3, step)
        q.grad = p.grad.clone()
        found.step()
        expected.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)


def test_a_dense_gradient_made_sparse() -> None:
    """As people make it: `p.grad = p.grad.to_sparse()`; zeros are left alone."""
    model, mask = nn.Linear(6, 4, bias=False), torch.rand(4, 6) < 0.4
    weight = model.weight
    before = weight.detach().clone()
    optimizer = sk.SparseAdamW([weight])
    for _ in range(3):
        model(torch.randn(5, 6)).square().sum().backward()
        weight.grad = (weight.grad * mask).to_sparse()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weight.detach()[~mask], before[~mask])
    assert (weight.detach()[mask] != before[mask]).all()
