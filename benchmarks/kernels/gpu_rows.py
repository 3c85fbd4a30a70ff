"""What gpu.py measures, first part: kernels whose cost is memory, at sizes of large models, and the floor of each.

The floor of a row is counted from its sizes alone: the bytes that any implementation reads and writes, over the copy
bandwidth of the GPU. Memory moves in sectors of 32 bytes, so an element of two bytes costs a whole one unless a
neighbour is selected, too; the count is the expected one for elements selected at random. A sector of which a part is
written is read as well. A GPU that fetches sectors in pairs moves up to twice as much for scattered elements. The rows
of gpu_matmul_rows.py have a floor of operations, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_adamw
import bench_adamw_rows
import bench_columns
import bench_fisher
import bench_gates
import bench_gather_scatter
import bench_ks
import bench_masked_grad
import bench_topk
import torch
from compare import Case, random_elements, random_rows

FP32, BF16 = torch.float32, torch.bfloat16
SECTOR = 32
IN_A_GRAPH = "SparseAdamW(capturable=True)"


@dataclass(frozen=True)
class Row:
    """A case, with its floor and its bars.

    Attributes:
        bytes, formula: what must be moved, in numbers and in words.
        operations: multiplications and additions of matrix products, in bf16; 0: the rest is no matter beside memory.
        share: of the floor's speed that is asked for. most: seconds that are allowed. most_extra: bytes that a call may
            allocate, its result included. None: nothing is asked.
        graph: whether it is timed as replays of a CUDA graph.
    """

    case: Case
    bytes: float
    formula: str
    share: float | None = None
    most: float | None = None
    graph: bool = False
    operations: float = 0.0
    most_extra: float | None = None

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds that it takes at least, at so many bytes and so many operations a second."""
        return max(self.bytes / bandwidth, self.operations / rate)


def sector_bytes(numel: int, density: float, itemsize: int) -> float:
    """Bytes of the sectors that hold at least one of the elements of a tensor, each selected with this probability."""
    each = SECTOR // itemsize
    return numel * itemsize * (1 - (1 - density) ** each)


def distinct(draws: int, kinds: int) -> float:
    """How many of `kinds` are met in so many even draws."""
    return kinds * (1 - (1 - 1 / kinds) ** draws)


def rows(small: bool) -> list[Row]:
    """All of them; `small` for trying them out, on a CPU as well."""
    return [*optimizer_rows(small), *moving_rows(small), *ranking_rows(small), *method_rows(small)]


def optimizer_rows(small: bool) -> list[Row]:
    table = (500, 64) if small else (128_256, 4096)
    stack = ((40, 50),) * 5 if small else ((4000, 5000),) * 50
    count, width = table[0] // 4, table[1]
    numel, density = len(stack) * stack[0][0] * stack[0][1], 0.01
    k = density * numel
    tokens = 64 if small else 8192
    met = distinct(tokens, table[0])
    compact = {
        **bench_adamw.COMPACT,
        IN_A_GRAPH: partial(bench_adamw.sparse_adamw, capturable=True),
    }

    def step(name: str, shapes: Any, select: Any, ours: str, versus: Any) -> Case:
        make = partial(bench_adamw.make, shapes, select, dtype=BF16)
        return Case(
            f"adamw_ of compact values, {name}", make, compact, ours, versus, calls=bench_adamw.CALLS, tolerance=2**-8
        )

    def some(shape: tuple[int, ...], count: int = count) -> Any:
        return random_rows(shape, count)

    fused, copy = bench_adamw.FUSED, bench_adamw.COPY
    written = "values, moments twice + grad + positions + rows written"
    of_rows = step(
        f"{count} rows of {table[0]} x {width}, bf16", (table,), some, "SparseAdamW", {fused: None, copy: None}
    )
    # At their floors both, the ratio is 15: the dense step moves 14 bytes for each of the elements.
    of_elements = step(
        f"1 % of {numel:.0e} in {len(stack)} tensors, bf16",
        stack,
        partial(random_elements, density=density),
        "SparseAdamW",
        {fused: 20, copy: None},
    )
    few = step(f"18 rows of {table[0]} x {width}, bf16", (table,), partial(some, count=18), IN_A_GRAPH, {})
    from_coo = Case(
        f"adamw_rows_, {tokens} tokens with duplicates of {table[0]} x {width}, fp32",
        partial(bench_adamw_rows.make, table, tokens, True),
        bench_adamw_rows.CONTENDERS,
        "SparseAdamW",
        {bench_adamw_rows.SPARSE: 10, bench_adamw_rows.FUSED: None},
        calls=bench_adamw_rows.CALLS,
        tolerance=1e-5,
    )
    return [
        Row(of_rows, count * (4 + 30 * width), written, share=0.85),
        Row(
            of_elements,
            28 * k + 4 * k + 2 * sector_bytes(numel, density, 2),
            "values, moments twice + grad + positions + sectors of the weight twice",
            share=0.6,
        ),
        Row(few, 18 * (4 + 30 * width), written, most=8e-6, graph=True),
        Row(from_coo, 4 * width * (tokens + 6 * met) + 8 * tokens, "gradient + ids + table and moments twice"),
    ]


