"""FISH and IRD: the selections against brute force on stored per-sample squares, budgets, groups, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fishing import fisher, gradients, model, ragged
from torch import Tensor

from sparsekernels import Selection, fisher_diagonal, squared_gradient_norms
from sparsekernels.methods import fish, ird
from sparsekernels.methods.fisher_search import take

QUIET = {"progress": False}
HEAD = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return model("bert")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    """13 samples."""
    return [ragged("bert"), ragged("bert", (3, 8, 8), seed=1), ragged("bert", (5, 2, 9, 9, 6), seed=2)]


@pytest.fixture(scope="module")
def squares(net: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """[samples, parameters], fp64, of everything but the head."""
    grads = gradients(net, batches)
    return torch.stack([torch.cat([g.square().flatten() for n, g in grad.items() if n not in HEAD]) for grad in grads])


def flat(net: torch.nn.Module, selection: Selection) -> Tensor:
    """The selected entries as a mask over all parameters but the head."""
    masks = []
    for name, parameter in net.named_parameters():
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        if name in selection and name not in HEAD:
            mask[selection[name].positions.long()] = True
        if name not in HEAD:
            masks.append(mask)
    return torch.cat(masks)


def assert_largest(mask: Tensor, scores: Tensor, k: int) -> None:
    """k entries are chosen, and none left out is larger but for rounding."""
    assert int(mask.sum()) == k
    assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-4)


def budget(net: torch.nn.Module, density: float) -> int:
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    return int(density * sum(sizes.values())) - sum(sizes[name] for name in HEAD)


@pytest.mark.parametrize("density", [0.07, 0.1, 0.5, 1.0])
def test_fish_takes_the_largest_of_all_tensors(net: Any, batches: Any, squares: Tensor, density: float) -> None:
    found = fish(net, batches, density, **QUIET)
    k = min(budget(net, density), squares.shape[1])
    mask = flat(net, found)
    if density < 1:
        assert_largest(mask, squares.sum(0), k)
    assert int(mask.sum()) == k
    assert {name for name in found if name in HEAD} == set(HEAD)
    assert all(
        found[name].granularity == "row" and found[name].numel == net.get_parameter(name).numel() for name in HEAD
    )
    assert found.report["samples"] == 13
    carried = float(squares.sum(0)[mask].sum() / squares.sum())
    assert found.report["carried"] == pytest.approx(carried, rel=1e-4)


def test_groups_change_nothing(net: Any, batches: Any) -> None:
    whole = fish(net, batches, 0.1, **QUIET)
    for limit in (1, 3000):
        found = fish(net, iter(batches), 0.1, max_fisher_bytes=limit, **QUIET)
        assert dict(found) == dict(whole)
        assert found.report["carried"] == pytest.approx(whole.report["carried"])


def test_number_of_samples_targets_and_no_head(net: Any, batches: Any) -> None:
    """Seven samples: the first batch, and two of the second."""
    grads = gradients(net, batches)[:7]
    scores = {n: x for n, x in fisher(grads).items() if n.endswith("query.weight")}
    found = fish(net, batches, 0.01, num_samples=7, targets="*query.weight", head=(), **QUIET)
    k = int(0.01 * sum(p.numel() for p in net.parameters()))
    mask = torch.cat([torch.zeros(x.numel(), dtype=torch.bool) for x in scores.values()])
    start = 0
    for name, x in scores.items():
        if name in found:
            mask[start + found[name].positions.long()] = True
        start += x.numel()
    assert_largest(mask, torch.cat([x.flatten() for x in scores.values()]), k)
    assert set(found) <= set(scores)
    assert found.report["samples"] == 7


@pytest.mark.parametrize(
    ("limit", "sizes", "asked"),
    [
        (1, [1], 1),
        (4, [4], 1),
        (5, [5], 1),
        (6, [5, 1], 2),
        (7, [5, 2], 2),
        (8, [5, 3], 2),
        (9, [5, 3, 1], 3),
        (13, [5, 3, 5], 3),
        (14, [5, 3, 5], 3),
        (None, [5, 3, 5], 3),
    ],
)
def test_the_first_so_many_samples(batches: Any, limit: Any, sizes: list[int], asked: int) -> None:
    """Up to the limit and not one beyond it, without asking for a batch that is not needed."""
    given: list[int] = []

    def stream() -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(batches):
            given.append(number)
            yield batch

    taken = take(stream(), limit)
    assert [len(batch["input_ids"]) for batch in taken] == sizes
    assert len(given) == asked
    for batch, whole in zip(taken, batches, strict=False):
        assert all(torch.equal(x, whole[key][: len(x)]) for key, x in batch.items())


def test_expected_labels_need_no_labels(net: Any, batches: Any) -> None:
    without = [{key: x for key, x in batch.items() if key != "labels"} for batch in batches]
    found = fish(net, without, 0.1, labels="expected", **QUIET)
    names = [name for name, _ in net.named_parameters() if name not in HEAD]
    scores = fisher_diagonal(net, without, labels="expected", names=names, **QUIET)
    assert_largest(flat(net, found), torch.cat([x.flatten() for x in scores.values()]), budget(net, 0.1))


@pytest.mark.parametrize(
    ("arguments", "factors"),
    [
        ({}, (0.5, 0.5, 1)),
        ({"sample_factor": 0.7, "parameter_factor": 0.3, "min_samples": 4}, (0.7, 0.3, 4)),
        ({"sample_factor": 1.0, "parameter_factor": 0.01}, (1.0, 0.01, 1)),
    ],
)
def test_ird_follows_its_schedule(net: Any, batches: Any, squares: Tensor, arguments: Any, factors: Any) -> None:
    """On the stored squares F[b, j], which the real one never has."""
    share_of_samples, share_of_parameters, least = factors
    k = budget(net, 0.07)
    rows, columns = torch.arange(len(squares)), torch.arange(squares.shape[1])
    sizes = [(len(rows), len(columns))]
    while len(columns) > k:
        norms = squares[rows][:, columns].sum(1)
        kept = max(least, math.ceil(share_of_samples * len(rows)))
        rows = rows[norms.argsort(descending=True, stable=True)[:kept].sort().values]
        total = squares[rows][:, columns].sum(0)
        size = max(k, int(share_of_parameters * len(columns)))
        columns = columns[total.argsort(descending=True, stable=True)[:size].sort().values]
        sizes.append((len(rows), len(columns)))
    found = ird(net, batches, 0.07, **arguments, **QUIET)
    history = found.report["history"]
    assert [(step["samples"], step["parameters"]) for step in history] == sizes
    assert found.report["samples"] == rows.tolist()
    assert set(found) >= set(HEAD)
    mask = flat(net, found)
    assert int(mask.sum()) == k
    wanted = torch.zeros_like(mask)
    wanted[columns] = True
    assert int((mask != wanted).sum()) <= 2  # a pair may change places where two are equal but for rounding
    assert all(0 < step["carried_by_samples"] <= 1 and 0 < step["carried_by_parameters"] <= 1 for step in history[1:])


def test_ird_at_full_density_has_nothing_to_shrink(net: Any, batches: Any) -> None:
    found = ird(net, batches, 1.0, **QUIET)
    assert found.numel == sum(p.numel() for p in net.parameters())
    assert found.report["history"] == [{"samples": 13, "parameters": found.numel - budget_of_head(net)}]


def budget_of_head(net: Any) -> int:
    return sum(net.get_parameter(name).numel() for name in HEAD)


def test_the_models_are_left_alone(net: Any, batches: Any) -> None:
    before = {name: x.clone() for name, x in net.state_dict().items()}
    fish(net, batches, 0.1, **QUIET)
    ird(net, batches, 0.1, **QUIET)
    assert net.training
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("method", [fish, ird])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"density": 1.01}, r"density must lie in \(0, 1\]"),
        ({"density": 0.01}, "leaves none besides the 340 of the head"),
        ({"targets": "classifier*"}, "targets: all of them belong to the head"),
        ({"targets": "nothing"}, "targets: no parameter matches 'nothing'"),
        ({"head": "nothing"}, "head: no parameter matches 'nothing'"),
    ],
)
def test_bad_input(net: Any, batches: Any, method: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(net, batches, **{"density": 0.1, **arguments}, **QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_factor": 0.0}, "sample_factor must lie"),
        ({"sample_factor": 1.1}, "sample_factor must lie"),
        ({"parameter_factor": 1.0}, "parameter_factor must lie"),
        ({"parameter_factor": 0.0}, "parameter_factor must lie"),
        ({"min_samples": 0}, "min_samples must be at least 1"),
    ],
)
def test_bad_factors(net: Any, batches: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ird(net, batches, 0.1, **arguments, **QUIET)


def test_no_samples(net: Any, batches: Any) -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        fish(net, batches, 0.1, num_samples=0, **QUIET)
    for method in (fish, ird):
        with pytest.raises(ValueError, match="samples holds no batch"):
            method(net, [], 0.1, **QUIET)


def test_norms_come_in_the_order_of_the_samples(net: Any, batches: Any, squares: Tensor) -> None:
    names = [name for name, _ in net.named_parameters() if name not in HEAD]
    found = squared_gradient_norms(net, batches, names=names, **QUIET)
    assert torch.allclose(found.double(), squares.sum(1), rtol=1e-5)
