"""Every op, on every backend that is present, over all of its samples."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from samples import all_samples
from samples.case import Case, Sample, put, take
from torch import Tensor

from sparsekernels.ops import OPS, backend

SAMPLES = all_samples()
BACKENDS = ("reference", "triton", "native")
# Triton's interpreter runs one program after another: there nothing can come out otherwise the next time.
SCHEDULED = [name for name in BACKENDS if name != "triton" or torch.cuda.is_available()]
FLOOR = 1e-6  # of the largest expected value


def parameters(ops: Iterable[str], every: int = 1, without_nan: bool = False) -> list[Any]:
    """Sample parameters; of each op one in `every`, drawn at random, since dtypes and forms alternate in the list."""
    draw, found = random.Random(0), []
    for op in ops:
        samples = [s for s in SAMPLES.get(op, []) if not (without_nan and re.search("nan|special", s.name))]
        some = samples if every == 1 else draw.sample(samples, math.ceil(len(samples) / every))
        found += [pytest.param(s, id=f"{op}-{s.name}") for s in some]
    return found


def bits(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def identical(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and values; signs of zero count, payloads of NaN do not."""
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    same = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((same | (a.isnan() & b.isnan())).all())


def run(case: Case, name: str) -> list[Tensor]:
    """Results and mutated tensors after the call on a backend."""
    torch.set_num_threads(2 if name == "native" else 1)  # so that native loops are divided, and meet their seams
    try:
        result = case.call(*case.args, **case.kwargs, backend=name)
    finally:
        torch.set_num_threads(1)
    if case.mutated or result is None:
        return list(case.mutated)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def error(found: Tensor, expected: Tensor) -> Tensor:
    """|found - expected|, elementwise in fp64; 0 where both are the same infinity or both NaN."""
    found, expected = found.detach().cpu().double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return torch.where(same, 0.0, (found - expected).abs().nan_to_num(nan=float("inf")))


def largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def rounding(dtype: torch.dtype, truncates: bool) -> float:
    """The relative error of one rounding to `dtype`; Triton's interpreter truncates to bf16 where a GPU rounds."""
    unit = torch.finfo(dtype).eps / 2
    return 2 * unit if truncates and dtype == torch.bfloat16 else unit


