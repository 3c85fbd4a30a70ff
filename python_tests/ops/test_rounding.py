"""Stochastic rounding: Philox by its published numbers, the same bits on every backend, no bias, replayable."""

from __future__ import annotations

import pytest
import torch

from sparsekernels import ops
from sparsekernels.ops import backend
from sparsekernels.ops.common.rounding import philox, rounded

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
    ops.adamw_rows_(x, grad.to(dtype), ids, None, m, v, None, scales, **options)
    return [x, m, v]


def step_at_positions(
    compact: bool, rows: bool, dtype: torch.dtype, state: torch.dtype, rounding: tuple[int, ...], name: str | None
) -> list[torch.Tensor]:
    """The same through adamw_, compact and not: two tensors, the second with a step count for each position."""
    generator = torch.Generator().manual_seed(2)
    shape = (20, 70) if rows else (1400,)
    weights = [(1 + torch.rand(40, 70, generator=generator)).to(dtype) for _ in range(2)]
    positions = [torch.arange(0, 40 if rows else 2800, 2) for _ in range(2)]
    full = shape if compact else (40, 70)
    grads = [torch.where(torch.rand(full, generator=generator) < 0.5, -1.2578125, 1.2578125) for _ in range(2)]
    m, v = ([torch.zeros(shape, dtype=state) for _ in range(2)] for _ in range(2))
    step_counts = torch.full((shape[0],), 2.0**22)  # old enough for bias corrections to be exactly 1
    step_counts[::3] = 2.0**23
    steps = [torch.tensor(2.0**22), step_counts]
    options = {"lr": 2.0**-11, "beta1": 0.5, "beta2": 0.0, "weight_decay": 0.0, "eps": 0.0}
    state = (m, v, [], steps, positions)
    if compact:
        values = [(w if rows else w.view(-1))[::2].float().contiguous() for w in weights]
        args = (values, grads, *state, weights)
    else:
        args = (weights, [g.to(dtype) for g in grads], *state, [])
    tiles = [(1, 70 if rows else 1)] * 2
    ops.adamw_(*args, tiles=tiles, **options, rounding=rounding, backend=name)
    return [*weights, *m, *v]


@HALVES
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["triton", "native"])
def test_the_same_bits_at_positions(name: str, compact: bool, rows: bool, dtype: torch.dtype) -> None:
    if reason := backend.why_not("adamw_", name, "cpu"):  # type: ignore[arg-type]
        pytest.skip(reason)
    case = (compact, rows, dtype, BF16)
    expected = step_at_positions(*case, (3, 5), "reference")
    found = step_at_positions(*case, (3, 5), name)
    first = 2 if compact and name == "triton" else 0  # Triton's interpreter cuts bf16 weights off where a GPU rounds
    assert all(torch.equal(a, b) for a, b in zip(expected[first:], found[first:], strict=True))
    for seed_and_stream in ((4, 5), (3, 6), ()):
        other = step_at_positions(*case, seed_and_stream, name)
        assert not torch.equal(found[4], other[4])
        assert torch.equal(found[0], other[0]) == compact  # rounded to nearest, for its master keeps what that loses


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
