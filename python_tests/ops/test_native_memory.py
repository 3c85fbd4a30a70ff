"""The native CPU ops touch no memory but that of their arguments, whatever these say; refused calls change nothing.

`make fuzz` looks for more of the kind, under sanitizers. Here tensors lie within larger ones, and what would end a
process does so in another.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_another_process, uses_processes
from samples import all_samples
from torch import Tensor

from sparsekernels.ops import OPS, backend

RAW = torch.ops.sparsekernels
NAMES = ("positions", "columns")
OTHERS = ("gated_weight", "masked_grad_embedding", "fisher_embedding_")  # whose columns are gates; lookups, see below
POSITIONS = {  # op -> which of its arguments are positions
    op.name: at
    for op in OPS
    for at, argument in enumerate(getattr(RAW, op.name).default._schema.arguments)
    if argument.name in NAMES and op.name not in OTHERS
}
SAMPLES = all_samples()

pytestmark = pytest.mark.skipif(not backend.has_native("gather", "cpu"), reason="there is no native CPU library")


def case_with_positions(op: str) -> tuple[tuple[Any, ...], Tensor, list[tuple[Tensor, Tensor]]]:
    """Raw arguments of a sample with a few positions, these, and the buffers of all tensors."""
    for sample in SAMPLES[op]:
        if sample.heavy:
            continue
        case = sample.case(torch.device("cpu"))
        found = case.raw[POSITIONS[op]]
        positions = found[-1] if isinstance(found, list) and found else found
        if isinstance(positions, Tensor) and 3 <= positions.numel() < 1000:
            return case.raw, positions, case.buffers
    raise AssertionError(f"no sample of {op} has three positions")


@pytest.mark.parametrize("how", ["above the last", "negative", "unsorted", "twice"])
@pytest.mark.parametrize("op", POSITIONS)
def test_inner_positions_are_checked(op: str, how: str) -> None:
    raw, positions, buffers = case_with_positions(op)
    if how == "above the last":
        positions[1] = positions[-1] + 1
    elif how == "negative":
        positions[1] = -1
    elif how == "unsorted":
        positions[:2] = positions[:2].flip(0)
    else:
        positions[1] = positions[0]
    before = [buffer.clone() for buffer, _ in buffers]
    with pytest.raises(RuntimeError, match="positions must be sorted and unique"):
        getattr(RAW, op)(*raw)
    for (buffer, _), was in zip(buffers, before, strict=True):
        assert torch.equal(buffer.view(torch.uint8), was.view(torch.uint8))


@pytest.mark.parametrize("positions", [[0, 5, 4, 9], [0, 5, 5, 9], [0, 5, 700, 6, 9], [0, 5, 6, -700, 9]])
def test_lookups_check_the_positions_that_they_read(positions: list[int]) -> None:
    """Those of the rows that are looked up: bisection finds them, and does not look at the others."""
    index, ids = torch.tensor(positions), torch.tensor([1, 1])
    with pytest.raises(RuntimeError, match="positions must be sorted and unique"):
        RAW.masked_grad_embedding(torch.ones(2, 4), ids, index, [1, 1], -1)
    total = torch.zeros(len(positions))
    with pytest.raises(RuntimeError, match="positions must be sorted and unique"):
        RAW.fisher_embedding_(torch.ones(1, 2, 4), ids[None], total, None, index, False, -1)
    assert not total.any()


@pytest.fixture
def around() -> Tensor:
    """Memory of which ops are given entries 1000 to 1099."""
    return torch.arange(4096, dtype=torch.float32)


@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
@pytest.mark.parametrize("positions", [[0, 700, 5], [0, -700, 5], [-1, 3, 5], [0, 3, 100], [100], [-1]])
def test_gather_reads_no_further(around: Tensor, positions: list[int], wide: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="positions"):
        RAW.gather(around[1000:1100], torch.tensor(positions, dtype=wide), [1, 1])
    with pytest.raises(RuntimeError, match="positions"):
        RAW.gather(around[1000:1100].view(1, 100), torch.tensor(positions, dtype=wide), [1, 1])
    for shape, tile in (((100, 10), [1, 10]), ((10, 100), [10, 1]), ((100, 20), [10, 2])):  # 100 units each
        with pytest.raises(RuntimeError, match="positions"):
            RAW.gather(around[1000 : 1000 + shape[0] * shape[1]].view(shape), torch.tensor(positions, dtype=wide), tile)


@pytest.mark.parametrize("positions", [[0, 700, 5], [0, -700, 5], [-1, 3, 5], [0, 3, 100]])
def test_scatter_writes_no_further(around: Tensor, positions: list[int]) -> None:
    with pytest.raises(RuntimeError, match="positions"):
        RAW.scatter_(around[1000:1100], torch.tensor(positions), torch.ones(3), [1, 1])
    assert torch.equal(around, torch.arange(4096.0))


def test_many_positions_are_checked_by_several_threads() -> None:
    """The one that is wrong lies where two of them meet, or at an end."""
    count = 1 << 18
    source = torch.zeros(4 * count)
    torch.set_num_threads(2)
    try:
        for place in (1, count // 2 - 1, count // 2, count // 2 + 1, count - 1):
            positions = torch.arange(0, 4 * count, 4, dtype=torch.int32)
            positions[place] = positions[place - 1]
            with pytest.raises(RuntimeError, match="sorted and unique"):
                RAW.gather(source, positions, [1, 1])
    finally:
        torch.set_num_threads(1)


def test_positions_that_the_call_itself_changes() -> None:
    """Whatever was checked before, the first write makes the second position another one."""
    around = torch.zeros(4096, dtype=torch.int64)
    target = around[1000:1010]
    target.copy_(torch.arange(1, 11))
    before = around.clone()
    with pytest.raises(RuntimeError, match="share memory"):
        RAW.scatter_(target, target[:9], torch.full((9,), 700), [1, 1])
    assert torch.equal(around, before)


def test_slots_that_the_call_itself_changes() -> None:
    param, ids = torch.zeros(4, 1), torch.tensor([0, 2])
    state = [torch.zeros(4, 1), torch.zeros(4, 1)]
    with pytest.raises(RuntimeError, match="slots must not share memory"):
        RAW.adamw_rows_(
            param, torch.ones(2, 1), ids, param.view(torch.int32).view(-1), *state, None, torch.ones(1, 2),
            0.9, 0.999, 1e-8, False, [],
        )  # fmt: skip
    assert not param.any()


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


def test_storage_that_is_too_small() -> None:
    """A tensor says a size that its storage does not have any more."""
    index = torch.tensor([0, 1, 99])
    with pytest.raises(RuntimeError, match="source has no memory"):
        RAW.gather(freed(torch.zeros(100)), index, [1, 1])
    with pytest.raises(RuntimeError, match="target has no memory"):
        RAW.scatter_(freed(torch.zeros(100)), index, torch.ones(3), [1, 1])
    with pytest.raises(RuntimeError, match="positions has no memory"):
        RAW.gather(torch.zeros(100), freed(index), [1, 1])
    with pytest.raises(RuntimeError, match="x has no memory"):
        RAW.take_columns(freed(torch.zeros(10, 10)[:, :5]), torch.tensor([0, 1]))


CRASHES = {
    "positions in the moments of another parameter": (
        "adamw_([ones(4), ones(4)], [ones(4), ones(4)], [m := zeros(8), ones(8)][:1] and [m[2:6], ones(4)], "
        "[ones(4), ones(4)], [], [tensor(1.0)] * 2, [arange(4), m.view(torch.int32)[:4].copy_(arange(4))], "
        "[ones(9), ones(9)], [1, 1] * 2, 0.1, 0.9, 0.999, 0.0, 1e-8, False)"
    ),
    "blocks higher than a number": "gather(zeros(4, 4), arange(2), [2**62, 2**62])",
    "blocks of nothing": "gather(zeros(4, 4), arange(2), [0, 1])",
    "negative blocks": "scatter_(zeros(4, 4), arange(2), ones(2), [-1, -1])",
    "a tile of one number": "gather(zeros(4, 4), arange(2), [1])",
    "negative ids of blocks": "masked_grad_embedding(ones(3, 4), tensor([-1, -5, 2]), arange(2), [4, 2], -100)",
    "an embedding without columns": "masked_grad_embedding(zeros(3, 0), arange(3), arange(2), [1, 1], -1)",
    "group times gates is 2**64 + 4, of a gradient": (
        "gate_gradient(zeros(5, 4), zeros(5, 4), zeros(4), 0, 0.5, None, 0, 2**62 + 1)"
    ),
    "group times gates is 2**64 + 4, of a weight": (
        "gated_weight(zeros(3, 4), None, None, zeros(4), 0, 0.5, None, False, torch.float32, 2**62 + 1)"
    ),
    "rows beyond number": (
        "adamw_rows_(zeros(2**62, 0), zeros(2, 0), tensor([3, 1]), None, zeros(2**62, 0), zeros(2**62, 0), None, "
        "ones(1, 2), 0.9, 0.999, 1e-8, False, [])"
    ),
}


def make_calls(seen: Path) -> None:
    names = {"torch": torch, **{name: getattr(torch, name) for name in ("arange", "ones", "tensor", "zeros")}}
    for call in CRASHES.values():
        seen.write_text(call)
        with contextlib.suppress(RuntimeError):
            eval(f"torch.ops.sparsekernels.{call}", names)
    seen.write_text("the end")


@uses_processes
def test_calls_that_ended_the_process(tmp_path: Path) -> None:
    """One process for all of them: each must raise, or return."""
    try:
        in_another_process(make_calls, tmp_path / "seen")
    finally:
        assert (tmp_path / "seen").read_text() == "the end"
