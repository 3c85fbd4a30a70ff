"""What the docstring of SparseAdamW promises beside its numbers: the same bits each time, and an example that runs."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

SIZE = 70_001  # several chunks, and a rest


def stepped(form: str, positions: Tensor, threads: int, company: int, **options: Any) -> Tensor:
    """The parameter after three steps at `positions`, with `company` other parameters in the optimizer."""
    generator = torch.Generator().manual_seed(1)
    model = nn.ParameterDict({"a": nn.Parameter(torch.randn(SIZE, generator=generator))})
    grads = [torch.randn(SIZE, generator=generator) for _ in range(3)]
    model.update({f"b{i}": nn.Parameter(torch.ones(5 + i)) for i in range(company)})
    chosen = Selection({n: Index(positions, p.shape) if n == "a" else Index.full(p.shape) for n, p in model.items()})
    if form == "compact":
        params: Any = sk.train_only(model, chosen).parameters()
    else:
        params = chosen.param_groups(model)
    optimizer = sk.SparseAdamW(params, lr=0.1, **options)
    torch.set_num_threads(threads)
    try:
        for grad in grads:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
                first = group["params"][0]
                first.grad = grad[positions] if form == "compact" else grad
            optimizer.step()
    finally:
        torch.set_num_threads(1)
    return model["a"].detach()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}], ids=str)
@pytest.mark.parametrize("form", ["compact", "indexed"])
def test_bits_depend_on_the_element_alone(form: str, options: dict[str, Any]) -> None:
    """Not on threads, not on other parameters, not on which other elements are selected."""
    positions = torch.arange(3, SIZE, 2)
    one = stepped(form, positions, threads=1, company=0, **options)
    assert torch.equal(stepped(form, positions, threads=1, company=0, **options), one)
    assert torch.equal(stepped(form, positions, threads=2, company=3, **options), one)
    for some in (positions[1:], positions[::3], positions[-7:]):
        assert torch.equal(stepped(form, some, threads=2, company=1, **options)[some], one[some])


def test_the_example_of_the_docstring_runs() -> None:
    found = doctest.DocTestFinder(recurse=False).find(sk.SparseAdamW, globs={"torch": torch, "sk": sk})
    (example,) = found
    assert 1 < len(example.examples) <= 6
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    slots = example.globs["tuned"].slots.values()
    assert sum(slot.originals.numel() for slot in slots) == 9  # of 12 + 3, rounded up tensor by tensor
    for slot in slots:
        assert (slot.values != slot.originals).all()
        assert torch.equal(slot.values.detach(), slot.weight.detach().reshape(-1)[slot.index.positions])
