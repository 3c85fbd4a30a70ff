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
from compare import DEVICE, Case, Contender, Problem, addressed, backends, positions, random_elements, random_rows, take
from compare import touched_bytes as touched
from torch import Tensor

import sparsekernels as sk
from sparsekernels import ops

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
    passes = 2 if op == "scatter_" and not index.rows else 1
    return Move(
        str(list(shape)),
        index.numel / dense.numel(),
        str(dtype).removeprefix("torch."),
        compact + passes * touched(index, dtype.itemsize),
        f"values + positions + {passes} x touched lines",
        [expected],
        dense,
        index,
        values,
    )


def reading(move: Move, read: Callable[[Move], Tensor]) -> Contender:
    found: list[Tensor] = []

    def call() -> None:
        found[:] = [read(move)]

    return Contender(call, lambda: found)


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
            return reading(move, lambda _: torch.index_select(source, 0, chosen))
        return reading(move, lambda _: source[chosen])
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
        return reading(move, lambda m: ops.gather(m.dense, m.index, backend=backend))
    return writing(move, lambda target, m: ops.scatter_(target, m.index, m.values, backend=backend))


def cases(small: bool) -> list[Case]:
    flat = (100, 5000) if small else (10_000, 5000)
    table = (3200, 64) if small else (32_000, 1024)
    size, rows = f"{flat[0] * 5000 / 1e6:g}M elements", f"rows of {table[0]} x {table[1]}"
    many = table[0] // 10
    selections: list[tuple[str, tuple[int, ...], Callable[[], sk.Index], torch.dtype]] = [
        (f"1 % of {size}", flat, lambda: random_elements(flat, 0.01), torch.float32),
        (f"1 % of {size}, bf16", flat, lambda: random_elements(flat, 0.01), torch.bfloat16),
        (f"20 % of {size}", flat, lambda: random_elements(flat, 0.2), torch.float32),
        (f"18 {rows}", table, lambda: random_rows(table, 18), torch.float32),
        (f"{many} {rows}", table, lambda: random_rows(table, many), torch.float32),
    ]
    found = []
    for name, shape, select, dtype in selections:
        for op, alternatives in ALTERNATIVES.items():
            contenders = {f"{op} {backend}": partial(by_op, op=op, backend=backend) for backend in backends(op)}
            ours = next(iter(contenders))
            contenders |= {how: partial(by_torch, op=op, how=how) for how in alternatives}
            problem = partial(make, op, shape, select, dtype)
            versus = dict.fromkeys(alternatives if dtype == torch.float32 else [])
            found.append(Case(f"{op}, {name}", problem, contenders, ours, versus, tolerance=0.0))
    return found


def test_gather_scatter(compete: Callable[..., None], case: Case, name: str, state: str) -> None:
    compete(case, name, state)
