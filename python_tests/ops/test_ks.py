"""ks_2samp against scipy: p-values over all sizes, fall-backs, bad input; exactness where ties are many."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples.ks import CODES, difference
from scipy import stats

from sparsekernels.ops import ks_2samp
from sparsekernels.ops.ks import reference
from sparsekernels.ops.ks.pvalues import pvalues

GOLDEN = {  # of samples of 4096, from METHODS.md: scipy, method="exact"
    904: 8.827203865660884e-88,
    533: 1.2516906536841372e-30,
    334: 2.8918289559574994e-12,
    176: 0.0010376904780032888,
    80: 0.4154049284561651,
    71: 0.5697000639234897,
    43: 0.9777164033514333,
    36: 0.9974195071336686,
    32: 0.9996347325431421,
}
each_alternative = pytest.mark.parametrize("alternative", CODES)


def apart_by(h: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of n with a difference of h / n, and nothing below zero."""
    x = np.arange(n, dtype=np.float64)
    return x, x + h - 0.5


def test_golden_pvalues() -> None:
    found = pvalues(np.array(sorted(GOLDEN)), 4096, 4096, "two-sided", "auto")
    np.testing.assert_allclose(found, [GOLDEN[h] for h in sorted(GOLDEN)], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:ks_2samp. Exact calculation unsuccessful")  # scipy finds a little more than 1
@each_alternative
@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 33, 100, 1000, 4096, 10_000])
def test_equal_sizes(n: int, alternative: str) -> None:
    h = np.unique(np.geomspace(1, n, 7).round().astype(np.int64))
    samples = [apart_by(int(each), n) for each in h]
    x, y = (torch.from_numpy(np.stack(side)) for side in zip(*samples, strict=True))
    if alternative == "less":
        x, y = y, x
    found = ks_2samp(x, y, alternative)
    expected = [stats.ks_2samp(a, b, alternative) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_array_equal(found.statistic, h / n)
    # Below lies what fp64 holds with fewer digits.
    np.testing.assert_allclose(found.pvalue, [r.pvalue for r in expected], rtol=1e-12, atol=1e-305)


@each_alternative
@pytest.mark.parametrize(("n", "m"), [(2, 3), (1, 7), (40, 60), (130, 110), (90, 1)])
def test_unequal_sizes(n: int, m: int, alternative: str) -> None:
    generator = np.random.default_rng(n)
    x, y = generator.normal(size=(6, n)), generator.normal(size=(6, m)) + np.linspace(0, 1, 6)[:, None]
    found = ks_2samp(torch.from_numpy(x), torch.from_numpy(y), alternative)
    expected = [stats.ks_2samp(a, b, alternative).pvalue for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(found.pvalue, expected, rtol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1000, 1500), (3000, 110), (1200, 1201)])
