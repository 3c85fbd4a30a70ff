"""Decompositions: against torch.linalg.svd in fp64, and what k-subspaces promise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsekernels.structure.svd import Factors, cluster_rows, factorize, group_equal, split_rows

SHAPES = [(1, 1), (1, 7), (7, 1), (6, 6), (33, 17), (17, 33)]


def decaying(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight whose singular values fall slowly, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return (x * torch.linspace(1, 0.05, n, dtype=torch.float64)).to(dtype)


def off(weight: Tensor, rank: int) -> float:
    """Frobenius norm of what no approximation of this rank can reach."""
    return float(torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_triplets_make_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = decaying(*shape, dtype=dtype)
    (found,) = factorize([weight])
    wide = torch.promote_types(dtype, torch.float32)
    assert found.complete
    assert found.rows is None
    assert {found.u.dtype, found.s.dtype, found.v.dtype} == {wide}
    near = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(found.u * found.s @ found.v.T, weight.to(wide), rtol=near, atol=near)
    torch.testing.assert_close(found.s.double(), torch.linalg.svdvals(weight.double()), rtol=near, atol=near)
    for vectors in (found.u, found.v):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(min(shape), dtype=wide), rtol=0, atol=10 * near)


def test_shapes_are_mixed_freely() -> None:
    """Each weight gets its own triplets, whatever is decomposed beside it."""
    weights = [decaying(*shape, seed=i) for i, shape in enumerate([*SHAPES, *SHAPES[::-1]])]
    for weight, found in zip(weights, factorize(weights), strict=True):
        torch.testing.assert_close(found.u * found.s @ found.v.T, weight)
    assert factorize([]) == []


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 20])
def test_truncation_is_close_to_the_best(shape: tuple[int, int], rank: int) -> None:
    weights = [decaying(*shape, seed=seed) for seed in range(2)]
    for weight, found in zip(weights, factorize(weights, rank), strict=True):
        assert found.u.shape == (shape[0], rank)
        assert found.v.shape == (shape[1], rank)
        assert not found.complete
        up, down = found.truncated(rank)
        excess = float((weight - up @ down).double().norm()) / off(weight, rank)
        assert excess < 1.01


def test_truncation_is_deterministic_and_leaves_the_generator_alone() -> None:
    weight = decaying(300, 200)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (first,) = factorize([weight], 20)
    assert torch.equal(torch.rand(3), expected)
    (second,) = factorize([weight], 20)
    (other,) = factorize([weight], 20, seed=1)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)
    assert not torch.equal(first.u, other.u)


def test_many_triplets_are_all_of_them() -> None:
    (found,) = factorize([decaying(60, 40)], 12)
    assert found.complete


@pytest.mark.parametrize(
    ("weights", "rank", "message"),
    [
        ([torch.randn(3)], None, r"weights\[0\].*two dimensions"),
        ([torch.ones(2, 2), torch.ones(2, 2).long()], None, r"weights\[1\] must be fp32"),
        ([torch.ones(2, 2).to(torch.float8_e5m2)], None, r"weights\[0\] must be fp32"),
        ([torch.ones(2, 2), torch.full((2, 2), float("nan"))], None, r"weights\[1\] has NaN"),
        ([torch.ones(2, 2)], -1, "rank must not be negative"),
    ],
)
def test_bad_input(weights: list[Tensor], rank: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize(weights, rank)


def residual(weight: Tensor, members: list[Tensor], rank: int) -> float:
    return sum(off(weight[rows], rank) ** 2 for rows in members)


def mixed(clusters: int, rows: int, rank: int, width: int = 24) -> tuple[Tensor, Tensor]:
    """Rows of several subspaces, shuffled, and which one each is of."""
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(clusters).repeat_interleave(rows)
    parts = [
        torch.randn(rows, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
        for _ in range(clusters)
    ]
    order = torch.randperm(len(label), generator=generator)
    return torch.cat(parts)[order], label[order]


@pytest.mark.parametrize("clusters", [1, 2, 3, 7])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_clusters_partition_and_beat_blocks(clusters: int, rank: int) -> None:
    weight = decaying(40, 24)
    members = cluster_rows(weight, clusters, rank)
    assert torch.equal(torch.cat(members).sort().values, torch.arange(40))
    assert all(len(rows) and torch.equal(rows, rows.sort().values) for rows in members)
    assert residual(weight, members, rank) <= residual(weight, split_rows(40, clusters), rank) * (1 + 1e-6)
    assert [rows.tolist() for rows in cluster_rows(weight, clusters, rank)] == [rows.tolist() for rows in members]


def test_clusters_find_subspaces() -> None:
    """Two lines through the origin, shuffled: k-subspaces tell them apart."""
    weight, label = mixed(2, 30, 1)
    members = cluster_rows(weight, 2, 1)
    assert sorted(len(rows) for rows in members) == [30, 30]
    assert all(len(label[rows].unique()) == 1 for rows in members)


def test_more_iterations_never_fit_worse() -> None:
    weight, _ = mixed(4, 20, 3)
    residuals = [residual(weight, cluster_rows(weight, 4, 3, iterations=i), 3) for i in (0, 1, 2, 4, 20)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(residuals))
    assert residuals[-1] < 0.9 * residuals[0]


def test_clusters_of_half_precision() -> None:
    weight = decaying(30, 20, dtype=torch.bfloat16)
    assert sum(map(len, cluster_rows(weight, 3, 2))) == 30


@pytest.mark.parametrize(("clusters", "rank", "message"), [(0, 1, "clusters"), (41, 1, "clusters"), (2, 25, "rank")])
def test_bad_clusters(clusters: int, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must lie in"):
        cluster_rows(decaying(40, 24), clusters, rank)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight must be fp32.*two dimensions"):
        cluster_rows(torch.randn(5), 2, 1)
    (found,) = factorize([decaying(300, 200)], 5)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 5\]"):
        found.truncated(6)


def test_truncation_does_not_depend_on_what_is_decomposed_beside() -> None:
    one, other = decaying(300, 200), decaying(300, 200, seed=1)
    (alone,), (_, beside) = factorize([one], 20), factorize([other, one], 20)
    torch.testing.assert_close(alone.s, beside.s)
    torch.testing.assert_close(alone.u @ alone.u.T, beside.u @ beside.u.T, rtol=0, atol=1e-4)


def test_equal_values_are_averaged() -> None:
    s = torch.tensor([3.0, 3.0 * (1 - 1e-7), 2.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    values = torch.tensor([1.0, 5.0, 7.0, 1.0, 2.0, 6.0, 100.0, -3.0])
    expected = torch.tensor([3.0, 3.0, 7.0, 3.0, 3.0, 3.0, 0.0, 0.0])
    assert torch.equal(group_equal(values, s), expected)
    assert group_equal(values[:0], s[:0]).shape == (0,)
    assert torch.equal(group_equal(values, torch.zeros(8)), torch.zeros(8))


def test_scores_of_a_repeated_value_do_not_depend_on_its_basis() -> None:
    """Turn the vectors of a value that occurs three times: single derivatives change, those of the group do not."""
    u, v = (torch.linalg.qr(torch.randn(9, 5, dtype=torch.float64)).Q for _ in range(2))
    s = torch.tensor([4.0, 2.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    turn = torch.eye(5, dtype=torch.float64)
    turn[1:4, 1:4] = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    torch.testing.assert_close(u * s @ v.T, u @ turn * s @ (v @ turn).T)
    grad = torch.randn(9, 9, dtype=torch.float64)
    plain = [torch.diagonal(a.T @ grad @ b) for a, b in ((u, v), (u @ turn, v @ turn))]
    assert not torch.allclose(*plain)
    torch.testing.assert_close(*(group_equal(values, s) for values in plain))


def test_factors_of_rows_are_complete_by_their_own_size() -> None:
    u, s, v = torch.randn(4, 4), torch.ones(4), torch.randn(9, 4)
    assert Factors(u, s, v, torch.arange(4)).complete
    assert not Factors(u[:, :3], s[:3], v[:, :3]).complete
