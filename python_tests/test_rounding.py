"""Stochastic rounding: Philox by its published numbers, the same bits on every backend, no bias, replayable."""

from __future__ import annotations

import pytest
import torch

from sparsekernels import ops
from sparsekernels.ops import backend
from sparsekernels.ops.rounding.reference import philox, rounded

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES = pytest.mark.parametrize("dtype", [BF16, FP16])


@pytest.mark.parametrize(
    ("key", "counter", "word"),
    [  # the known answers of Random123
        (0, (0, 0, 0), 0x6627E8D5),
        (-1, (-1, 0xFFFFFFFF, 0xFFFFFFFF), 0x408F276D),
        (0x299F31D0A4093822, (0x85A308D3243F6A88 - 2**64, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ],
)
def test_philox(key: int, counter: tuple[int, int, int], word: int) -> None:
    low, third, fourth = counter
    assert philox(key, torch.tensor([low]), third, fourth).item() == word


def numbers() -> torch.Tensor:
    """fp32 of every size: normal, subnormal in either half format, exact, zero, infinite, NaN, at the upper end."""
    special = [0.0, -0.0, 1.0, -3.0, 65504.0, -65519.0, 3e38, float("inf"), -float("inf"), float("nan"), 2.0**-24]
    return torch.cat([torch.randn(200) * 10.0**e for e in range(-9, 6, 2)] + [torch.tensor(special)])


@HALVES
def test_to_a_neighbour_without_bias(dtype: torch.dtype) -> None:
    """Always the number below or above; on average the number itself."""
    x = numbers()
    positions = torch.arange(len(x))
    draws = torch.stack([rounded(x, dtype, (seed, 1, 0), positions, 0) for seed in range(400)]).float()
    normal = x.isfinite() & (x.abs() < 6e4)
    nearest = x.to(dtype)
    special = nearest[~x.isfinite()].float()
    assert torch.equal(draws[:, ~x.isfinite()].nan_to_num(7), special.nan_to_num(7).expand(400, -1))
    x, draws, nearest = x[normal], draws[:, normal], nearest[normal].float()
    other = torch.nextafter(nearest.to(dtype), torch.where(x > nearest, torch.inf, -torch.inf).to(dtype)).float()
    assert ((draws == nearest) | ((draws == other) & (x != nearest))).all()
    gap = (other - nearest).abs().double()
    bias = (draws.double().mean(0) - x.double()) / gap
    assert bias.abs().max() < 5 * 0.5 / 400**0.5  # five standard deviations of a mean of 400 coins
    assert bias.mean().abs() < 0.005
    assert (draws != nearest).any(0).float().mean() > 0.5


def step(dtype: torch.dtype, state: torch.dtype, rounding: tuple[int, ...], name: str | None) -> list[torch.Tensor]:
    """A step whose fp32 results are exact: nothing but the rounding can differ between backends."""
    generator = torch.Generator().manual_seed(1)
    x = (1 + torch.rand(40, 70, generator=generator)).to(dtype)
    m, v = torch.zeros(40, 70, dtype=state), torch.zeros(40, 70, dtype=state)
    ids = torch.arange(0, 40, 2)
    grad = torch.where(torch.rand(20, 70, generator=generator) < 0.5, -1.0, 1.0) * 1.25
    scales = torch.tensor([[0.0, 2.0**-11]])
    options = {"beta1": 1 - 2.0**-10, "beta2": 0.0, "eps": 0.0, "rounding": rounding, "backend": name}
    ops.adamw_rows_(x, grad.to(dtype), ids, ids // 2, None, m, v, None, scales, **options)
    return [x, m, v]


@HALVES
@pytest.mark.parametrize("state", [BF16, FP32])
@pytest.mark.parametrize("name", ["triton", "native"])
def test_the_same_bits_on_every_backend(dtype: torch.dtype, state: torch.dtype, name: str) -> None:
    if reason := backend.why_not("adamw_rows_", name, "cpu"):  # type: ignore[arg-type]
        pytest.skip(reason)
    for rounding in ((3, 5, 0), (2**63 - 1, 2**31, 77)):
        expected, found = step(dtype, state, rounding, "reference"), step(dtype, state, rounding, name)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@HALVES
def test_seed_step_and_stream_count(dtype: torch.dtype) -> None:
    first = step(dtype, FP32, (3, 5, 0), None)[0]
    assert torch.equal(first, step(dtype, FP32, (3, 5, 0), None)[0])
    for other in ((4, 5, 0), (3 + 2**32, 5, 0), (3, 6, 0), (3, 5, 1), ()):
        assert not torch.equal(first, step(dtype, FP32, other, None)[0])
