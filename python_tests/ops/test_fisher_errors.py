"""What the fisher ops refuse, on every backend alike, and that both sums are then as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekernels import Index, ops
from sparsekernels.ops import backend

B, S, M, N = 2, 3, 4, 5


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def index(*shape: int, rows: bool = False) -> Index:
    return Index(torch.tensor([1]), shape, "row" if rows else "element")


def linear(**other: Any) -> dict[str, Any]:
    return {"grad_output": x(B, S, M), "input": x(B, S, N), "total": x(M, N), "norms": x(B), **other}


def embedding(**other: Any) -> dict[str, Any]:
    made = {"grad_output": x(B, S, N), "ids": torch.zeros(B, S).long(), "total": x(M, N), "norms": x(B)}
    return {**made, **other}


def vector(**other: Any) -> dict[str, Any]:
    return {"grad_output": x(B, S, M), "input": x(B, S, M), "total": x(M), "norms": x(B), **other}


BF16, FP64 = torch.bfloat16, torch.float64
LINEAR, EMBEDDING, VECTOR = (
    (ops.fisher_linear_, linear),
    (ops.fisher_embedding_, embedding),
    (ops.fisher_vector_, vector),
)
SHARED = {  # what all three refuse; `m` and `n` are the shape of the total
    "activation, dims": ({"grad_output": x(S, M)}, r"grad_output must be \[samples, tokens, width\].*\[3, 4\]"),
    "activation, integers": ({"grad_output": x(B, S, M).long()}, "grad_output must be fp32, fp64, bf16 or fp16"),
    "total, shape": ({"total": x(7)}, r"total must be.* of shape \[.*got.*\[7\]"),
    "total, bf16": ({"total": x(M, N, dtype=BF16)}, "total must be torch.float32.*got torch.bfloat16"),
    "total, fp64": ({"total": x(M, N, dtype=FP64)}, "total must be torch.float32.*got torch.float64"),
    "total, device": ({"total": torch.ones(M, N, device="meta")}, "total must be.*on cpu.*on meta"),
    "norms, shape": ({"norms": x(B + 1)}, r"norms must be.* of shape \[2\].*got.*\[3\]"),
    "norms, dims": ({"norms": x(B, 1)}, r"norms must be.* of shape \[2\].*got.*\[2, 1\]"),
    "norms, dtype": ({"norms": x(B, dtype=BF16)}, "norms must be torch.float32.*got torch.bfloat16"),
    "norms, strides": ({"norms": x(B, 2)[:, 0]}, r"norms must be contiguous, got strides \(2,\)"),
    "norms, autograd": ({"norms": x(B).requires_grad_()}, "norms requires grad.*detach"),
    "index, shape": ({"index": index(M, N + 1)}, r"index was made for shape \[4, 6\].*activations give \["),
    "index, device": ({"index": index(M, N).to("meta")}, "index is on meta, the activations on cpu"),
    "index, total": ({"index": index(M, N)}, r"total must be.* of shape \[1\], got|total must be.* of shape \[1\] on"),
}
OWN = {
    "input, dims": (*LINEAR, {"input": x(S, N)}, r"input must be \[samples, tokens, width\]"),
    "input, samples": (*LINEAR, {"input": x(B + 1, S, N)}, r"\[2, 3, 4\].*\[3, 3, 5\].*B and S"),
    "input, tokens": (*LINEAR, {"input": x(B, S + 1, N)}, r"\[2, 3, 4\].*\[2, 4, 5\].*B and S"),
    "input, dtype": (*LINEAR, {"input": x(B, S, N, dtype=BF16)}, "input is torch.bfloat16.*float32"),
    "input, device": (*LINEAR, {"input": x(B, S, N).to("meta")}, "input is.*on meta.*on cpu"),
    "input, integers": (*LINEAR, {"input": x(B, S, N).int()}, "input must be fp32, fp64, bf16 or fp16"),
    "total, strides": (*LINEAR, {"total": x(N, M).T}, "total must be contiguous"),
    "total, autograd": (*LINEAR, {"total": x(M, N).requires_grad_()}, "total requires grad.*detach"),
    "index of rows": (*LINEAR, {"index": index(M, N, rows=True)}, r"total must be.* of shape \[1, 5\]"),
    "norms alone": (*LINEAR, {"total": None, "norms": x(B + 1)}, r"norms must be.* of shape \[2\]"),
    "fp64": (
        *LINEAR,
        {"grad_output": x(B, S, M, dtype=FP64), "input": x(B, S, N, dtype=FP64)},
        "must be torch.float64",
    ),
    "ids, dtype": (*EMBEDDING, {"ids": x(B, S)}, r"ids must be int32 or int64 of shape \[2, 3\], got torch.float32"),
    "ids, shape": (*EMBEDDING, {"ids": torch.zeros(B * S).long()}, r"ids must be.*of shape \[2, 3\], got.*\[6\]"),
    "ids, tokens": (*EMBEDDING, {"ids": torch.zeros(B, S + 1).long()}, r"ids must be.*\[2, 3\], got.*\[2, 4\]"),
    "ids, device": (*EMBEDDING, {"ids": torch.zeros(B, S).long().to("meta")}, "ids are on meta, grad_output on cpu"),
    "width": (*EMBEDDING, {"total": x(M, N + 1)}, r"total must be.* of shape \[4, 5\].*got.*\[4, 6\]"),
    "vector, input": (*VECTOR, {"input": x(B, S, M + 1)}, r"input must have the shape of grad_output, \[2, 3, 4\]"),
    "vector, input dims": (*VECTOR, {"input": x(S, M)}, r"input must be \[samples, tokens, width\]"),
    "vector, input dtype": (*VECTOR, {"input": x(B, S, M, dtype=FP64)}, "input is torch.float64.*float32"),
    "vector, index": (*VECTOR, {"index": index(M + 1), "total": x(1)}, r"index was made for shape \[5\]"),
    "bias": (*VECTOR, {"input": None, "total": x(M + 1)}, r"total must be.* of shape \[4\]"),
}
CASES: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]], dict[str, Any], str]] = {
    **{f"{call.__name__}: {name}": (call, make, other, words)
       for call, make in (LINEAR, EMBEDDING)
       for name, (other, words) in SHARED.items()},
    **{f"{call.__name__}: {name}": (call, make, other, words) for name, (call, make, other, words) in OWN.items()},
    **{f"fisher_vector_: {name}": (*VECTOR, other, words)
       for name, (other, words) in SHARED.items()
       if "index" not in name},
}  # fmt: skip
each_backend = pytest.mark.parametrize("name", ["reference", "triton", "native", None])


def skip_unless_present(op: str, name: Any) -> None:
    if name is not None and (reason := backend.why_not(op, name, "cpu")):
        pytest.skip(reason)


def tensors(arguments: dict[str, Any]) -> list[Tensor]:
    return [a for a in arguments.values() if isinstance(a, Tensor) and a.device.type == "cpu"]


@each_backend
@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, name: Any) -> None:
    call, make, other, words = CASES[case]
    skip_unless_present(call.__name__, name)
    arguments = make(**other)
    before = [a.detach().clone() for a in tensors(arguments)]
    with pytest.raises(ValueError, match=words):
        call(**arguments, backend=name)
    assert all(torch.equal(a, b) for a, b in zip(tensors(arguments), before, strict=True))


@each_backend
@pytest.mark.parametrize("made", [LINEAR, EMBEDDING, VECTOR], ids=lambda made: made[0].__name__)
def test_what_the_cases_start_from_is_right(made: Any, name: Any) -> None:
    """Without this, a case could be refused for another fault than its own."""
    call, make = made
    skip_unless_present(call.__name__, name)
    arguments = make()
    call(**arguments, backend=name)
    assert (arguments["norms"] > 1).all()
    assert (arguments["total"] > 1).any()


SQUARES: dict[str, tuple[Callable[[], tuple[list[Tensor], list[Tensor]]], str]] = {
    "too many totals": (lambda: ([x(2), x(3)], [x(2)]), "totals has 2 tensors, grads 1"),
    "too many gradients": (lambda: ([x(2)], [x(2), x(3)]), "totals has 1 tensors, grads 2"),
    "no gradients": (lambda: ([x(2)], []), "totals has 1 tensors, grads 0"),
    "shape": (lambda: ([x(2), x(3)], [x(2), x(4)]), r"totals\[1\] must be.*of shape \[4\].*got.*\[3\]"),
    "broadcast": (lambda: ([x(2, 3)], [x(3)]), r"totals\[0\] must be.*of shape \[3\].*got.*\[2, 3\]"),
    "integers": (lambda: ([x(2)], [x(2).long()]), r"grads\[0\] must be fp32, fp64, bf16 or fp16"),
    "mixed dtypes": (lambda: ([x(2), x(2)], [x(2), x(2, dtype=BF16)]), r"grads\[1\] is torch.bfloat16.*torch.float32"),
    "mixed devices": (lambda: ([x(2), x(2)], [x(2), x(2).to("meta")]), r"grads\[1\] is.*on meta.*on cpu"),
    "half totals": (lambda: ([x(2), x(2, dtype=BF16)], [x(2, dtype=BF16)] * 2), r"totals\[1\] must be torch.float32"),
    "double gradients": (lambda: ([x(2)], [x(2, dtype=FP64)]), r"totals\[0\] must be torch.float64"),
    "device": (lambda: ([x(2), x(2).to("meta")], [x(2), x(2)]), r"totals\[1\] must be.*on cpu.*on meta"),
    "strides": (lambda: ([x(2), x(3, 2).T], [x(2), x(2, 3)]), r"totals\[1\] must be contiguous"),
    "autograd": (lambda: ([x(2), x(2).requires_grad_()], [x(2), x(2)]), r"totals\[1\] requires grad.*detach"),
}


@each_backend
@pytest.mark.parametrize("case", SQUARES)
def test_squares_refused(case: str, name: Any) -> None:
    """Whatever is wrong with the last tensor, the first is not written either."""
    skip_unless_present("fisher_squares_", name)
    make, words = SQUARES[case]
    totals, grads = make()
    with pytest.raises(ValueError, match=words):
        ops.fisher_squares_(totals, grads, backend=name)
    assert all(bool((total == 1).all()) for total in totals if total.device.type == "cpu")


@each_backend
@pytest.mark.parametrize("made", [LINEAR, EMBEDDING, VECTOR], ids=lambda made: made[0].__name__)
def test_nothing_is_wanted(made: Any, name: Any) -> None:
    call, make = made
    skip_unless_present(call.__name__, name)
    assert call(**make(total=None, norms=None), backend=name) is None
    with pytest.raises(ValueError, match="was made for"):
        call(**make(total=None, norms=None, index=index(9, 9)), backend=name)


@each_backend
def test_sums_stay_out_of_autograd(name: Any) -> None:
    """Activations of a layer in the middle of a model require grad; what is added up from them does not."""
    for call, make in (LINEAR, EMBEDDING, VECTOR):
        skip_unless_present(call.__name__, name)
        arguments = make()
        for a in (arguments["grad_output"], arguments.get("input")):
            if a is not None:
                a.requires_grad_()
        call(**arguments, backend=name)
        assert not arguments["total"].requires_grad
        assert not arguments["norms"].requires_grad
    total = x(2)
    ops.fisher_squares_([total], [x(2).requires_grad_()], backend=name)
    assert not total.requires_grad


@each_backend
def test_autograd_learns_of_the_write(name: Any) -> None:
    """A total that a backward needs is known to have changed since."""
    for call, make in (LINEAR, EMBEDDING, VECTOR):
        skip_unless_present(call.__name__, name)
        arguments = make()
        weight = torch.ones((), requires_grad=True)
        for wanted in ("total", "norms"):
            product = (weight * arguments[wanted]).sum()
            call(**arguments, backend=name)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()
