"""What gpu_train.py measures, with the bars, and what each contender must at least hold in memory and compute.

Both are counted from sizes alone. Held: weights, state of the optimizer, and the larger of two things that need not be
there together: all gradients, at the end of backward, and what forward keeps for backward, at its beginning.
Computed: the products of projections and of the head, a multiplication and an addition as two operations; attention,
norms and the optimizer are left out. Every layer is counted alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import scoring, steps
from .llama import LLAMA_1B, LLAMA_7B, SMALL, Shape
from .scoring import DENSITY, Samples
from .steps import RANK, Run, Task

DENSE = "torch.optim.AdamW(fused=True)"
BACKWARD = "forward and backward, all weight gradients"
SIXTEEN = torch.bfloat16
GROUP_BYTES = 2**32  # of Fisher information that FISH holds at a time

Parts = dict[str, float]  # what is counted, in words -> how much of it


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a row.

    Attributes:
        start: makes it ready; whatever was started before is gone by then.
        held, computed: bytes and operations at least, part by part.
        needs: a package without which it is left out.
    """

    name: str
    start: Callable[[], Run]
    held: Parts
    computed: Parts
    needs: str | None = None


@dataclass(frozen=True)
class Bar:
    """`quantity` of `contender` must be at most `most`, or at most that share of the one of `of`."""

    asked: str
    contender: str
    quantity: str
    most: float
    of: str | None = None


@dataclass(frozen=True)
class Row:
    """Contenders of one job; all are set beside `baseline`, if there is one."""

    name: str
    contenders: list[Contender]
    bars: tuple[Bar, ...] = ()
    baseline: str | None = None


def rows(small: bool) -> list[Row]:
    """All of them; `small` for trying them out, on a CPU as well."""
    one, seven = (SMALL, SMALL) if small else (LLAMA_1B, LLAMA_7B)
    size, length = (2, 32) if small else (4, 2048)
    return [
        small_model_row(Task(one, size, length, checkpointing=False)),
        small_model_row(Task(one, size, length, checkpointing=True)),
        large_model_row(Task(seven, 1, length, checkpointing=True)),
        methods_row(Samples(one, 4, 2, 16) if small else Samples(one, 4, 4, 256)),
        laser_row(Samples(one, 2, 3, 16) if small else Samples(one, 4, 25, 256)),
    ]


def small_model_row(task: Task) -> Row:
    ours = "SIFT 1 %: train_only + SparseAdamW"
    return Row(
        _name(task),
        [
            _sift(ours, task, 0.01),
            _sift(
                "SIFT 1 %: SparseAdamW at indices, bf16 moments, stepped in backward",
                task,
                0.01,
                indices=True,
                in_backward=True,
                state_dtype=SIXTEEN,
            ),
            _units("columns 5 %", task, granularity="column"),
            _units("blocks of 128 x 128 5 %", task, granularity="block", block=(128, 128)),
            _dense(task),
            Contender(
                f"{DENSE}, fp32 weights, bf16 autocast",
                partial(steps.dense_master, task),
                _with_larger(
                    {"fp32 weights": 4.0 * task.shape.weights, "moments": 8.0 * task.shape.weights},
                    {"gradients": 4.0 * task.shape.weights},
                    _kept(task),
                ),
                _passes(task, {"weight gradients": 2.0 * task.tokens * _multiplied(task.shape)}),
            ),
            _lora(task),
        ],
        (
            Bar(f"at least 1.35x faster than {DENSE}", ours, "median_seconds", 1 / 1.35, DENSE),
            Bar(f"at most 45 % of the peak memory of {DENSE}", ours, "peak_bytes", 0.45, DENSE),
        ),
        DENSE,
    )


def large_model_row(task: Task) -> Row:
    leanest = "SIFT 5 %: SparseAdamW at indices, bf16 moments, stepped in backward"
    lean = "SIFT 5 %: train_only + SparseAdamW, bf16 moments, stepped in backward"
    return Row(
        _name(task),
        [
            _sift("SIFT 5 %: train_only + SparseAdamW", task, 0.05),
            _units("columns 5 %", task, granularity="column"),
            _sift(lean, task, 0.05, in_backward=True, state_dtype=SIXTEEN),
            _sift(leanest, task, 0.05, indices=True, in_backward=True, state_dtype=SIXTEEN),
            _dense(task),
        ],
        (Bar("at most 17 GB of peak memory", leanest, "peak_bytes", 17e9),),
        DENSE,
    )


def laser_row(samples: Samples) -> Row:
    shape, tokens = samples.shape, samples.tokens
    ours = "laser.rank, SVDs apart"
    sizes = [(m, n, min(m, n)) for m, n in shape.matrices]
    vectors = sum((m + n) * rank for m, n, rank in sizes)
    # From the activations, or by way of the gradient of the weight.
    derived = sum(min(2.0 * tokens * rank * (m + n), 2.0 * m * n * (tokens + rank)) for m, n, rank in sizes)
    passes = {"forward": 2.0 * tokens * _multiplied(shape), "input gradients": 2.0 * tokens * _multiplied(shape)}
    weights = {"bf16 weights": 2.0 * shape.weights}
    return Row(
        f"LASER: every matrix of {shape.name}, {samples.count} x {samples.length} tokens, bf16",
        [
            Contender(
                ours,
                partial(scoring.laser_rank, samples),
                {**weights, "fp32 singular vectors": 4.0 * vectors},
                {**passes, "derivatives of singular values": derived},
            ),
            Contender(
                BACKWARD,
                partial(scoring.plain_backward, samples),
                {**weights, "gradients": 2.0 * shape.weights},
                {**passes, "weight gradients": 2.0 * tokens * _multiplied(shape)},
            ),
        ],
        (Bar(f"at most 2x the time of {BACKWARD}", ours, "median_seconds", 2.0, BACKWARD),),
        BACKWARD,
    )


