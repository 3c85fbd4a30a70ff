"""All groups are checked before one is stepped; every sparse gradient that SparseAdam takes; copied optimizers."""

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

SHAPES: list[tuple[tuple[int, ...], int]] = [((6, 5), 2), ((7,), 1), ((4, 3, 5), 2), ((4, 3, 5), 3), ((4, 3, 5), 1)]


def sparse(shape: tuple[int, ...], dims: int, seed: int) -> Tensor:
    """A gradient with duplicates, of so many sparse dimensions."""
    generator = torch.Generator().manual_seed(seed)
    count = 9
    indices = torch.stack([torch.randint(0, size, (count,), generator=generator) for size in shape[:dims]])
    values = torch.randn(count, *shape[dims:], generator=generator)
    return torch.sparse_coo_tensor(indices, values, shape)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("shape", "dims"), SHAPES)
def test_any_number_of_sparse_dimensions(shape: tuple[int, ...], dims: int, maximize: bool) -> None:
    """As torch.optim.SparseAdam; what no gradient lists keeps its bits."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    mine = sk.SparseAdamW([ours], lr=0.1, weight_decay=0, maximize=maximize)
    adam = torch.optim.SparseAdam([theirs], lr=0.1, maximize=maximize)
    listed = torch.zeros(shape, dtype=torch.bool)
    for step in range(4):
        grad = sparse(shape, dims, step)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        adam.step()
        listed[tuple(grad._indices())] = True
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[~listed], start[~listed])
    assert not torch.equal(ours[listed], start[listed])
    ours.grad = torch.sparse_coo_tensor(torch.empty(dims, 0, dtype=torch.int64), torch.empty(0, *shape[dims:]), shape)
    before = ours.detach().clone()
    mine.step()
    assert torch.equal(ours, before)


def test_a_change_of_the_sparse_dimensions_is_named() -> None:
    p = nn.Parameter(torch.randn(6, 5))
    optimizer = sk.SparseAdamW([("table", p)], lr=0.1)
    p.grad = sparse((6, 5), 2, 0)
    optimizer.step()
    before = p.detach().clone()
    p.grad = sparse((6, 5), 1, 0)
    with pytest.raises(ValueError, match=r"'table': its gradient has 1 sparse dim"):
        optimizer.step()
    assert torch.equal(p, before)


def groups(spoil: Callable[[nn.Parameter], None], kind: str) -> tuple[sk.SparseAdamW, list[Tensor]]:
    """Two groups, of which the second holds a parameter that cannot be stepped; all that may not change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    selection = Selection({f"{i}.weight": Index(torch.arange(0, 16, 3), (4, 4)) for i in range(2)})
    if kind == "compact":
        named = list(sk.sparsify(model, selection).named_parameters())
        optimizer = sk.SparseAdamW([{"params": [pair]} for pair in named], lr=0.1)
    else:
        named = list(model.named_parameters())
        indices = list(selection.values()) if kind == "indexed" else [None, None]
        optimizer = sk.SparseAdamW(
            [
                {"params": [pair], **({} if i is None else {"indices": [i]})}
                for pair, i in zip(named, indices, strict=True)
            ],
            lr=0.1,
        )
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    spoil(named[1][1])
    states = [optimizer.state[p] for _, p in named]
    return optimizer, [*model.parameters(), *(value for state in states for value in state.values())]


def reshape(p: nn.Parameter) -> None:
    p.data = p.data.reshape(-1)[:4].clone()
    p.grad = torch.ones(4)


def other_dtype(p: nn.Parameter) -> None:
    p.data, p.grad = p.data.double(), torch.ones_like(p.data, dtype=torch.float64)


def wrong_gradient(p: nn.Parameter) -> None:
    p.data = torch.cat([p.data, p.data])  # and the gradient stays as it was


@pytest.mark.parametrize("spoil", [reshape, other_dtype, wrong_gradient])
@pytest.mark.parametrize("kind", ["compact", "indexed", "dense"])
def test_a_refused_step_has_stepped_no_group(kind: str, spoil: Callable[[nn.Parameter], None]) -> None:
    optimizer, kept = groups(spoil, kind)
    before = [x.detach().clone() for x in kept]
    with pytest.raises(ValueError, match=r"'?1\.weight'?"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))


def saved(optimizer: sk.SparseAdamW) -> sk.SparseAdamW:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_optimizer_goes_on_with_sparse_gradients(how: str) -> None:
    """Bit for bit, also with rows that it has not seen."""
    p = nn.Parameter(torch.randn(40, 5))
    optimizer = sk.SparseAdamW([p], lr=0.1)
    for step in range(2):
        p.grad = sparse((40, 5), 1, step)
        optimizer.step()
    other = COPIES[how](optimizer)
    (q,) = other.param_groups[0]["params"]
    for step in range(2, 6):
        for x, each in ((p, optimizer), (q, other)):
            x.grad = sparse((40, 5), 1, step)
            each.step()
        assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
