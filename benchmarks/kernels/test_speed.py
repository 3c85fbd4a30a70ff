"""Every contender of every case under pytest-benchmark, for its tables and --benchmark-save, -compare and -histogram.

pytest benchmarks/kernels/test_speed.py -k topk --benchmark-columns=median,iqr,rounds
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernels.case import Case
from benchmarks.kernels.run import cases
from benchmarks.timing import DEVICE, free, synchronized

CASES = cases(small=False, sizes="gpu" if DEVICE.type == "cuda" else "cpu")


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case.name}: {name}") for case in CASES for name in case.contenders],
)
def test_speed(case: Case, name: str, benchmark: Any) -> None:
    contender, _ = case.entrant(name, case.make())
    benchmark.group = case.name
    benchmark(synchronized(contender.call))
    free()
