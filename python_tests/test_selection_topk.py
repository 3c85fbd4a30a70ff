"""Selection.topk and Selection.random: exact, with a rule for ties, and the same every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Zoo
from torch import Tensor

from sparsekernels import Selection

Scores = dict[str, Tensor]


def brute_force(scores: Scores, k: int, magnitude: bool) -> dict[str, list[int]]:
    """Names and offsets of the k best: ties to the earlier tensor, then to the lower offset."""
    entries = []
    for place, (name, score) in enumerate(scores.items()):
        for offset, value in enumerate(score.flatten().tolist()):
            entries.append((-abs(value) if magnitude else -value, place, offset, name))
    found: dict[str, list[int]] = {}
    for _, _, offset, name in sorted(entries)[:k]:
        found.setdefault(name, []).append(offset)
    return {name: sorted(found[name]) for name in scores if name in found}


def as_lists(selection: Selection) -> dict[str, list[int]]:
    return {name: index.positions.tolist() for name, index in selection.items()}


# Multiples of a half, few of them: ties are everywhere.
tensors = st.lists(st.integers(-3, 3), min_size=1, max_size=20).map(lambda x: torch.tensor(x) / 2)
score_dicts = st.lists(tensors, min_size=1, max_size=4).map(lambda ts: {f"t{i}": t for i, t in enumerate(ts)})


@given(score_dicts, st.data(), st.booleans())
def test_global(scores: Scores, data: st.DataObject, magnitude: bool) -> None:
    k = data.draw(st.integers(1, sum(t.numel() for t in scores.values())))
    found = Selection.topk(scores, k, magnitude=magnitude)
    assert as_lists(found) == brute_force(scores, k, magnitude)
    assert found.numel == k


@given(score_dicts, st.floats(0.01, 1), st.booleans())
def test_per_tensor(scores: Scores, density: float, magnitude: bool) -> None:
    found = Selection.topk(scores, density=density, per_tensor=True, magnitude=magnitude)
    expected: dict[str, list[int]] = {}
    for name, score in scores.items():
        k = min(int(density * score.numel()) + 1, score.numel())
        expected.update(brute_force({name: score}, k, magnitude))
    assert as_lists(found) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_density_and_shapes(dtype: torch.dtype) -> None:
    scores = {"a": torch.randn(7, 11).to(dtype), "b": torch.randn(3, 4, 5).to(dtype), "c": torch.randn(13).to(dtype)}
    found = Selection.topk(scores, density=0.25)
    assert as_lists(found) == brute_force(scores, int(0.25 * 150) + 1, False)
    assert all(found[name].shape == scores[name].shape for name in found)
    everything = Selection.topk(scores, density=1.0)
    assert everything.numel == 150


def test_scores_keep_their_bits_and_need_not_be_contiguous() -> None:
    score = torch.randn(9, 7)
    before = score.clone()
    found = Selection.topk({"a": score.T}, 5, magnitude=True)
    assert as_lists(found) == brute_force({"a": score.T.contiguous()}, 5, True)
    assert torch.equal(score, before)


def test_scores_may_require_grad() -> None:
    parameter = torch.nn.Parameter(torch.randn(9, 7))
    assert as_lists(Selection.topk({"a": parameter}, 5)) == brute_force({"a": parameter.detach()}, 5, False)


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, 2, float("nan")])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got"):
        Selection.topk({"a": torch.randn(4)}, density=density)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got"):
        Selection.random({"a": (4,)}, density)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must lie in \[1, 4\], got"):
        Selection.topk({"a": torch.randn(4)}, k)


def test_k_or_density() -> None:
    for both in ({}, {"k": 1, "density": 0.5}):
        with pytest.raises(ValueError, match="either k or density"):
            Selection.topk({"a": torch.randn(4)}, **both)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_among_the_scores(per_tensor: bool, magnitude: bool, dtype: torch.dtype, sign: int) -> None:
    nan = torch.tensor(float("nan")).copysign(torch.tensor(float(sign)))
    for k in (1, 3):  # even where the NaN would not be chosen
        scores = {"good": torch.ones(4, dtype=dtype), "broken": torch.tensor([0.0, 1.0, float(nan)], dtype=dtype)}
        scores["broken"][2] = nan
        with pytest.raises(ValueError, match="NaN") as caught:
            Selection.topk(scores, k, per_tensor=per_tensor, magnitude=magnitude)
        assert "'broken'" in str(caught.value)


def test_infinity_is_a_score() -> None:
    scores = {"a": torch.tensor([1.0, float("inf"), -float("inf"), 2.0])}
    assert as_lists(Selection.topk(scores, 2)) == {"a": [1, 3]}
    assert as_lists(Selection.topk(scores, 2, magnitude=True)) == {"a": [1, 2]}


def test_random_is_reproducible_and_uniform() -> None:
    model = Zoo()
    a, b = Selection.random(model, 0.1, seed=3), Selection.random(model, 0.1, seed=3)
    assert dict(a) == dict(b)
    assert dict(a) != dict(Selection.random(model, 0.1, seed=4))
    for name, parameter in model.named_parameters():
        assert len(a[name]) == min(int(0.1 * parameter.numel()) + 1, parameter.numel())
        assert a[name].granularity == "element"
    counts = torch.zeros(50)
    for seed in range(400):
        counts[Selection.random({"w": (50,)}, 0.19, seed=seed)["w"].positions.long()] += 1
    assert counts.sum() == 400 * 10
    assert 40 < counts.min() < 80 < counts.max() < 120  # mean 80, standard deviation 8


def test_random_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Selection.random({"w": (50,)}, 0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_takes_tensors_for_their_shapes() -> None:
    """Such as a state_dict: what is in them does not matter, a vector of integers is no shape."""
    like = {"a": torch.zeros(8, 5), "b": torch.tensor([3, 4]), "c": torch.zeros(()), "d": torch.empty(9, device="meta")}
    found = Selection.random(like, 0.5)
    assert dict(found) == dict(Selection.random({name: x.shape for name, x in like.items()}, 0.5))
    assert [index.shape for index in found.values()] == [x.shape for x in like.values()]


def test_random_names() -> None:
    assert list(Selection.random({"a": (4,), "b": (5,)}, 0.5, names=["b"])) == ["b"]
    with pytest.raises(ValueError, match="'c'"):
        Selection.random({"a": (4,)}, 0.5, names=["c"])
