"""scipy's own cases for the two-sample test, run against ours: same inputs, same expected numbers.

From scipy/stats/tests/test_stats.py, class TestKSTwoSamples (scipy 1.17, BSD-3-Clause), which compares to six decimals;
here to nine digits, so that two numbers of its tails are replaced by exact ones.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from sparsekernels.ops import ks_2samp
from sparsekernels.ops.ks import KsResult

X12 = np.array([1.0, 2.0])
X123 = np.array([1.0, 2.0, 3.0])
X100, X110 = np.linspace(1, 100, 100), np.linspace(1, 100, 110)
X2233, X2356 = np.repeat([2, 3, 5, 6], [3, 4, 5, 4]), np.repeat([2, 3, 5, 6], [3, 4, 10, 4])
X3467 = np.repeat([3, 4, 6, 7], [10, 2, 10, 4])


def result_of(x, y, alternative: str = "two-sided", method: str = "auto") -> KsResult:
    a, b = (torch.tensor(np.asarray(sample, dtype=np.float64))[None] for sample in (x, y))
    return KsResult(*(part[0] for part in ks_2samp(a, b, alternative, method)))


def check(x, y, alternative: str, statistic: float, pvalue: float, method: str = "auto") -> None:
    found = result_of(x, y, alternative, method)
    np.testing.assert_allclose([found.statistic.item(), found.pvalue.item()], [statistic, pvalue], rtol=1e-9)


def three(x, y, two_sided: tuple[float, float], greater: tuple[float, float], less: tuple[float, float]) -> list:
    return [
        pytest.param(x, y, alternative, *numbers)
        for alternative, numbers in (("two-sided", two_sided), ("greater", greater), ("less", less))
    ]


@pytest.mark.parametrize(
    ("x", "y", "alternative", "statistic", "pvalue"),
    [
        *three([0], [1], (1, 1), (1, 0.5), (0, 1)),
        *three([1], [0], (1, 1), (0, 1), (1, 0.5)),
        *three(X12 + 0.01, X123, (1 / 3, 1), (1 / 3, 0.7), (1 / 3, 0.7)),
        *three(X12 - 0.01, X123, (2 / 3, 0.6), (2 / 3, 0.3), (0, 1)),
        *three(X12 + 0.01, [1, 2, 3, 4], (2 / 4, 14 / 15), (2 / 4, 8 / 15), (1 / 4, 12 / 15)),
        *three(X12 - 0.01, [1, 2, 3, 4], (3 / 4, 6 / 15), (3 / 4, 3 / 15), (0, 1)),
        *three(X100, X100 + 2.1, (0.03, 0.9999999999962055), (0.03, 0.9143290114276248), (0, 1)),
        *three(X100, X100 + 1.9, (0.02, 1), (0.02, 0.960978450786184), (0, 1)),
        *three(X100, X110 + 20.1, (232 / 1100, 0.015739183865607353), (232 / 1100, 0.007869594319053203), (0, 1)),
        *three(X100, X110 + 19.9, (229 / 1100, 0.017803803861026313), (229 / 1100, 0.008901905958245056), (0, 1)),
        *three(X2233, X2233 + 1, (5 / 16, 0.4262934613454952), (5 / 16, 0.21465428276573786), (0, 1)),
        *three(
            X2356,
            X3467,
            (190 / 21 / 26, 0.0919245790168125),
            (190 / 21 / 26, 0.0459633806858544),
            (70 / 21 / 26, 0.6121593130022775),
        ),
        *three(X123, X123 + 1, (1 / 3, 1), (1 / 3, 0.75), (0, 1)),
        *three(X123, X123 + 0.5, (1 / 3, 1), (1 / 3, 0.75), (0, 1)),
        *three(X123, X123 - 0.5, (1 / 3, 1), (0, 1), (1 / 3, 0.75)),
    ],
)
def test_small(x, y, alternative: str, statistic: float, pvalue: float) -> None:
    check(x, y, alternative, statistic, pvalue)


def ramps(n: int, m: int, end: float = 200) -> tuple[np.ndarray, np.ndarray]:
    return np.linspace(1, 200, n) - 1 / (4 * n * m), np.linspace(2, end, m)


@pytest.mark.parametrize(
    ("n", "m", "alternative", "method", "statistic", "pvalue", "gives_up"),
    [
        (500, 600, "two-sided", "auto", 2000 / 500 / 600, 1, False),
        (500, 600, "two-sided", "asymp", 2000 / 500 / 600, 1, False),
        (500, 600, "greater", "asymp", 2000 / 500 / 600, 0.9697596024683929, False),
        (500, 600, "less", "asymp", 500 / 500 / 600, 0.9968735843165021, False),
        (500, 600, "greater", "exact", 2000 / 500 / 600, 0.9697596024683929, True),
        (500, 600, "less", "exact", 500 / 500 / 600, 0.9968735843165021, True),
        (1000, 1100, "two-sided", "auto", 6600 / 1000 / 1100, 1, False),
        (1000, 1100, "two-sided", "asymp", 6600 / 1000 / 1100, 1, False),
        (1000, 1100, "greater", "asymp", 6600 / 1000 / 1100, 0.9573185808092622, False),
        (1000, 1100, "less", "asymp", 1000 / 1000 / 1100, 0.9982410869433984, False),
        (1000, 1100, "greater", "exact", 6600 / 1000 / 1100, 0.9573185808092622, True),
        (1000, 1100, "less", "exact", 1000 / 1000 / 1100, 0.9982410869433984, True),
        (10000, 11000, "two-sided", "asymp", 563 / 110000, 0.9990660108966576, False),
        (10000, 11000, "two-sided", "exact", 563 / 110000, 0.9990456491488628, False),
        (10000, 11000, "two-sided", "auto", 563 / 110000, 0.9990660108966576, False),
        (10000, 11000, "greater", "auto", 563 / 110000, 0.7561851877420673, False),
        (10000, 11000, "less", "auto", 10 / 110000, 0.9998239693191724, False),
        (10000, 11000, "greater", "exact", 563 / 110000, 0.7561851877420673, True),
        (10000, 11000, "less", "exact", 10 / 110000, 0.9998239693191724, True),
    ],
)
def test_large(n: int, m: int, alternative: str, method: str, statistic: float, pvalue: float, gives_up: bool) -> None:
    """Where the exact number of paths overflows, the asymptotic p-value comes with one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(*ramps(n, m), alternative, statistic, pvalue, method)
    assert [warning.category for warning in caught] == [RuntimeWarning] * gives_up