def moving_rows(small: bool) -> list[Row]:
    flat = (100, 500) if small else (200_000, 5000)
    table = (500, 64) if small else (128_256, 4096)
    numel, density, count = flat[0] * flat[1], 0.01, table[0] // 4
    found = []
    for op, (first, second) in bench_gather_scatter.ALTERNATIVES.items():
        passes = {"gather": 1, "scatter_": 2}[op]
        of_elements = _moving(op, f"1 % of {numel:.0e}", flat, lambda: random_elements(flat, density), (first, second))
        moved = 6 * density * numel + passes * sector_bytes(numel, density, 2)
        words = "values + positions + sectors" + (" twice" if passes == 2 else "")
        found.append(Row(of_elements, moved, words, share=0.6))
        name = f"{count} rows of {table[0]} x {table[1]}"
        of_rows = _moving(op, name, table, lambda: random_rows(table, count), (first, second))
        moved = count * (4 + 2 * table[1] * 2)  # a row that is written as a whole is not read
        found.append(Row(of_rows, moved, "values + positions + rows", share=0.85))
    return found


def _moving(op: str, name: str, shape: tuple[int, int], select: Callable[[], Any], others: Iterable[str]) -> Case:
    by_op, by_torch = partial(bench_gather_scatter.by_op, op=op), partial(bench_gather_scatter.by_torch, op=op)
    contenders = {
        op: partial(by_op, backend=None),
        **{f"{op} {backend}": partial(by_op, backend=backend) for backend in bench_gather_scatter.backends(op)},
        **{how: partial(by_torch, how=how) for how in others},
    }
    make = partial(bench_gather_scatter.make, op, shape, select, BF16)
    return Case(f"{op}, {name}, bf16", make, contenders, op, dict.fromkeys(others), tolerance=0.0)


def ranking_rows(small: bool) -> list[Row]:
    count, numel = (5, 2000) if small else (50, 20_000_000)
    height, width = (16, 64) if small else (128_256, 4096)
    k = count * numel // 100
    contenders = {
        "topk": partial(bench_topk.by_op, backend=None),
        **{f"topk {b}": partial(bench_topk.by_op, backend=b) for b in bench_topk.backends("topk")},
        bench_topk.JOINED: bench_topk.by_torch,
    }
    ranking = Case(
        f"topk, 1 % of {count * numel:.0e} in {count} tensors, fp32",
        partial(bench_topk.make, count, numel, 0.01, False, FP32),
        contenders,
        "topk",
        {bench_topk.JOINED: None},
        tolerance=0.0,
    )
    found = [Row(ranking, 4.0 * count * numel + 8 * k, "scores once + positions", share=1 / 3)]
    tests = {
        "ks_2samp": partial(bench_ks.by_op, backend=None),
        **{f"ks_2samp {b}": partial(bench_ks.by_op, backend=b) for b in bench_ks.backends("ks_2samp")},
    }
    for dtype, most in ((BF16, 25e-3), (FP32, 50e-3)):
        name = f"ks_2samp, {height} x {width}, {str(dtype)[6:]}, p-values included"
        make = partial(bench_ks.make, height, width, True, dtype, checked=min(height, 64))
        case = Case(name, make, tests, "ks_2samp", {}, tolerance=1e-12)
        found.append(Row(case, 2.0 * height * width * dtype.itemsize, "samples", most=most))
    return found