def test_unequal_large_two_sided(n: int, m: int) -> None:
    generator = np.random.default_rng(n)
    x, y = generator.normal(size=(4, n)), generator.normal(size=(4, m)) + np.linspace(0, 0.5, 4)[:, None]
    found = ks_2samp(torch.from_numpy(x), torch.from_numpy(y))
    expected = [stats.ks_2samp(a, b).pvalue for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(found.pvalue, expected, rtol=1e-12)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(("n", "m"), [(30, 20), (37, 11), (25, 24)])
def test_unequal_sizes_in_fractions(n: int, m: int, two_sided: bool) -> None:
    """Every h that there is, against lattice paths counted in integers."""
    divisor = math.gcd(n, m)
    up, down = m // divisor, n // divisor
    h = np.unique(np.abs([up * i - down * j for i in range(n + 1) for j in range(m + 1)]))
    found = pvalues(h, n, m, "two-sided" if two_sided else "greater", "exact")
    for each, pvalue in zip(h.tolist(), found, strict=True):
        column = [0] * (m + 1)
        for i in range(n + 1):
            for j in range(m + 1):
                ways = 1 if i == j == 0 else (column[j] if i else 0) + (column[j - 1] if j else 0)
                at = up * i - down * j
                column[j] = 0 if (abs(at) if two_sided else at) >= each else ways
        assert pvalue == pytest.approx(float(1 - Fraction(column[m], math.comb(n + m, m))), rel=1e-13)


@each_alternative
@pytest.mark.parametrize(("n", "m"), [(10, 10), (40, 25), (10_001, 20)])
def test_asymptotic(n: int, m: int, alternative: str) -> None:
    generator = np.random.default_rng(n)
    x, y = generator.normal(size=(3, n)), generator.normal(size=(3, m)) + np.linspace(0, 1, 3)[:, None]
    found = ks_2samp(torch.from_numpy(x), torch.from_numpy(y), alternative, "asymp")
    expected = [stats.ks_2samp(a, b, alternative, "asymp").pvalue for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(found.pvalue, expected, rtol=1e-11)
    if n > 10_000:
        assert torch.equal(found.pvalue, ks_2samp(torch.from_numpy(x), torch.from_numpy(y), alternative).pvalue)


@each_alternative
def test_exact_where_scipy_gives_up(alternative: str) -> None:
    """The asymptotic p-value and a warning, from both."""
    x, y = torch.randn(1, 65_537, dtype=torch.float64), torch.randn(1, 65_536, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="samples of 65537 and 65536"):
        found = ks_2samp(x, y, alternative, "exact")
    with pytest.warns(RuntimeWarning, match="Switching to 'asymp'"):
        expected = stats.ks_2samp(x[0].numpy(), y[0].numpy(), alternative, "exact")
    assert found.pvalue.item() == pytest.approx(expected.pvalue, rel=1e-10)


def test_nothing_to_give_up_where_nothing_differs() -> None:
    x = torch.zeros(2, 900)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ks_2samp(x, torch.zeros(2, 700), "less").pvalue.tolist() == [1, 1]


small = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(small, small, st.sampled_from(list(CODES)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_many_ties(x: list[int], y: list[int], alternative: str, dtype: torch.dtype) -> None:
    found = ks_2samp(torch.tensor([x], dtype=dtype), torch.tensor([y], dtype=dtype), alternative)
    expected = stats.ks_2samp(x, y, alternative)
    assert found.statistic.item() == pytest.approx(expected.statistic, rel=1e-15, abs=1e-300)
    assert found.pvalue.item() == pytest.approx(expected.pvalue, rel=1e-12)
    units, location = difference(np.array(x), np.array(y), alternative)
    assert found.statistic_location.item() == location
    assert found.statistic_sign.item() == (-1 if alternative == "less" or units < 0 <= CODES[alternative] == 0 else 1)


@each_alternative
def test_sizes_of_a_power_of_two_agree_with_scipy_in_all(alternative: str) -> None:
    """There scipy's differences are exact too, so that location and sign must be the same."""
    x, y = torch.randint(-9, 9, (20, 64)).float(), torch.randint(-9, 9, (20, 32)).float()
    found = ks_2samp(x, y, alternative)
    for row in range(20):
        expected = stats.ks_2samp(x[row].numpy(), y[row].numpy(), alternative)
        assert found.statistic[row].item() == expected.statistic
        assert found.statistic_location[row].item() == expected.statistic_location
        assert found.statistic_sign[row].item() == expected.statistic_sign


def test_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(7, 20), torch.randn(7, 30)
    whole = reference.ks_2samp(x, y, 0)
    monkeypatch.setattr(reference, "CHUNK", 100)
    for a, b in zip(whole, reference.ks_2samp(x, y, 0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_empty_samples(sizes: tuple[int, int]) -> None:
    x, y = (torch.zeros(2, size, dtype=torch.bfloat16) for size in sizes)
    with pytest.warns(RuntimeWarning, match="a sample is empty"):
        found = ks_2samp(x, y)
    assert all(part.isnan().all() for part in found[:3])
    assert [part.dtype for part in found] == [torch.float64, torch.float64, torch.bfloat16, torch.int8]
    assert found.statistic_sign.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(2, 3)), r"x must have two dimensions.*\[3\]"),
        ((torch.zeros(2, 3), torch.zeros(1, 2, 3)), r"y must have two dimensions.*\[1, 2, 3\]"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), r"same number of rows.*\[2, 3\].*\[3, 3\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).double()), "share dtype.*float32.*float64"),
        ((torch.zeros(2, 3).long(), torch.zeros(2, 3).long()), "x must be fp32, fp64, bf16 or fp16, got torch.int64"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), "more"), "alternative must be.*'more'"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), "less", "approx"), "method must be.*'approx'"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ks_2samp(*arguments)