def skip_unless_present(sample: Sample, name: str, device: torch.device) -> None:
    reason = backend.why_not(sample.op, name, device.type)
    if sample.heavy and name == "triton" and device.type == "cpu":
        reason = "too large for the interpreter"
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def close_enough(found: Tensor, expected: Tensor, name: str) -> bool:
    """Identical; but Triton's interpreter cuts bf16 off where a GPU rounds: there the last place is free."""
    if not (name == "triton" and found.device.type == "cpu" and found.dtype == torch.bfloat16):
        return identical(found, expected)
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=2**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("sample", parameters(op.name for op in OPS))
@pytest.mark.parametrize("name", BACKENDS)
def test_values(sample: Sample, name: str, device: torch.device) -> None:
    """Results against the oracle: exactly, or with at most twice the error of the reference."""
    skip_unless_present(sample, name, device)
    case = sample.case(device)
    before = [buffer.clone() for buffer, _ in case.buffers]
    dense_before = [dense.clone() for dense, _ in case.inside]
    found = run(case, name)

    assert len(found) == len(case.expected)
    if case.exact:
        for out, expected in zip(found, case.expected, strict=True):
            assert close_enough(out, expected, name)
    else:
        reference = run(sample.case(device), "reference")
        truncates = name == "triton" and device.type == "cpu"
        for out, expected, yardstick in zip(found, case.expected, reference, strict=True):
            assert out.dtype == yardstick.dtype
            assert out.shape == expected.shape
            finite = expected.double()[expected.isfinite()].abs()
            scale = largest(finite)
            rounds_to = None if name == "native" else case.rounds_to  # sums of the kernels themselves are not rounded
            unit = rounding(rounds_to or out.dtype, truncates) * (2 if case.stochastic else 1)
            own = largest(error(yardstick, expected)[expected.isfinite()])
            # The yardstick itself, and what is better than it: a few dozen roundings of the working dtype.
            if name == "reference" or rounds_to is not case.rounds_to:
                own = 64 * torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps * scale
            floor = FLOOR * scale if out.dtype != torch.float64 else 1e-14 * scale
            allowed = 2 * own + floor + 1.01 * unit * expected.double().abs().nan_to_num(0, 0, 0)
            excess = error(out, expected) - allowed
            assert largest(excess) <= 0, (
                f"error {largest(error(out, expected)):.3g}, reference {own:.3g}, scale {scale:.3g}"
            )

    for dense, index, values in case.written:
        assert close_enough(take(dense, index), values.cpu().to(dense.dtype), name)
    for (dense, index), was in zip(case.inside, dense_before, strict=True):
        assert torch.equal(bits(put(dense, index, take(was, index))), bits(was)), "changed outside the selection"
    may_change = {id(x) for x in case.mutated} | {id(dense) for dense, _ in case.inside}
    for (buffer, view), was in zip(case.buffers, before, strict=True):
        start = view.storage_offset()
        after = buffer.clone()
        if id(view) in may_change:
            after[start : start + view.numel()] = was[start : start + view.numel()]
        assert torch.equal(bits(after), bits(was)), "a canary, or an argument that is only read, changed"


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("sample", parameters((op.name for op in OPS), every=5))
def test_same_bits_every_time(sample: Sample, name: str, device: torch.device) -> None:
    skip_unless_present(sample, name, device)
    if device.type == "cuda" and sample.op.startswith("masked_grad"):
        pytest.skip("promised on the CPU only: sums over tokens may use atomics on a GPU")
    first, second = run(sample.case(device), name), run(sample.case(device), name)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sample", parameters((op.name for op in OPS), every=27))
def test_autocast_changes_nothing(sample: Sample, name: str, device: torch.device) -> None:
    """A backward may run within it."""
    skip_unless_present(sample, name, device)
    outside = run(sample.case(device), name)
    with torch.autocast(device.type, torch.bfloat16):
        within = run(sample.case(device), name)
    for a, b in zip(outside, within, strict=True):
        assert a.dtype == b.dtype
        scale = largest(a.double()[a.isfinite()].abs())  # matmuls in bf16 are off by 1e-3 of it
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)


@pytest.mark.parametrize("sample", parameters(op.name for op in OPS))
def test_schema_and_fake(sample: Sample, device: torch.device) -> None:
    """The schema tells the truth about mutation and aliasing, the fake about shapes and dtypes."""
    case = sample.case(device)
    overload = getattr(torch.ops.sparsekernels, sample.op).default
    torch.library.opcheck(overload, case.raw, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("sample", parameters((op.name for op in OPS), every=12, without_nan=True))
def test_opcheck(sample: Sample, device: torch.device) -> None:
    """Not of samples that hold NaN, which opcheck takes for unequal."""
    case = sample.case(device)
    torch.library.opcheck(getattr(torch.ops.sparsekernels, sample.op).default, case.raw)


@pytest.mark.parametrize("sample", parameters((op.name for op in OPS), every=12))
def test_compiles(sample: Sample, device: torch.device) -> None:
    """One graph, and the same bits as eager: nothing that is mutated is lost on the way."""
    overload = getattr(torch.ops.sparsekernels, sample.op).default
    eager, compiled = sample.case(device), sample.case(device)
    torch._dynamo.reset()
    expected = overload(*eager.raw)
    found = torch.compile(overload, fullgraph=True, backend="aot_eager")(*compiled.raw)
    for a, b in zip(flat((expected, eager.raw)), flat((found, compiled.raw)), strict=True):
        assert torch.equal(bits(a), bits(b))


def flat(x: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, Tensor)]