def method_rows(small: bool) -> list[Row]:
    """The other kernels that move memory: no bar was set for them."""
    size, tokens = (2, 16) if small else (8, 2048), 32 if small else 16_384
    table = (300, 64) if small else (128_256, 4096)
    m, n = (48, 64) if small else (4096, 14_336)
    grads = [(40, 50)] * 5 if small else [(4000, 5000)] * 50
    numel = sum(a * b for a, b in grads)
    squares = Case(
        f"fisher_squares_, {numel:.0e} in {len(grads)} tensors, fp32",
        partial(bench_fisher.make_squares, grads),
        bench_fisher.SQUARES,
        "fisher_squares_",
        {bench_fisher.FOREACH: None},
        tolerance=1e-5,
    )
    vector = Case(
        f"fisher_vector_, weight of a norm, {size[0]} x {size[1]} tokens, {n}, fp32",
        partial(bench_fisher.make_vector, size, n, True),
        {**bench_fisher.VECTOR, bench_fisher.EINSUM: bench_fisher.vector_einsum},
        "fisher_vector_",
        {bench_fisher.EINSUM: None},
        tolerance=1e-5,
    )
    embedding = Case(
        f"fisher_embedding_, {size[0]} x {size[1]} tokens of {table[0]} x {table[1]}, fp32",
        partial(bench_fisher.make_embedding, size, table),
        bench_fisher.EMBEDDING,
        "fisher_embedding_",
        {bench_fisher.PAIRS: None},
        tolerance=1e-5,
    )
    count = table[0] // 4
    looked_up = Case(
        f"masked_grad_embedding, {count} rows, {tokens} tokens of {table[0]} x {table[1]}, fp32",
        partial(bench_masked_grad.make_embedding, tokens, table, lambda _: random_rows(table, count)),
        bench_masked_grad.EMBEDDING,
        "masked_grad_embedding",
        {bench_masked_grad.DENSE: None},
        tolerance=1e-5,
    )
    # Of ids that are V u^3 for even u, those in a stretch of ids are met in proportion to the cube roots of its ends.
    both = size[0] * size[1]
    met = sum(1 - (1 - share) ** both for share in _shares(table[0]))
    left = round(bench_columns.LEFT * n)
    return [
        Row(squares, 12.0 * numel, "gradients + totals twice"),
        Row(vector, 8.0 * both * n + 8 * n, "activations + the total twice"),
        Row(
            embedding,
            4.0 * both * table[1] + 8 * both + 8 * met * table[1],
            "gradient + ids + looked-up rows of the total twice",
        ),
        Row(
            looked_up,
            8.0 * tokens + 4 * count + 4 * table[1] * (tokens * count / table[0] + count),
            "ids + positions + grad_output of tokens that hit + result",
        ),
        Row(
            bench_gates.case(
                "gated_weight",
                f"{m} x {n}, bf16",
                partial(bench_gates.make_weight, m, n, BF16, BF16),
                bench_gates.weight_op,
                {bench_gates.SCALE: bench_gates.weight_lines},
                2**-8,
            ),
            4.0 * m * n + 4 * m + 4 * (m + n),
            "weight + gated weight",
        ),
        Row(
            bench_gates.case(
                "gate_gradient",
                f"{tokens} x {n}, bf16",
                partial(bench_gates.make_gradient, tokens, n, BF16),
                bench_gates.gradient_op,
                {bench_gates.SUMS: bench_gates.gradient_lines},
                1e-5,
            ),
            4.0 * tokens * n + 16 * n,
            "a + b",
        ),
        *[
            Row(
                bench_gates.case(
                    op,
                    f"{bench_columns.LEFT:.1%} of {tokens} x {n}, bf16",
                    partial(bench_columns.make_columns, tokens, n, BF16, op == "put_columns"),
                    ours,
                    {name: other},
                    0,
                ),
                2.0 * tokens * (n + left),
                "wide + narrow",
            )
            for op, ours, name, other in (
                (
                    "take_columns",
                    bench_columns.take_op,
                    bench_columns.SELECT,
                    partial(bench_columns.take_lines, index=False),
                ),
                ("put_columns", bench_columns.put_op, bench_columns.COPY, partial(bench_columns.put_lines, copy=True)),
            )
        ],
    ]


def _shares(kinds: int) -> list[float]:
    """Of V u^3 for even u in (0, 1): how likely each integer part is."""
    edges = [(i / kinds) ** (1 / 3) for i in range(kinds + 1)]
    return [high - low for low, high in itertools.pairwise(edges)]
