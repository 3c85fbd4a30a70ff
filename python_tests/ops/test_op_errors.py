"""What the public op functions refuse, on every backend alike, and that nothing was written when they did."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from sparsekernels import Index, ops
from sparsekernels.ops import backend


def index(*positions: int, shape: tuple[int, ...] = (4, 3), rows: bool = False) -> Index:
    return Index(torch.tensor(positions, dtype=torch.int64), shape, "row" if rows else "element")


def dense(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape or (4, 3), dtype=dtype)


ONES = torch.ones
STG: dict[str, Any] = {"kind": "stg", "noise": 0.5}
CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple], str]] = {
    "gather, shape": (ops.gather, lambda: (dense(3, 4), index(1)), r"source has shape \[3, 4\].*made for \[4, 3\]"),
    "gather, strides": (ops.gather, lambda: (dense(3, 4).T, index(1)), "source must be contiguous"),
    "scatter_, shape": (ops.scatter_, lambda: (dense(5), index(1), ONES(1)), r"target has shape \[5\]"),
    "scatter_, strides": (ops.scatter_, lambda: (dense(3, 4).T, index(1), ONES(1)), "target must be contiguous"),
    "scatter_, values": (
        ops.scatter_,
        lambda: (dense(), index(1, 2), ONES(3)),
        r"values must have shape \[2\], got \[3\]",
    ),
    "scatter_, rows": (
        ops.scatter_,
        lambda: (dense(), index(1, rows=True), ONES(3)),
        r"values must have shape \[1, 3\], got \[3\]",
    ),
    "linear, weight": (
        ops.masked_grad_linear,
        lambda: (dense(7, 4), dense(7, 2), index(1)),
        r"\[4, 2\].*made for \[4, 3\]",
    ),
    "linear, tokens": (ops.masked_grad_linear, lambda: (dense(7, 4), dense(6, 3), index(1)), r"\[7, 4\].*\[6, 3\]"),
    "linear, dtypes": (
        ops.masked_grad_linear,
        lambda: (dense(7, 4), dense(7, 3, dtype=torch.bfloat16), index(1)),
        "float32.*bfloat16",
    ),
    "linear, integers": (
        ops.masked_grad_linear,
        lambda: (dense(7, 4, dtype=torch.int64), dense(7, 3, dtype=torch.int64), index(1)),
        "must be fp32, fp64, bf16 or fp16",
    ),
    "embedding, width": (ops.masked_grad_embedding, lambda: (dense(7, 2), ONES(7).long(), index(1)), r"7 tokens.*3"),
    "embedding, tokens": (ops.masked_grad_embedding, lambda: (dense(6, 3), ONES(7).long(), index(1)), r"7 tokens"),
    "embedding, ids": (
        ops.masked_grad_embedding,
        lambda: (dense(7, 3), ONES(7), index(1)),
        "ids must be int32 or int64",
    ),
    "topk, nothing": (ops.topk, lambda: ([], 1), "at least one tensor"),
    "topk, k = 0": (ops.topk, lambda: ([dense()], 0), r"k must lie in \[1, 12\], got 0"),
    "topk, k": (ops.topk, lambda: ([dense(), dense(2)], 15), r"k must lie in \[1, 14\], got 15"),
    "topk, dtypes": (ops.topk, lambda: ([dense(), dense(2).double()], 1), r"scores\[0\] is torch.float32.*scores\[1\]"),
    "topk, integers": (ops.topk, lambda: ([dense().long()], 1), "floating point"),
    "topk, NaN": (ops.topk, lambda: ([dense(), torch.tensor([1.0, float("nan")])], 1), r"NaN.*1|1.*NaN"),
    "gate_values, kind": (
        partial(ops.gate_values, kind="beta", noise=1.0),  # type: ignore[arg-type]
        lambda: (ONES(3),),
        "kind must be one of",
    ),
    "gate_values, noise": (
        partial(ops.gate_values, kind="stg", noise=0.0),
        lambda: (ONES(3),),
        "above 0, got 0.0; for no noise leave key at None",
    ),
    "gate_values, key": (
        partial(ops.gate_values, **STG, key=ONES(1)),
        lambda: (ONES(3),),
        r"key must be int64 of shape \[1\]",
    ),
    "gate_values, stream": (partial(ops.gate_values, **STG, stream=-1), lambda: (ONES(3),), "stream must lie in"),
    "gate_values, dtype": (
        partial(ops.gate_values, **STG),
        lambda: (dense(3, dtype=torch.bfloat16),),
        "logits must be fp32 or fp64",
    ),
    "gate_probabilities, none": (
        partial(ops.gate_probabilities, **STG),
        lambda: ([],),
        "pass at least one vector",
    ),
    "gate_probabilities, dtypes": (
        partial(ops.gate_probabilities, **STG),
        lambda: ([ONES(3), ONES(3).double()],),
        r"logits\[1\] is torch.float64",
    ),
    "gated_weight, rows": (
        partial(ops.gated_weight, **STG),
        lambda: (dense(), None, ONES(3)),
        "rows has 3 gates of 1 each for 4.*expected 4",
    ),
    "gated_weight, group": (
        partial(ops.gated_weight, **STG, column_group=2),
        lambda: (dense(), None, None, ONES(1)),
        "2 does not divide 3",
    ),
    "gated_weight, bias": (
        partial(ops.gated_weight, **STG),
        lambda: (dense(), ONES(3)),
        r"bias must have shape \[4\]",
    ),
    "gated_weight, fp64": (
        partial(ops.gated_weight, **STG),
        lambda: (dense(dtype=torch.float64), None, ONES(4)),
        "rows is torch.float32.*expected torch.float64",
    ),
    "gate_gradient, shapes": (
        partial(ops.gate_gradient, **STG),
        lambda: (dense(5, 3), dense(4, 3), ONES(3)),
        r"b is \[4, 3\].*a is \[5, 3\]",
    ),
    "gate_gradient, gates": (
        partial(ops.gate_gradient, **STG),
        lambda: (dense(5, 3), dense(5, 3), ONES(2)),
        "logits has 2 gates of 1 each for 3",
    ),
    "take_columns, range": (ops.take_columns, lambda: (dense(), torch.tensor([1, 3])), r"lie in \[0, 3\), got 1 to 3"),
    "take_columns, dtype": (ops.take_columns, lambda: (dense(), ONES(2)), "columns must be int32 or int64"),
    "put_columns, count": (ops.put_columns, lambda: (dense(), torch.tensor([1, 2]), 5), "x has 3 columns.*2 entries"),
    "put_columns, width": (ops.put_columns, lambda: (dense(), torch.tensor([0, 1, 2]), -1), "width must be at least 0"),
}


@pytest.mark.parametrize("name", ["reference", "triton", "native", None])
@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, name: str | None) -> None:
    call, make, words = CASES[case]
    if name is not None and (reason := backend.why_not(getattr(call, "func", call).__name__, name, "cpu")):
        pytest.skip(reason)
    args = make()
    before = [x.clone() for x in args if isinstance(x, torch.Tensor)]
    with pytest.raises(ValueError, match=words):
        call(*args, backend=name)
    assert all(torch.equal(a, b) for a, b in zip(before, (x for x in args if isinstance(x, torch.Tensor)), strict=True))


@pytest.mark.parametrize("name", ["reference", "triton", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("k", [1, 100])
def test_topk_sees_every_nan(name: str, dtype: torch.dtype, magnitude: bool, k: int) -> None:
    """At any place, of either sign, among those that are chosen or not."""
    if reason := backend.why_not("topk", name, "cpu"):
        pytest.skip(reason)
    for place in (0, 63, 99):
        for sign in (1.0, -1.0):
            scores = torch.randn(100).to(dtype)
            scores[place] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
            with pytest.raises(ValueError, match="NaN"):
                ops.topk([scores[:50], scores[50:]], k, magnitude=magnitude, backend=name)


ADAMW = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}


def lists(n: int, k: int = 2) -> list[list[torch.Tensor]]:
    """params, grads, moments, steps, positions and weights of adamw_ for `n` tensors."""
    floats = [[torch.ones(k) for _ in range(n)] for _ in range(4)]
    positions = [torch.arange(k, dtype=torch.int32) for _ in range(n)]
    return [*floats, [], [torch.tensor(1.0) for _ in range(n)], positions, [torch.ones(5) for _ in range(n)]]


@pytest.mark.parametrize("broken", range(8))
def test_adamw_lists_that_do_not_fit(broken: int) -> None:
    """One entry too few in one of the lists: refused before anything is written."""
    args = lists(2)
    args[broken] = [torch.ones(2)] if broken == 4 else args[broken][:1]
    before = [[x.clone() for x in entries] for entries in args]
    with pytest.raises(RuntimeError):
        ops.adamw_(*args, **ADAMW)
    for entries, was in zip(args, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(entries, was, strict=True))


@pytest.mark.parametrize("bad", ["out of range", "negative", "state", "gradient dtype"])
def test_adamw_never_writes_outside(bad: str) -> None:
    """The raw op, which trusts no argument."""
    args = lists(1)
    if bad in ("out of range", "negative"):
        args[6] = [torch.tensor([0, 5] if bad == "out of range" else [-1, 2])]
    elif bad == "state":
        args[2] = [torch.ones(1)]
    else:
        args[1] = [torch.ones(2, dtype=torch.float64)]
    before = [[x.clone() for x in entries] for entries in args]
    with pytest.raises((RuntimeError, IndexError)):
        ops.adamw_(*args, **ADAMW)
    assert torch.equal(args[7][0], before[7][0])
