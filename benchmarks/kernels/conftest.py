"""Turns the cases of a bench_*.py into pytest-benchmark tests, one for each contender and state, grouped by case.

What `warm` and `cold` mean is said in compare.py.

    pytest benchmarks/kernels                        all of it; a wrong result fails, and gets no time
    pytest benchmarks/kernels --benchmark-disable    the checks alone, on small inputs
    pytest benchmarks/kernels --small                times on small inputs, to try a benchmark out
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
from compare import Case, Contender, Problem, copy_bandwidth, evict, seconds, synchronized
from pytest_benchmark.fixture import BenchmarkFixture

BUDGET = 0.2  # seconds of timed calls for each test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="small inputs; implied by --benchmark-disable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.getoption("--small") or metafunc.config.getoption("--benchmark-disable")
    entries = [
        pytest.param(case, name, state, id=f"{case.name}|{name}|{state}")
        for case in metafunc.module.cases(small)
        for name in case.contenders
        for state in case.states
        if state == "warm" or not metafunc.config.getoption("--benchmark-disable")
    ]
    metafunc.parametrize(("case", "name", "state"), entries)


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> Problem:
    return case.make()


@functools.lru_cache(maxsize=1)
def _entrant(case: Case, name: str) -> tuple[Contender, float]:
    return case.entrant(name, _problem(case))


@pytest.fixture
def compete(benchmark: BenchmarkFixture) -> Callable[[Case, str, str], None]:
    """Check a contender, time it in a state, and note beside the time what makes it comparable."""

    def run(case: Case, name: str, state: str) -> None:
        contender, error = _entrant(case, name)
        problem, call = _problem(case), synchronized(contender.call)
        benchmark.group = f"{case.name} ({state})"
        once = seconds(call)  # not the first call: the check made that
        least = 3 if once < 2 * BUDGET else 1
        if state == "warm":
            iterations = max(1, math.ceil(1e-4 / once))  # a timer reads to a microsecond, a tiny call takes twenty
            rounds = min(100, max(least, round(BUDGET / (once * iterations))))
            benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=min(least - 1, 1))
        else:
            benchmark.pedantic(call, setup=evict, rounds=min(10, max(least, round(BUDGET / once))))
        benchmark.extra_info.update(
            shape=problem.shape,
            density=problem.density,
            dtype=problem.dtype,
            bytes_moved=problem.bytes_moved,
            bytes_formula=problem.formula,
            max_error=error,
        )
        if benchmark.stats is not None:
            median = benchmark.stats.stats.median
            bandwidth = copy_bandwidth()
            benchmark.extra_info.update(
                median=median,
                copy_bandwidth=bandwidth,
                share_of_copy_bandwidth=problem.bytes_moved / median / bandwidth,
            )

    return run