def methods_row(samples: Samples) -> Row:
    shape, tokens = samples.shape, samples.tokens
    products = 2.0 * tokens * _multiplied(shape)
    table = 2.0 * tokens * shape.table
    weights = {"bf16 weights": 2.0 * shape.weights}
    scored = {"forward": products, "input gradients": products}
    tuned = {**weights, "fp32 rows": 4.0 * shape.table, "originals": 2.0 * shape.table}
    return Row(
        f"FISH, IRD, KS-Lottery: {shape.name}, {samples.count} x {samples.length} tokens, bf16",
        [
            Contender(
                f"fish, {DENSITY:.1%}",
                partial(scoring.fish, samples),
                {**weights, "Fisher information, up to 4 GiB at a time": min(4.0 * shape.weights, GROUP_BYTES)},
                {**scored, "weight gradients by sample": products},
            ),
            Contender(
                f"ird, {DENSITY:.1%}",
                partial(scoring.ird, samples),
                {**weights, "positions and Fisher information of half of them": 8.0 * shape.weights / 2},
                {**scored, "for half of the samples the same again, and weight gradients": 1.5 * products},
            ),
            Contender(
                f"embed_tune, {samples.batches} steps",
                partial(scoring.embed_tune, samples),
                {**tuned, "their gradient and moments": 12.0 * shape.table},
                {**scored, "gradient of the table": table},
            ),
            Contender("ks_lottery", partial(scoring.ks_lottery, samples), tuned, {}),
        ],
    )


def _name(task: Task) -> str:
    checkpointing = ", gradient checkpointing" if task.checkpointing else ""
    return f"Step: {task.shape.name}, {task.size} x {task.length} tokens, bf16, chunked loss{checkpointing}"


def _multiplied(shape: Shape) -> int:
    """Elements of the matrices that a token is multiplied with."""
    return shape.projections + shape.table


def _kept(task: Task) -> Parts:
    """What forward keeps for backward."""
    shape = task.shape
    if task.checkpointing:
        return {"hidden states between layers": 2.0 * task.tokens * shape.layers * shape.hidden}
    columns = 4 * shape.hidden + 2 * shape.kv + 3 * shape.intermediate
    return {"inputs of projections, attention and activation": 2.0 * task.tokens * shape.layers * columns}


def _with_larger(parts: Parts, *others: Parts) -> Parts:
    return {**parts, **max(others, key=lambda other: sum(other.values()))}


def _passes(task: Task, weight_gradients: Parts) -> Parts:
    every = 2.0 * task.tokens * _multiplied(task.shape)
    again = {"layers forward again": 2.0 * task.tokens * task.shape.projections} if task.checkpointing else {}
    return {"forward": every, **again, "input gradients": every, **weight_gradients}


def _dense(task: Task) -> Contender:
    numel = task.shape.weights
    return Contender(
        DENSE,
        partial(steps.dense, task),
        _with_larger({"bf16 weights": 2.0 * numel, "moments": 4.0 * numel}, {"gradients": 2.0 * numel}, _kept(task)),
        _passes(task, {"weight gradients": 2.0 * task.tokens * _multiplied(task.shape)}),
    )


def _lora(task: Task) -> Contender:
    adapters = sum((m + n) * RANK for m, n in task.shape.matrices)
    return Contender(
        f"LoRA of peft, rank {RANK}, {DENSE}",
        partial(steps.lora, task),
        _with_larger(
            {"bf16 weights": 2.0 * task.shape.weights, "fp32 adapters and moments": 12.0 * adapters},
            {"gradients": 4.0 * adapters},
            _kept(task),
        ),
        _passes(task, {"adapters": 6.0 * task.tokens * adapters}),
        needs="peft",
    )


def _units(name: str, task: Task, **units: Any) -> Contender:
    """Units at random; what backward keeps of their inputs is counted as if it were all."""
    density = 0.05
    k = density * task.shape.projections
    state: Parts = {"moments": 8.0 * k, "fp32 values": 4.0 * k, "originals": 2.0 * k}
    return Contender(
        f"{name} at random: train_only + SparseAdamW",
        partial(steps.units, task, density, **units),
        _with_larger({"bf16 weights": 2.0 * task.shape.weights, **state}, {"gradients": 4.0 * k}, _kept(task)),
        _passes(task, {"selected weight gradients": 2.0 * task.tokens * k}),
    )


def _sift(
    name: str,
    task: Task,
    density: float,
    *,
    indices: bool = False,
    in_backward: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Contender:
    k = density * task.shape.projections
    state: Parts = {"positions": 4 * k, "moments": 2 * (state_dtype or torch.float32).itemsize * k}
    if not indices:
        state |= {"fp32 values": 4 * k, "originals": 2 * k}
    gradients = {} if in_backward else {"gradients": 4 * k}
    product = task.shape.projections if indices else k
    return Contender(
        name,
        partial(steps.sift, task, density, indices=indices, in_backward=in_backward, state_dtype=state_dtype),
        _with_larger({"bf16 weights": 2.0 * task.shape.weights, **state}, gradients, _kept(task)),
        _passes(task, {"weight gradients" if indices else "selected weight gradients": 2.0 * task.tokens * product}),
    )
