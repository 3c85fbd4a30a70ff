"""What SparseAdamW refuses, it refuses before any parameter is stepped, in whatever group, and it says which."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection
from sparsekernels.ops import backend
from sparsekernels.optim import batch

SHAPE = (6, 4)


def compact() -> tuple[dict[str, Any], Tensor]:
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    tuned = sk.train_only(model, Selection({"0.weight": Index(torch.tensor([1, 3]), SHAPE, granularity="row")}))
    return {"params": list(tuned.named_parameters())}, model[0].weight


def indexed() -> tuple[dict[str, Any], Tensor]:
    p = nn.Parameter(torch.randn(SHAPE))
    return {"params": [("0.weight", p)], "indices": [Index(torch.tensor([1, 3]), SHAPE, granularity="row")]}, p


def dense() -> tuple[dict[str, Any], Tensor]:
    p = nn.Parameter(torch.randn(SHAPE))
    return {"params": [("0.weight", p)]}, p


def coo() -> tuple[dict[str, Any], Tensor]:
    return dense()


def gradient(kind: Callable[..., Any], p: Tensor) -> Tensor:
    grad = torch.ones_like(p)
    return grad.to_sparse(1) if kind is coo else grad


def reshaped(p: Tensor) -> None:
    """A gradient of another shape and as many elements, as `p.data = ...` leaves it."""
    p.grad.data = p.grad.data.to_dense().T.contiguous()


def longer(p: Tensor) -> None:
    p.grad.data = torch.cat([p.grad.data.to_dense(), p.grad.data.to_dense()])


def wider(p: Tensor) -> None:
    p.grad.data = p.grad.data.to_dense().double()


def shape_of_parameter(p: Tensor) -> None:
    p.data = torch.ones(3, 4)
    p.grad = torch.ones(3, 4)


def shape_of_sparse(p: Tensor) -> None:
    p.data = torch.ones(3, 4)


def differentiable(p: Tensor) -> None:
    """Set on the group by the test."""


def snapshot(optimizer: Any, tensors: list[Tensor]) -> list[Any]:
    states = [{name: x.clone() for name, x in optimizer.state.get(p, {}).items()} for p in tensors]
    return [[x.detach().clone() for x in tensors], states]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


CASES = [
    *((kind, change) for kind in (compact, indexed, dense) for change in (reshaped, longer, wider, shape_of_parameter)),
    (compact, differentiable),
    (indexed, differentiable),
    (coo, differentiable),
    (coo, shape_of_sparse),
]


@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("first", [None, compact, indexed, dense, coo], ids=lambda x: getattr(x, "__name__", "alone"))
def test_named_and_nothing_is_stepped(
    first: Any, kind: Any, change: Any, native: bool, stepped_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an implementation in Python serves the op, which does not look at all before it starts."""
    if not native:
        monkeypatch.setattr(batch, "has_native", lambda *_: False)
    made = [made() for made in (first, kind) if made is not None]
    optimizer = sk.SparseAdamW([group for group, _ in made])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = [made for made in (first, kind) if made is not None]

    def grads() -> None:
        for p, what in zip(params, kinds, strict=True):
            p.grad = gradient(what, p)

    grads()
    if stepped_before:
        optimizer.step()
        grads()
    elif kind is dense and change is shape_of_parameter:
        return  # and is welcome
    if change is differentiable:
        optimizer.param_groups[-1]["differentiable"] = True
    change(params[-1])
    tensors = [*params, *(weight for _, weight in made)]
    before, recording = snapshot(optimizer, tensors), torch.is_grad_enabled()
    words = "differentiable" if change is differentiable else "'0.weight'"
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert same(snapshot(optimizer, tensors), before)
    assert torch.is_grad_enabled() == recording


def test_shapes_of_a_gradient_that_does_not_fit_are_said() -> None:
    group, p = dense()
    optimizer = sk.SparseAdamW([group])
    p.grad = torch.ones(SHAPE)
    p.grad.data = torch.ones(4, 6)
    with pytest.raises(
        ValueError, match=r"'0.weight': its gradient is torch.float32 of shape \[4, 6\].*shape \[6, 4\]"
    ):
        optimizer.step()


def test_capturable_on_a_device_that_cannot_is_refused_before_another_group_is_stepped() -> None:
    group, weight = indexed()
    other = nn.Parameter(torch.ones(3))
    optimizer = sk.SparseAdamW([group, {"params": [("b", other)], "capturable": True}])
    for p in (weight, other):
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(weight.detach())
    with pytest.raises(ValueError, match=r"'b'.*capturable"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_the_ops_are_native_here() -> None:
    """Or the tests above would prove half as much."""
    if backend._load_errors.get("cpu"):
        pytest.skip("no native library")
    assert backend.has_native("adamw_", "cpu")
