"""bf16 and fp16 weights: small steps are not lost, neither with a master nor with stochastic rounding; bf16 moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
V, D, STEPS, LR = 40, 64, 1000, 1e-5
ROWS = torch.arange(0, V, 2)
Run = Callable[..., tuple[Tensor, Any]]


def start() -> Tensor:
    """Weights that every dtype has."""
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1)).bfloat16().float()


def gradient(step: int) -> Tensor:
    """One for each row of ROWS, of a steady direction and some noise."""
    generator = torch.Generator().manual_seed(step)
    direction = torch.where(torch.arange(D) % 2 == 0, 1.0, -1.0)
    return direction + 0.5 * torch.randn(len(ROWS), D, generator=generator)


def compact(dtype: torch.dtype, steps: int, **options: Any) -> tuple[Tensor, Any]:
    model = nn.Embedding(V, D, _weight=start().to(dtype))
    tuned = sk.train_only(model, sk.Selection({"weight": sk.Index(ROWS, (V, D), granularity="row")}))
    optimizer = sk.SparseAdamW(tuned.parameters(), LR, weight_decay=0.01, **options)
    (values,) = tuned.parameters()
    for step in range(steps):
        values.grad = gradient(step)
        optimizer.step()
    return model.weight.detach(), optimizer.state[values]


def indexed(dtype: torch.dtype, steps: int, **options: Any) -> tuple[Tensor, Any]:
    p = nn.Parameter(start().to(dtype))
    groups = [{"params": [p], "indices": [sk.Index(ROWS, (V, D), granularity="row")]}]
    optimizer = sk.SparseAdamW(groups, LR, weight_decay=0.01, **options)
    for step in range(steps):
        p.grad = torch.zeros(V, D, dtype=dtype)
        p.grad[ROWS] = gradient(step).to(dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def listed(dtype: torch.dtype, steps: int, **options: Any) -> tuple[Tensor, Any]:
    p = nn.Parameter(start().to(dtype))
    optimizer = sk.SparseAdamW([p], LR, weight_decay=0.01, **options)
    for step in range(steps):
        p.grad = torch.sparse_coo_tensor(ROWS[None], gradient(step).to(dtype), (V, D), check_invariants=True)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def moved(weight: Tensor) -> Tensor:
    return (weight.double() - start().double())[ROWS]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("run", "options"),
    [(compact, {}), (indexed, {"stochastic_rounding": True}), (listed, {"stochastic_rounding": True, "seed": 9})],
    ids=["master", "indices", "sparse gradient"],
)
def test_a_thousand_small_steps_follow_fp32(run: Run, options: dict[str, Any], dtype: torch.dtype) -> None:
    """lr 1e-5 is far below the resolution of bf16; what 1000 steps move is the same as in fp32, on average and each.

    A master rounds once, by at most half a place. By chance, a step of s moves a whole place u with probability s / u:
    1000 of them walk around the exact path with a standard deviation of sqrt(1000 s u), and none on average.
    """
    expected, found = moved(run(FP32, STEPS)[0]), moved(run(dtype, STEPS, **options)[0])
    place = torch.finfo(dtype).eps * (start()[ROWS].abs().double() + STEPS * LR)
    walk = (STEPS * LR * place).sqrt()
    error = found - expected
    allowed = 0.51 * place if run is compact else 6 * walk + place
    assert (error.abs() <= allowed).all()
    deviation = (place / 12**0.5 if run is compact else walk).square().sum().sqrt() / error.numel()
    assert abs((error * expected.sign()).mean()) < 5 * deviation
    assert expected.abs().mean() > 10 * deviation
    if run is not compact:
        lost = moved(run(dtype, STEPS)[0])  # rounded to nearest
        assert (lost * expected.sign()).mean() < 0.5 * expected.abs().mean()


@pytest.mark.parametrize("run", [compact, indexed, listed])
def test_moments_in_bf16(run: Run) -> None:
    """Half the state; with stochastic rounding the second moment decays as it should, and the path is close."""
    options = {"state_dtype": BF16, "stochastic_rounding": True}
    weight, state = run(FP32, STEPS, **options)
    expected, wide = run(FP32, STEPS)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == BF16
    assert wide["exp_avg"].dtype == FP32
    assert (moved(weight) - moved(expected)).norm() < 0.02 * moved(expected).norm()
    ratio = state["exp_avg_sq"].float().mean() / wide["exp_avg_sq"].mean()
    assert abs(ratio - 1) < 0.02
    nearest = run(FP32, STEPS, state_dtype=BF16)[1]["exp_avg_sq"].float().mean() / wide["exp_avg_sq"].mean()
    assert abs(nearest - 1) > 0.05  # a change of a thousandth is below half a place of bf16


@pytest.mark.parametrize("run", [compact, indexed, listed])
def test_random_bits_can_be_drawn_again(run: Run) -> None:
    options = {"state_dtype": BF16, "stochastic_rounding": True, "seed": 5}
    first = run(BF16, 20, **options)[1]["exp_avg_sq"]
    assert torch.equal(first, run(BF16, 20, **options)[1]["exp_avg_sq"])
    assert not torch.equal(first, run(BF16, 20, **{**options, "seed": 6})[1]["exp_avg_sq"])


def test_parameters_draw_other_bits() -> None:
    """Two tables with the same numbers do not round alike, in whatever group they are."""
    tables = [nn.Parameter(torch.ones(V, D, dtype=BF16)) for _ in range(4)]
    index = [sk.Index(ROWS, (V, D), granularity="row")]
    groups = [{"params": tables[:1], "indices": index}, {"params": tables[1:2], "indices": index}]
    groups += [{"params": tables[2:3]}, {"params": tables[3:]}]
    optimizer = sk.SparseAdamW(groups, 1e-3, stochastic_rounding=True)
    for p in tables[:2]:
        p.grad = torch.ones_like(p)
    for p in tables[2:]:
        p.grad = torch.ones_like(p).to_sparse(1)
    optimizer.step()
    for i, p in enumerate(tables):
        assert (p.detach()[ROWS] != 1).any()
        for q in tables[:i]:
            assert not torch.equal(p.detach()[ROWS], q.detach()[ROWS])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_dtype": FP16}, r"state_dtype must be one of None, torch.float32, torch.bfloat16, got torch.float16"),
        ({"stochastic_rounding": 1}, "stochastic_rounding must be one of False, True, got 1"),
        ({"seed": 0.5}, "seed must be an int, got 0.5"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sk.SparseAdamW([nn.Parameter(torch.ones(3))], **options)
