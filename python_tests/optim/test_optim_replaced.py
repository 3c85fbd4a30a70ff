"""What a user puts in the place of state or gradients between two steps is what the next step takes, or refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk

ROWS = sk.Index(torch.tensor([0, 2]), (4, 3), granularity="row")
FORMS = pytest.mark.parametrize("form", ["compact", "indexed"])


def stepped(form: str) -> tuple[sk.SparseAdamW, nn.Parameter]:
    """An optimizer after one step, and its Parameter, which has a gradient."""
    torch.manual_seed(0)
    if form == "compact":
        tuned = sk.train_only(nn.Embedding(4, 3), sk.Selection({"weight": ROWS}))
        (p,) = tuned.parameters()
        optimizer = sk.SparseAdamW([p], 0.1, amsgrad=True)
    else:
        p = nn.Parameter(torch.randn(4, 3))
        optimizer = sk.SparseAdamW([{"params": [p], "indices": [ROWS]}], 0.1, amsgrad=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, p


@FORMS
@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_replaced_state(form: str, name: str) -> None:
    """The new tensor is stepped, the old one is left alone."""
    optimizer, p = stepped(form)
    old = optimizer.state[p][name]
    kept, new = old.clone(), torch.zeros_like(old)
    optimizer.state[p][name] = new
    optimizer.step()
    assert torch.equal(old, kept)
    assert optimizer.state[p][name] is new
    assert (new != 0).all()


@FORMS
def test_gradient_that_is_not_contiguous(form: str) -> None:
    results: list[Tensor] = []
    for make in (lambda g: g, lambda g: g.T.contiguous().T):
        optimizer, p = stepped(form)
        p.grad = make(torch.arange(p.numel()).view(p.shape).float())
        optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


@FORMS
def test_gradient_that_is_sparse(form: str) -> None:
    optimizer, p = stepped(form)
    before, step = p.detach().clone(), optimizer.state[p]["step"].clone()
    p.grad = torch.ones_like(p).to_sparse(1)
    with pytest.raises(ValueError, match="its gradient is sparse, but it is stepped at positions of its own"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == step