def test_very_unequal() -> None:
    x, y = ramps(10000, 110, end=100)
    check(x, y, "two-sided", 55275 / 110000, 6.263465662260852e-26)  # in fractions; scipy's case has 4.2e-15
    check(x, y, "greater", 561 / 110000, 0.99115454582047591)
    check(x, y, "less", 55275 / 110000, 3.1317328311518713e-26)


def test_far_in_the_tail() -> None:
    generator = np.random.RandomState(123456)
    x, y = generator.normal(size=3000), generator.normal(size=3001) * 1.5
    # In fractions, and by scipy.stats.kstwo; scipy's case has 2.8e-15 for both.
    for method, pvalue in (("exact", 3.8479882241272927e-17), ("asymp", 4.052390248555203e-17)):
        check(x, y, "two-sided", 0.11292880151060758, pvalue, method)


@pytest.mark.parametrize("n", [1000, 3000])
def test_exact_and_asymptotic_are_in_line(n: int) -> None:
    generator = np.random.RandomState(123456)
    x, y = generator.normal(size=n), generator.normal(size=n + 10, loc=0.5)
    exact, asymptotic = (result_of(x, y, method=method).pvalue.item() for method in ("exact", "asymp"))
    assert asymptotic / 3 < exact < asymptotic * 3


def test_named_attributes() -> None:
    found = ks_2samp(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
    assert found[0] is found.statistic
    assert found[1] is found.pvalue


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (0, 0)], ids=str)
def test_empty(sizes: tuple[int, int]) -> None:
    with pytest.warns(RuntimeWarning, match="empty"):
        found = result_of(*(np.ones(size) for size in sizes))
    assert found.statistic.isnan()
    assert found.pvalue.isnan()


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_products_of_sizes_beyond_64_bits(alternative: str) -> None:
    x = np.random.default_rng(8751495592).uniform(size=2**21)
    found, expected = (test(x, x + 1, alternative, "asymp") for test in (result_of, stats.ks_2samp))
    assert found.statistic.item() == expected.statistic
    assert found.pvalue.item() == pytest.approx(expected.pvalue, rel=1e-9)


def test_warns_where_exact_fails_in_auto() -> None:
    generator = np.random.RandomState(seed=23493549)
    x, y = generator.random(size=881) + 0.5, generator.random(size=369)
    with pytest.warns(RuntimeWarning, match="asymptotic"):
        found = result_of(x, y, "less").pvalue.item()
    with pytest.warns(RuntimeWarning, match="asymp"):
        assert found == pytest.approx(stats.ks_2samp(x, y, "less").pvalue, rel=1e-9)
    assert 0 < found < 1e-14


@pytest.mark.parametrize(
    ("alternative", "moved_to", "location", "sign"),
    [("greater", 5.9, 5.9, 1), ("less", 6.1, 6.0, -1), ("two-sided", 5.9, 5.9, 1), ("two-sided", 6.1, 6.0, -1)],
)
def test_location_and_sign(alternative: str, moved_to: float, location: float, sign: int) -> None:
    x = np.arange(10, dtype=np.float64)
    y = x.copy()
    x[6] = moved_to
    found = result_of(x, y, alternative)
    assert found.statistic.item() == 0.1
    assert found.statistic_location.item() == location
    assert found.statistic_sign.item() == sign
