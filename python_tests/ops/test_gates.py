"""Stochastic gates: how they are distributed, what they depend on, and their gradients against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples.gates import KINDS, NOISE
from scipy import stats
from torch import Tensor

from sparsekernels import ops
from sparsekernels.ops import backend

FP64 = torch.float64
each_kind = pytest.mark.parametrize("kind", KINDS)
each_backend = pytest.mark.parametrize("name", ["reference", "triton", "native"])


def skip_unless_present(op: str, name: Any, device: torch.device) -> None:
    if reason := backend.why_not(op, name, device.type):
        pytest.skip(reason)


def key_of(number: int, device: torch.device) -> Tensor:
    return torch.tensor([number], device=device)


def many(name: str, device: torch.device) -> int:
    """Gates to count, as many as there is time for: Triton's interpreter takes milliseconds for a few hundred."""
    return 4_000 if name == "triton" and device.type == "cpu" else 50_000


def noise_of(name: str, kind: str, count: int, number: int, stream: int, device: torch.device) -> Any:
    """The noise inside gates that are wide enough never to be clamped."""
    wide = {"stg": 0.05, "finegates": 0.05, "hard_concrete": 9.0}[kind]
    logits = torch.zeros(count, device=device, dtype=FP64)
    options: dict[str, Any] = {"kind": kind, "noise": wide, "key": key_of(number, device), "stream": stream}
    values, slopes = ops.gate_values(logits, **options, backend=name)
    assert (slopes > 0).all()
    values = values.cpu()
    if kind == "hard_concrete":
        return (((values + 0.1) / 1.2).logit() * wide).numpy()
    return ((values - 0.5) / wide).numpy()


@each_kind
@each_backend
def test_noise_is_distributed_as_it_should_be(kind: str, name: str, device: torch.device) -> None:
    skip_unless_present("gate_values", name, device)
    count = many(name, device)
    found = noise_of(name, kind, count, 11, 0, device)
    law = stats.logistic if kind == "hard_concrete" else stats.norm
    assert stats.kstest(found, law.cdf).pvalue > 0.01
    assert abs(found.mean()) < 4 * law.std() / len(found) ** 0.5
    assert abs(found.var() / law.var() - 1) < 7 / count**0.5
    others = [noise_of(name, kind, count - 1, number, stream, device) for number, stream in ((11, 1), (12, 0))]
    for other in (found[1:], *others):
        assert stats.spearmanr(found[:-1], other).pvalue > 0.01  # neighbours, streams and keys are independent


@each_kind
@each_backend
def test_draws_are_a_function_of_key_stream_and_number(kind: str, name: str, device: torch.device) -> None:
    skip_unless_present("gate_values", name, device)
    logits = torch.full((700,), 0.1, device=device)

    def draw(number: int, stream: int, count: int = 700) -> Tensor:
        options: dict[str, Any] = {"kind": kind, "noise": NOISE[kind], "key": key_of(number, device), "stream": stream}
        return ops.gate_values(logits[:count], **options, backend=name)[0]

    assert torch.equal(draw(5, 0), draw(5, 0))
    assert torch.equal(draw(5, 0)[:67], draw(5, 0, 67)), "a gate depends on how many others there are"
    for number, stream in ((6, 0), (5 + 2**40, 0), (-5, 0), (5, 1), (5, 2**32 - 1)):
        assert (draw(number, stream) != draw(5, 0)).float().mean() > 0.5


