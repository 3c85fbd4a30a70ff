"""Gradients of singular values: against autograd, on either way through the native op, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples.singular_values import FEW, MANY
from torch import Tensor

from sparsekernels.ops import backend, singular_value_grad, singular_value_grad_linear
from sparsekernels.ops.singular_values import reference

FP64, BF16 = torch.float64, torch.bfloat16
BACKENDS = ("reference", "triton", "native")
each_backend = pytest.mark.parametrize("name", BACKENDS)
# Tokens, samples, rows and columns of the weight: way below their number of vectors, about as many, and far above.
LAYERS = [
    (b, s, m, n) for b, s in ((1, 1), (2, 9), (5, 40), (3, 200)) for m, n in ((24, 24), (17, 33), (65, 30), (128, 200))
]


def skip_unless_present(op: str, name: Any, device: torch.device) -> None:
    if name is not None and (reason := backend.why_not(op, name, device.type)):
        pytest.skip(reason)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.cpu().double() - expected).norm() / expected.norm())


def trained_layer(b: int, s: int, m: int, n: int) -> tuple[Tensor, ...]:
    """Activations, their gradients and factors of a Linear among others, and each sample's d loss / d sigma; fp64."""
    u, sigma, vh = torch.linalg.svd(torch.randn(m, n, dtype=FP64), full_matrices=False)
    head = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(m, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).double()
    input = torch.randn(b, s, n, dtype=FP64).tanh()
    own = sigma.repeat(b, 1).requires_grad_()  # a sigma for each sample, so that each gets its own gradient
    output = torch.stack(
        [torch.nn.functional.linear(x, u @ torch.diag(each) @ vh) for x, each in zip(input, own, strict=True)]
    )
    output.retain_grad()
    labels = torch.randint(0, 3, (b * s,))
    torch.nn.functional.cross_entropy(head(output).flatten(0, 1), labels, reduction="sum").backward()
    assert output.grad is not None
    assert own.grad is not None
    return output.grad, input, u, vh.T, own.grad


@each_backend
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_is_the_gradient_of_autograd(layer: tuple[int, ...], name: str, device: torch.device) -> None:
    """Of a Linear whose weight is U diag(sigma) V^T, by fp64 autograd: for the batch, each sample, and the weight."""
    for op in ("singular_value_grad", "singular_value_grad_linear"):
        skip_unless_present(op, name, device)
    dy, x, u, v, expected = trained_layer(*layer)
    factors = [t.float().to(device) for t in (dy, x, u, v)]
    found = singular_value_grad_linear(*factors, backend=name)
    by_sample = singular_value_grad_linear(*factors, per_sample=True, backend=name)
    weight = torch.einsum("bsm,bsn->bmn", dy, x).float().to(device)
    by_weight = singular_value_grad(
        weight, factors[2].expand(len(weight), -1, -1), factors[3].expand(len(weight), -1, -1), backend=name
    )
    assert relative_error(found, expected.sum(0)) < 1e-5
    assert relative_error(by_sample, expected) < 1e-5
    assert relative_error(by_weight, expected) < 1e-5


@pytest.mark.parametrize("layer", [(2, 300, 301, 299), (1, 900, 150, 400)], ids=str)
def test_large_layers_by_autograd(layer: tuple[int, ...]) -> None:
    """Where the CPU makes strips of the weight's gradient, upright and lying, of several blocks of tokens."""
    b, s, m, n = layer
    assert b * s * min(m, n) * (m + n) > m * n * (b * s + min(m, n)), "the projections would be cheaper"
    dy, x, u, v, expected = trained_layer(*layer)
    found = singular_value_grad_linear(dy.float(), x.float(), u.float(), v.float())
    assert relative_error(found, expected.sum(0)) < 1e-5


def test_samples_need_both_ways() -> None:
    """The sizes that samples call FEW and MANY lie on either side of where the native op changes its way."""
    for (m, n, r), gradient_is_cheaper in ((FEW, False), (MANY, True)):
        for tokens in (70, 99, 600):
            assert (tokens * r * (m + n) > m * n * (tokens + r)) == gradient_is_cheaper


