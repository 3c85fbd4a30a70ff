"""Train 18 rows of the tied embedding of a causal language model, beside everybody else who can.

    python -m benchmarks embedding-rows                       some five minutes on two cores
    python -m benchmarks embedding-rows --small --seconds 1   a small model, to try the program out

The model is a Llama of one layer with random weights and a table of 32000 x 1024, which its head reads too; a batch
has 256 tokens. Contenders are interleaved, in a new random order each round, and caches are evicted before each step.

    step     zero to zero: forward, backward, optimizer.
    share    what the embedding adds: the step, less the forward and backward of the same model with its table frozen,
             in the same round. That backward goes down to what the embedding put out, and the head's to its input. Two
             frozen models are interleaved with the others: their mean is subtracted, and how far they differ says what
             the clock can resolve. Intervals of 95 % are bootstrapped from the rounds.
    peak     bytes allocated at the highest point, from before the method is put on a model until after two steps,
             beyond the model itself.
    saved    what one forward keeps for its backward, beyond the model's own weights.
    largest  the largest tensor that any op of a step makes, and how many are as large as the table; the allocator's own
             record must agree.

The rows of every contender are compared with a dense oracle in fp64 before anything is timed; a wrong result ends the
program. A whole run writes benchmarks/results/embedding_rows.json, at once or not at all; a small one what --out names.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from sparsekernels.training.layers import SLOTS

from . import study
from .embedding_contenders import (
    DENSE,
    KINDS,
    OURS,
    TOKENS,
    Contender,
    Task,
    check,
    expected,
    frozen,
    make_task,
    refusals,
)
from .kernels.case import WrongResult
from .study import MIB, Content, program
from .timing import DEVICE, evict, interleaved, seconds, synchronized, warn_if_busy

BAR = 5.0  # our share of the embedding must be so many times smaller than that of TrainableTokens
FROZEN, AGAIN = "embedding frozen", "embedding frozen, again"
WARM_UP, MIN_ROUNDS, RESAMPLES = 2, 5, 2000


class Made(TorchDispatchMode):
    """The tensors that ops make: neither arguments nor views of them."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.count, self.nbytes, self.op = large, 0, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for pointer, nbytes in storages(out).items():
            if pointer not in given:
                self.count += nbytes >= self.large
                if nbytes > self.nbytes:
                    self.nbytes, self.op = nbytes, str(func)
        return out