@each_kind
@each_backend
def test_without_a_key_there_is_no_noise(kind: str, name: str, device: torch.device) -> None:
    skip_unless_present("gate_values", name, device)
    logits = torch.linspace(-4, 4, 101, device=device)
    values, slopes = (x.cpu() for x in ops.gate_values(logits, kind=kind, noise=NOISE[kind], backend=name))
    center = {
        "stg": logits + 0.5,
        "finegates": logits.tanh() + 0.5,
        "hard_concrete": 1.2 * logits.sigmoid() - 0.1,
    }[kind].cpu()
    torch.testing.assert_close(values, center.clamp(0, 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(slopes > 0, (values > 0) & (values < 1))


@each_kind
@each_backend
def test_probabilities_are_shares_of_open_gates(kind: str, name: str, device: torch.device) -> None:
    skip_unless_present("gate_probabilities", name, device)
    count = many(name, device)
    for i, logit in enumerate((-1.3, -0.6, 0.0, 0.4)):
        logits = torch.full((count,), logit, device=device)
        options: dict[str, Any] = {"kind": kind, "noise": NOISE[kind]}
        expected = float(ops.gate_probabilities([logits[:1]], **options, backend=name)[0])
        values, _ = ops.gate_values(logits, **options, key=key_of(i, device), backend=name)
        share = float((values > 0).double().mean())
        assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


@each_kind
@each_backend
def test_slopes_are_derivatives(kind: str, name: str, device: torch.device) -> None:
    """Central differences in fp64."""
    skip_unless_present("gate_values", name, device)
    logits, step = torch.randn(500, dtype=FP64, device=device), 1e-5
    options: dict[str, Any] = {"kind": kind, "noise": NOISE[kind], "backend": name}
    for key in (None, key_of(3, device)):
        up, down = (ops.gate_values(logits + d, **options, key=key)[0] for d in (step, -step))
        _, slopes = ops.gate_values(logits, **options, key=key)
        smooth = ((up > 0) & (up < 1)) == ((down > 0) & (down < 1))
        assert smooth.float().mean() > 0.99
        torch.testing.assert_close(((up - down) / (2 * step))[smooth], slopes[smooth], rtol=1e-6, atol=1e-8)
    up, down = (ops.gate_probabilities([logits + d], **options)[0] for d in (step, -step))
    _, slopes = ops.gate_probabilities([logits], **options)
    torch.testing.assert_close((up - down) / (2 * step), slopes, rtol=1e-6, atol=1e-8)


@each_kind
@pytest.mark.parametrize("name", ["triton", "native"])
def test_backends_agree_which_gates_are_open(kind: str, name: str, device: torch.device) -> None:
    skip_unless_present("gate_values", name, device)
    logits = torch.randn(many(name, device), device=device)
    options: dict[str, Any] = {"kind": kind, "noise": NOISE[kind], "key": key_of(2**50 + 1, device)}
    found, expected = (ops.gate_values(logits, **options, backend=each)[0] for each in (name, "reference"))
    assert torch.equal(found > 0, expected > 0)
    assert torch.equal(found < 1, expected < 1)
    assert 0.02 < (found == 0).float().mean() < 0.98


@each_kind
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [1, 2])
@each_backend
def test_gradients_are_those_of_autograd(
    kind: str, transposed: bool, group: int, name: str, device: torch.device
) -> None:
    """A loss of F.linear(x, W'), by the logits, by the values of the gates, and by the bias that they gate."""
    skip_unless_present("gate_gradient", name, device)
    m, n = 24, 40
    options: dict[str, Any] = {"kind": kind, "noise": NOISE[kind], "key": key_of(9, device), "backend": name}
    x = torch.randn(33, n, dtype=FP64, device=device)
    weight = torch.randn((n, m) if transposed else (m, n), dtype=FP64, device=device)
    bias = torch.randn(m, dtype=FP64, device=device, requires_grad=True)
    logits = [torch.randn(size, dtype=FP64, device=device) for size in (m, n // group)]
    drawn = [ops.gate_values(each, **options, stream=stream) for stream, each in enumerate(logits)]
    assert all(((z == 0).any() and (z == 1).any()) for z, _ in drawn)
    z_r, z_c = (z.clone().requires_grad_() for z, _ in drawn)
    rows, columns = z_r, z_c.repeat_interleave(group)
    gated = weight * (rows if transposed else rows[:, None]) * (columns[:, None] if transposed else columns)
    y = F.linear(x, gated.T if transposed else gated)
    (y + bias * rows).sin().sum().backward()
    assert z_r.grad is not None
    assert z_c.grad is not None

    dy = (y + bias * rows).detach().cos()
    given = {"column_group": group, "transposed": transposed}
    w, b = ops.gated_weight(weight, bias, *logits, **options, **given)
    torch.testing.assert_close(w, gated.detach())
    assert b is not None
    sides = ((dy, y.detach() + b, z_r, 1), (x, dy @ (w.T if transposed else w), z_c, group))
    for stream, (left, right, z, shared) in enumerate(sides):
        found = ops.gate_gradient(left, right, logits[stream], **options, stream=stream, group=shared)
        open_ = z.detach() > 0
        torch.testing.assert_close(found[1][open_], z.grad[open_])
        assert (found[1][~open_] == 0).all()
        torch.testing.assert_close(found[0], z.grad * drawn[stream][1])
        if stream == 0:
            torch.testing.assert_close(found[2], bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP64], ids=str)
@each_backend
def test_columns_come_back_with_their_bits(dtype: torch.dtype, name: str, device: torch.device) -> None:
    """Whatever they hold: payloads of NaN survive, and the zeros between are +0."""
    skip_unless_present("put_columns", name, device)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.randint(torch.iinfo(integers).min, torch.iinfo(integers).max, (9, 203), dtype=integers, device=device)
    columns = (torch.rand(300, device=device) < 0.7).nonzero().flatten()[:203]
    bits = bits[:, : len(columns)]
    wide = ops.put_columns(bits.view(dtype), columns, 300, backend=name)
    assert torch.equal(wide.view(integers)[:, columns], bits)
    assert int((wide.view(integers) != 0).sum()) == int((bits != 0).sum())
    assert torch.equal(ops.take_columns(wide, columns, backend=name).view(integers), bits)


@pytest.mark.parametrize("columns", [[3, 1, 5], [1, 3, 3], [2, 9, 4]])
def test_the_cpu_kernel_refuses_columns_out_of_order(columns: list[int], device: torch.device) -> None:
    skip_unless_present("take_columns", "native", device)
    if device.type != "cpu":
        pytest.skip("a GPU does not look")
    with pytest.raises(RuntimeError, match=r"sorted and unique|out of range"):
        ops.take_columns(torch.zeros(2, 7), torch.tensor(columns), backend="native")
    with pytest.raises(RuntimeError, match=r"sorted and unique|out of range"):
        ops.put_columns(torch.zeros(2, 3), torch.tensor(columns), 7, backend="native")