@pytest.mark.parametrize("dtype", [torch.float32, FP64, BF16], ids=str)
@pytest.mark.parametrize(
    ("b", "s", "m", "n", "r"),
    [(3, 700, 90, 200, 60), (3, 700, 90, 200, 20), (3, 700, 200, 90, 90), (300, 3, 50, 60, 700), (2, 20_000, 9, 8, 8)],
)
def test_same_bits_on_any_number_of_threads(b: int, s: int, m: int, n: int, r: int, dtype: torch.dtype) -> None:
    dy, x = torch.randn(b, s, m).to(dtype), torch.randn(b, s, n).to(dtype)
    u, v = (torch.randn(width, r, dtype=torch.promote_types(dtype, torch.float32)) for width in (m, n))
    grads = torch.randn(3, m, n).to(dtype)
    calls = {
        "whole": lambda: singular_value_grad_linear(dy, x, u, v),
        "per sample": lambda: singular_value_grad_linear(dy, x, u, v, per_sample=True),
        "matrices": lambda: singular_value_grad(grads, u.expand(3, m, r), v.expand(3, n, r)),
    }
    for what, call in calls.items():
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                found += [call(), call()]
            finally:
                torch.set_num_threads(1)
        assert all(torch.equal(found[0], other) for other in found[1:]), what


@each_backend
def test_samples_sum_to_the_whole(name: str, device: torch.device) -> None:
    skip_unless_present("singular_value_grad_linear", name, device)
    dy, x, u, v = (torch.randn(shape, dtype=FP64, device=device) for shape in ((4, 9, 8), (4, 9, 7), (8, 5), (7, 5)))
    whole = singular_value_grad_linear(dy, x, u, v, backend=name)
    by_sample = singular_value_grad_linear(dy, x, u, v, per_sample=True, backend=name)
    torch.testing.assert_close(by_sample.sum(0), whole)
    flat = singular_value_grad_linear(dy.flatten(0, 1), x.flatten(0, 1), u, v, backend=name)
    assert torch.equal(flat, whole)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # by the interpreter: it is not used
@each_backend
def test_infinite_vectors(name: str, device: torch.device) -> None:
    """What fills a block up has no product: 0 times infinity would be NaN. Three tokens, five rows."""
    for op in ("singular_value_grad", "singular_value_grad_linear"):
        skip_unless_present(op, name, device)
    u, v = torch.ones(5, 2), torch.ones(4, 2)
    u[:, 1] = float("inf")
    expected = torch.tensor([60.0, float("inf")])
    found = singular_value_grad_linear(
        torch.ones(1, 3, 5).to(device), torch.ones(1, 3, 4).to(device), u.to(device), v.to(device),
        per_sample=True, backend=name,
    )  # fmt: skip
    assert torch.equal(found.cpu(), expected[None])
    found = singular_value_grad(3 * torch.ones(5, 4).to(device), u.to(device), v.to(device), backend=name)
    assert torch.equal(found.cpu(), expected)


def test_factors_of_a_trained_weight() -> None:
    """They require grad; the result is plain numbers."""
    u, v = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    input = torch.randn(6, 5, requires_grad=True)
    assert not singular_value_grad_linear(torch.randn(6, 4), input, u, v).requires_grad
    assert not singular_value_grad(torch.randn(4, 5, requires_grad=True), u, v).requires_grad


