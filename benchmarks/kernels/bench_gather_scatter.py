"""Reading and writing selected weights: gather and scatter_, beside torch's indexing.

torch offers two ways each: the index_* functions, and advanced indexing, which is what most code is written with. All
must give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sparsekernels as sk
from sparsekernels import ops

from ..timing import DEVICE
from .case import (
    BF16,
    FP32,
    Case,
    Contender,
    Floor,
    Problem,
    addressed,
    called,
    computing,
    each_backend,
    positions,
    random_elements,
    random_rows,
    sector_bytes,
    short,
    take,
    touched,
)

ALTERNATIVES = {
    "gather": ("torch.index_select", "t[idx]"),
    "scatter_": ("Tensor.index_copy_", "t[idx] = v"),
}


@dataclass
class Move(Problem):
    dense: Tensor
    index: sk.Index
    values: Tensor


@functools.lru_cache(maxsize=1)
def dense_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, device=DEVICE).to(dtype)


def make(op: str, shape: tuple[int, ...], select: Callable[[], sk.Index], dtype: torch.dtype) -> Move:
    dense = dense_tensor(shape, dtype)
    torch.manual_seed(1)
    index = select()
    values = torch.randn(index.compact_shape, device=DEVICE).to(dtype)
    selected = take(dense, index)
    expected = {"gather": selected, "scatter_": values}[op].double()
    compact = index.numel * dtype.itemsize + index.positions.numel() * index.positions.element_size()
    # Whole rows are written without being read first; a line with one written element is read, too.
    passes = 2 if op == "scatter_" and index.granularity == "element" else 1
    return Move(
        str(list(shape)),
        index.numel / dense.numel(),
        short(dtype),
        compact + passes * touched(index, dtype.itemsize),
        f"values + positions + {passes} x touched lines",
        [expected],
        dense,
        index,
        values,
    )


def writing(move: Move, write: Callable[[Tensor, Move], Any]) -> Contender:
    target = move.dense.clone()
    contender = Contender(lambda: write(target, move), lambda: [take(target, move.index)])
    contender.untouched = [(target, move.dense, move.index)]
    return contender


def by_torch(move: Move, op: str, how: str) -> Contender:
    """The view and the int64 positions are made once: they are no part of the work."""
    chosen, values = positions(move.index), move.values
    if op == "gather":
        source = addressed(move.dense, move.index)
        if how == "torch.index_select":
            return computing(lambda: torch.index_select(source, 0, chosen))
        return computing(lambda: source[chosen])
    target = move.dense.clone()
    view = addressed(target, move.index)
    calls: dict[str, Callable[[], Any]] = {
        "Tensor.index_copy_": lambda: view.index_copy_(0, chosen, values),
        "t[idx] = v": lambda: view.__setitem__(chosen, values),
    }
    untouched = [(target, move.dense, move.index)]
    return Contender(calls[how], lambda: [take(target, move.index)], untouched)


def by_op(move: Move, op: str, backend: Any) -> Contender:
    if op == "gather":
        return computing(lambda: ops.gather(move.dense, move.index, backend=backend))
    return writing(move, lambda target, m: ops.scatter_(target, m.index, m.values, backend=backend))


def cases(small: bool, gpu: bool) -> list[Case]:
    if gpu:
        flat, table = ((100, 500), (500, 64)) if small else ((200_000, 5000), (128_256, 4096))
        many = table[0] // 4
        selections = [
            (f"1 % of {flat[0] * flat[1]:.0e}, bf16", flat, 0.01, BF16),
            (f"{many} rows of {table[0]} x {table[1]}, bf16", table, many, BF16),
        ]
    else:
        flat, table = ((100, 5000), (3200, 64)) if small else ((10_000, 5000), (32_000, 1024))
        size, rows = f"{flat[0] * 5000 / 1e6:g}M elements", f"rows of {table[0]} x {table[1]}"
        selections = [
            (f"1 % of {size}", flat, 0.01, FP32),
            (f"1 % of {size}, bf16", flat, 0.01, BF16),
            (f"20 % of {size}", flat, 0.2, FP32),
            (f"18 {rows}", table, 18, FP32),
            (f"{table[0] // 10} {rows}", table, table[0] // 10, FP32),
        ]
    return [
        case(op, name, shape, selected, dtype, gpu)
        for name, shape, selected, dtype in selections
        for op in ALTERNATIVES
    ]


def case(op: str, name: str, shape: tuple[int, int], selected: float, dtype: torch.dtype, gpu: bool) -> Case:
    """`selected`: a share of the elements, or a number of rows."""
    rows = isinstance(selected, int)
    select = partial(random_rows, shape, selected) if rows else partial(random_elements, shape, selected)
    contenders = (called if gpu else each_backend)(op, partial(by_op, op=op))
    ours = next(iter(contenders))
    contenders |= {how: partial(by_torch, op=op, how=how) for how in ALTERNATIVES[op]}
    versus = dict.fromkeys(ALTERNATIVES[op] if gpu or dtype == FP32 else [])
    make_it = partial(make, op, shape, select, dtype)
    return Case(
        f"{op}, {name}",
        make_it,
        contenders,
        ours,
        versus,
        tolerance=0.0,
        floor=floor(op, shape, selected) if gpu else None,
    )


def floor(op: str, shape: tuple[int, int], selected: float) -> Floor:
    """In bf16."""
    # A row that is written as a whole is not read.
    twice = op == "scatter_" and not isinstance(selected, int)
    passes, again = 1 + twice, " twice" * twice
    if isinstance(selected, int):
        moved = selected * (4 + 2 * shape[1] * (1 + passes))
        return Floor(moved, f"values + positions + rows{again}", share=0.85)
    numel = shape[0] * shape[1]
    moved = 6 * selected * numel + passes * sector_bytes(numel, selected, 2)
    return Floor(moved, f"values + positions + sectors{again}", share=0.6)
