"""Top-k past 2^31 scores, with stand-ins that do not need the memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch

from sparsekernels.ops import topk


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_one_tensor() -> None:
    """Zeros that were never written take no memory; three of them were."""
    scores = torch.from_numpy(numpy.zeros(2**31 + 99, dtype=numpy.float16))
    for position, value in ((2**31 + 98, 2.0), (2**31 - 1, 1.0), (2**30, 3.0)):
        scores[position] = value
    (found,) = topk([scores], 4)
    assert found.tolist() == [0, 2**30, 2**31 - 1, 2**31 + 98]  # among the zeros, the first
    (found,) = topk([scores], 2)
    assert found.tolist() == [2**30, 2**31 + 98]


def test_a_list() -> None:
    """One tensor 33 times: 2.2e9 scores in 128 MiB; equal ones go to the earlier tensor."""
    scores = torch.rand(2**26, generator=torch.Generator().manual_seed(0)).half()
    scores[-1], scores[5] = 3.0, 2.0
    many = [scores] * 33
    assert sum(x.numel() for x in many) > 2**31
    found = topk(many, 35)
    assert [part.tolist() for part in found] == [[5, 2**26 - 1]] * 2 + [[2**26 - 1]] * 31