@pytest.mark.parametrize("per_sample", [False, True])
def test_reference_in_chunks(per_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    args = torch.randn(3, 21, 8), torch.randn(3, 21, 7), torch.randn(8, 5), torch.randn(7, 5)
    whole = reference.singular_value_grad_linear(*args, per_sample)
    monkeypatch.setattr(reference, "CHUNK", 10)
    torch.testing.assert_close(reference.singular_value_grad_linear(*args, per_sample), whole)


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


B, S, M, N, R = 2, 3, 4, 5, 6
WHOLE = {"grad": x(B, M, N), "u": x(B, M, R), "v": x(B, N, R)}
LINEAR = {"grad_output": x(B, S, M), "input": x(B, S, N), "u": x(M, R), "v": x(N, R)}
REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    f"{call.__name__}: {name}": (call, right, wrong, words)
    for call, right, cases in (
        (singular_value_grad, WHOLE, {
            "grad, integers": ({"grad": x(B, M, N).int()}, "grad must be fp32, fp64, bf16 or fp16, got torch.int32"),
            "grad, dims": ({"grad": x(N)}, r"grad must be \[L, M, N\], or \[M, N\] of one matrix.*\[5\]"),
            "u, matrices": ({"u": x(1, M, R)}, r"u must have shape \[2, 4, R\].*grad \[2, 4, 5\]; got \[1, 4, 6\]"),
            "u, rows": ({"u": x(B, N, R)}, r"u must have shape \[2, 4, R\].*got \[2, 5, 6\]"),
            "u, dims": ({"u": x(M, R)}, r"u must have shape \[2, 4, R\].*got \[4, 6\]"),
            "v, vectors": ({"v": x(B, N, R + 1)}, r"v must have shape \[2, 5, 6\].*grad \[2, 4, 5\] and u; got.*7\]"),
            "v, transposed": ({"v": x(B, R, N)}, r"v must have shape \[2, 5, 6\].*got \[2, 6, 5\]"),
            "u, dtype": ({"u": x(B, M, R, dtype=FP64)}, r"u is torch.float64.*pass u.to\(grad.device, torch.float32\)"),
            "v, half": ({"v": x(B, N, R, dtype=BF16)}, "v is torch.bfloat16.*expected torch.float32"),
            "of fp64": ({"grad": x(B, M, N, dtype=FP64)}, "u is torch.float32.*expected torch.float64"),
            "v, device": ({"v": x(B, N, R, device="meta")}, "v is.*on meta, expected.*on cpu"),
        }),
        (singular_value_grad_linear, LINEAR, {
            "grad_output, integers": ({"grad_output": x(B, S, M).int()}, "grad_output must be fp32.*got torch.int32"),
            "input, integers": ({"input": x(B, S, N).long()}, "input must be fp32.*got torch.int64"),
            "grad_output, dims": ({"grad_output": x(1, B, S, M)}, r"grad_output must be \[samples.*\[1, 2, 3, 4\]"),
            "input, dims": ({"input": x(B * S, N)}, r"grad_output is \[2, 3, 4\], input \[6, 5\].*must agree"),
            "input, tokens": ({"input": x(B, S + 1, N)}, r"grad_output is \[2, 3, 4\], input \[2, 4, 5\].*must agree"),
            "input, dtype": ({"input": x(B, S, N, dtype=BF16)}, "input is torch.bfloat16.*expected torch.float32"),
            "input, device": ({"input": x(B, S, N, device="meta")}, "input is.*on meta, expected.*on cpu"),
            "u, rows": ({"u": x(N, R)}, r"u must have shape \[4, R\].*grad_output \[2, 3, 4\]; got \[5, 6\]"),
            "v, rows": ({"v": x(M, R)}, r"v must have shape \[5, 6\].*input \[2, 3, 5\] and u; got \[4, 6\]"),
            "v, vectors": ({"v": x(N, R - 1)}, r"v must have shape \[5, 6\].*got \[5, 5\]"),
            "u, batched": ({"u": x(1, M, R)}, r"u must have shape \[4, R\].*got \[1, 4, 6\]"),
            "u, dtype": ({"u": x(M, R, dtype=FP64)}, r"pass u.to\(grad_output.device, torch.float32\)"),
            "v, dtype": ({"v": x(N, R, dtype=BF16)}, r"v is torch.bfloat16.*pass v.to\(input.device, torch.float32\)"),
            "per_sample, 2-D": (
                {"grad_output": x(S, M), "input": x(S, N), "per_sample": True},
                r"per_sample needs a grad_output of \[samples, tokens, width\], got shape \[3, 4\]",
            ),
        }),
    )
    for name, (wrong, words) in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("name", [*BACKENDS, None])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, name: str | None, device: torch.device) -> None:
    call, right, wrong, words = REFUSED[case]
    skip_unless_present(call.__name__, name, torch.device("cpu"))
    call(**right, backend=name)
    with pytest.raises(ValueError, match=words):
        call(**{**right, **wrong}, backend=name)


@pytest.mark.parametrize("broken", range(4))
def test_the_raw_op_never_reads_outside(broken: int) -> None:
    """It takes shapes on trust, but not sizes."""
    skip_unless_present("singular_value_grad_linear", "native", torch.device("cpu"))
    args = [x(B, S, M), x(B, S, N), x(M, R), x(N, R)]
    args[broken] = args[broken][..., :-1, :].contiguous()
    with pytest.raises(RuntimeError):
        torch.ops.sparsekernels.singular_value_grad_linear(*args, False)
    if broken:
        whole = [x(B, M, N), x(B, M, R), x(B, N, R)]
        whole[broken - 1] = whole[broken - 1][:, :-1].contiguous()
        with pytest.raises(RuntimeError):
            torch.ops.sparsekernels.singular_value_grad(*whole)
