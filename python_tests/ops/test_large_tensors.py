"""Positions past 2^31: the ops do there what they do to a small tensor that holds the same elements.

Zeros that were never written take no memory on a CPU; on a GPU a tensor takes its four gigabytes.
"""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from sparsekernels import Index, ops
from sparsekernels.ops import backend

WIDTH = 64
ROWS = 2**31 // WIDTH + 3
PLACES = [0, 5, 2**30, 2**31 - 1, 2**31, 2**31 + 2 * WIDTH + 7]
FORMS = ("elements", "rows")
pytestmark = pytest.mark.xdist_group("large")  # one at a time, on a machine that tests side by side


def large(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.zeros(ROWS, WIDTH, dtype=torch.float16, device=device)
    return torch.from_numpy(numpy.zeros((ROWS, WIDTH), dtype=numpy.float16))


def places(form: str, device: torch.device) -> tuple[Index, Index]:
    """In the large tensor, and in a small one that holds what is selected and nothing else."""
    rows = form == "rows"
    found = sorted({place // WIDTH for place in PLACES}) if rows else PLACES
    units = "row" if rows else "element"
    many = Index(torch.tensor(found), (ROWS, WIDTH), units).to(device)
    shape = (len(found), WIDTH if rows else 1)
    few = Index(torch.arange(len(found)), shape, units).to(device)
    return many, few


def pick(dense: Tensor, index: Index) -> Tensor:
    return (dense if index.granularity == "row" else dense.view(-1))[index.positions.long()].view(-1)


def skip_without(op: str, name: str, device: torch.device) -> None:
    reason = backend.why_not(op, name, device.type)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("name", ["reference", "triton", "native"])
@pytest.mark.parametrize("form", FORMS)
def test_reading_and_writing(form: str, name: str, device: torch.device) -> None:
    skip_without("gather", name, device)
    dense, (index, _) = large(device), places(form, device)
    values = torch.randn(index.compact_shape, device=device).half()
    assert ops.gather(dense, index, backend=name).abs().max() == 0
    ops.scatter_(dense, index, values, backend=name)
    assert torch.equal(pick(dense, index), values.view(-1))
    assert torch.equal(ops.gather(dense, index, backend=name), values)
    check_neighbours(dense, index)


@pytest.mark.parametrize("name", ["reference", "triton", "native"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compact", [True, False])
def test_a_step(compact: bool, form: str, name: str, device: torch.device) -> None:
    skip_without("adamw_", name, device)
    chosen = places(form, device)
    values = torch.randn(chosen[0].compact_shape, device=device)
    given = torch.randn_like(values)
    found = []
    for dense, index in zip((large(device), torch.zeros(chosen[1].shape, device=device).half()), chosen, strict=True):
        ops.scatter_(dense, index, values, backend="reference")
        state = step(dense, index, values, given, compact, name)
        found.append([pick(dense, index), *state])
        if index is chosen[0]:
            check_neighbours(dense, index)
        del dense
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], values.half().view(-1))


def step(dense: Tensor, index: Index, values: Tensor, given: Tensor, compact: bool, name: str) -> list[Tensor]:
    """One step; returns the state after it."""
    own, moments = values.clone(), [torch.zeros_like(values) for _ in range(2)]
    state = ([moments[0]], [moments[1]], [], [torch.tensor(1.0)], [index.positions])
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "backend": name}
    options["tiles"] = [index.tile]
    if compact:
        ops.adamw_([own], [given], *state, [dense], **options)
        return [own, *moments]
    grad = large(dense.device) if dense.numel() > 2**31 else torch.zeros_like(dense)
    ops.scatter_(grad, index, given, backend="reference")
    ops.adamw_([dense], [grad], *state, **options)
    return moments


def check_neighbours(dense: Tensor, index: Index) -> None:
    """What lies beside the selected elements, and where a position lands that lost its upper bits, is still zero."""
    flat, width = dense.view(-1), WIDTH if index.granularity == "row" else 1
    chosen = {int(p) * width + i for p in index.positions for i in range(width)}
    beside = {p + d for p in chosen for d in (-1, 1)} | {p % 2**31 for p in chosen}
    beside = {p for p in beside if 0 <= p < flat.numel()} - chosen
    assert flat[torch.tensor(sorted(beside), device=flat.device)].abs().max() == 0