def storages(tree: Any) -> dict[int, int]:
    """Address -> bytes of every storage in a tree of tensors; of sparse ones, indices and values."""
    found: dict[int, int] = {}
    for t in torch.utils._pytree.tree_leaves(tree):
        if isinstance(t, Tensor):
            parts = (t._indices(), t._values()) if t.layout == torch.sparse_coo else (t,)
            found |= {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
    return found


def allocations(run: Callable[[], Any]) -> list[int]:
    """Bytes of each block that torch took, and with a minus gave back, in this order; in C++ too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def highest(blocks: Sequence[int]) -> int:
    level = peak = 0
    for nbytes in blocks:
        level += nbytes
        peak = max(peak, level)
    return peak


def memory(task: Task, make: Callable[..., Contender]) -> dict[str, Any]:
    """What a contender takes beyond the model, and what one step of it makes and saves."""
    model, ids = task.copy(), task.batches[0]
    kept: list[Contender] = []

    def begin() -> None:
        kept.append(make(model, task.rows))
        for _ in range(WARM_UP):
            kept[0].step(ids)

    peak = highest(allocations(begin))
    (contender,) = kept
    slots = [slot for module in contender.model.modules() for slot in module.__dict__.get(SLOTS, {}).values()]
    own = storages([*contender.model.parameters(), *contender.model.buffers(), *(slot.positions for slot in slots)])
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved.update(storages(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = contender.loss(ids)
    loss.backward()
    contender.update()
    # Autograd runs the backward of a CPU graph in the calling thread, where the mode is active.
    with Made(task.table_bytes) as made:
        contender.step(ids)
    block = max(allocations(lambda: contender.step(ids)))
    beyond = [nbytes for pointer, nbytes in saved.items() if pointer not in own]
    return {
        "peak_bytes": peak,
        "saved_bytes": sum(beyond),
        "saved_of_table_size": sum(nbytes >= task.table_bytes for nbytes in beyond),
        "largest_made_bytes": made.nbytes,
        "largest_made_by": made.op,
        "made_of_table_size": made.count,
        "largest_allocation_bytes": block,
    }


def take_times(task: Task, makers: dict[str, Callable[..., Contender]], budget: float) -> dict[str, list[float]]:
    """Seconds of a step, a list for each contender with one entry a round."""
    contenders = {name: make(task.copy(), task.rows) for name, make in makers.items()}
    for contender in contenders.values():
        for ids in task.batches[:WARM_UP]:
            contender.step(ids)

    def sample(name: str, done: int) -> float:
        evict()
        return seconds(synchronized(lambda: contenders[name].step(task.batches[done % len(task.batches)])))

    return interleaved({name: partial(sample, name) for name in contenders}, least=MIN_ROUNDS, budget=budget)


def interval(numbers: Sequence[float]) -> dict[str, float]:
    """The median, and where it lies with a confidence of 95 %."""
    values = torch.tensor(numbers, dtype=torch.float64)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draws].quantile(0.5, 1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"median": statistics.median(numbers), "low": low, "high": high}


def shares(times: dict[str, list[float]]) -> tuple[dict[str, dict[str, float]], float]:
    """What each contender's embedding costs in seconds, and how little of it can be told from nothing."""
    pairs = list(zip(times[FROZEN], times[AGAIN], strict=True))
    noise = interval([b - a for a, b in pairs])
    found = {
        name: interval([mine - (a + b) / 2 for mine, (a, b) in zip(steps, pairs, strict=True)])
        for name, steps in times.items()
        if name not in (FROZEN, AGAIN)
    }
    return found, max(abs(noise["low"]), abs(noise["high"]))


def at_least(theirs: dict[str, float], ours: dict[str, float], resolution: float) -> float:
    """How many times smaller our share is: their low end over our high end, or over what can be resolved."""
    return max(0.0, theirs["low"]) / max(ours["high"], resolution)


def measure(task: Task, budget: float) -> dict[str, Any]:
    """The records of all contenders, and what they add up to."""
    wanted: dict[Any, Tensor] = {}
    errors = {}
    for name, kind in tqdm(KINDS.items(), desc="results", disable=None):
        sources = kind.steps, kind.lookups, kind.head
        if sources not in wanted:
            wanted[sources] = expected(task, kind)
        errors[name] = check(task, name, kind, wanted[sources])
    wanted.clear()
    refused = refusals(task)
    makers = {FROZEN: frozen, AGAIN: frozen, **{name: kind.make for name, kind in KINDS.items()}}
    counted = {name: memory(task, makers[name]) for name in (FROZEN, *KINDS)}
    if not counted[DENSE]["made_of_table_size"] or not counted[TOKENS]["saved_of_table_size"]:
        raise WrongResult("tables are made and saved, and were not noticed")
    times = take_times(task, makers, budget)
    share, resolution = shares(times)
    records: list[dict[str, Any]] = []
    for name in (FROZEN, *KINDS):
        record: dict[str, Any] = {"name": name, "step_seconds": statistics.median(times[name]), **counted[name]}
        if name in KINDS:
            kind = KINDS[name]
            record |= {"trains": kind.trains, "steps_checked": kind.steps, "error": errors[name]}
            record |= {"share_seconds": share[name]}
            if name != OURS:
                record["at_least"] = at_least(share[name], share[OURS], resolution)
        records.append(record)
    ours = counted[OURS]
    small = max(ours["largest_made_bytes"], ours["largest_allocation_bytes"]) < task.table_bytes
    tokens = next(record for record in records if record["name"] == TOKENS)
    return {
        "table": list(task.table.shape),
        "table_bytes": task.table_bytes,
        "rows": len(task.rows),
        "tokens": task.batches[0].numel(),
        "rounds": len(times[FROZEN]),
        "resolution_seconds": resolution,
        "bar": {"at_least": BAR, "found": tokens["at_least"], "passed": tokens["at_least"] >= BAR},
        "nothing_of_table_size": small and not ours["made_of_table_size"] and not ours["saved_of_table_size"],
        "refused": refused,
        "records": records,
        "seconds": times,
    }


def table(found: Content) -> str:
    head = ["", "trains", "step", "embedding's share", "ours is smaller by", "peak above the model"]
    head += ["saved for backward", "largest tensor made", "of table size: saved, made"]
    lines = []
    for record in found["records"]:
        share = record.get("share_seconds")
        cells = [record["name"], record.get("trains", "nothing"), milliseconds(record["step_seconds"])]
        numbers = {key: milliseconds(value) for key, value in share.items()} if share else {}
        cells.append("{median} ({low} to {high})".format(**numbers) if share else "")
        cells.append(f"≥ {record['at_least']:.3g}x" if "at_least" in record else "")
        cells += [f"{record[key] / MIB:.3g} MiB" for key in ("peak_bytes", "saved_bytes", "largest_made_bytes")]
        cells[-1] += f" ({record['largest_made_by'].removeprefix('aten.').split('.')[0]})"
        lines.append([*cells, f"{record['saved_of_table_size']}, {record['made_of_table_size']}"])
    return study.table(head, lines)


def report(content: Content) -> str:
    (rows, columns), bar = content["table"], content["bar"]
    return "\n".join(
        [
            f"{content['rows']} rows of a tied table of {rows} x {columns} ({content['table_bytes'] / MIB:.3g} MiB), "
            f"{content['tokens']} tokens.",
            f"Medians of {content['rounds']} rounds; shares below {milliseconds(content['resolution_seconds'])} cannot "
            "be told from none.",
            "",
            table(content),
            "",
            *(f"- {name}: {reason}" for name, reason in content["refused"].items()),
            "",
            f"at least {bar['found']:.3g} times less than {TOKENS}, the bar is {bar['at_least']:g}: "
            + ("met" if bar["passed"] else "missed"),
            f"nothing of table size saved or made: {'yes' if content['nothing_of_table_size'] else 'NO'}",
            "",
            study.written_by(content, "python -m benchmarks embedding-rows"),
        ]
    )


def milliseconds(time: float) -> str:
    return f"{time * 1e3:.0f} ms" if abs(time) >= 0.1 else f"{time * 1e3:.2g} ms"


def arguments(add: Callable[..., Any]) -> None:
    add("--seconds", type=float, default=120, help="how long steps are timed [%(default)s]")


def run(args: argparse.Namespace, origin: Content) -> Content:
    # Said of how peft calls transformers and torch, not of anything here.
    for message in (".*is_gradient_checkpointing", ".*tie_word_embeddings=True", "Sparse invariant checks"):
        warnings.filterwarnings("ignore", message=message)
    facts = {"threads": torch.get_num_threads(), "load_average": warn_if_busy(), "device": str(DEVICE)}
    content = {**origin, **facts, **measure(make_task(args.small), args.seconds)}
    study.write_json(args.out, content)
    return content


main = program("embedding-rows", __doc__, arguments, run, report)
