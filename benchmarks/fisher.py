"""What the Fisher diagonal of a whole model costs: ours, a loop over single samples, and vmap(grad).

    python -m benchmarks fisher

MiniLM (22.7M weights) as a classifier of 31 classes, 64 samples of 64 tokens each, fp32. Contenders are interleaved,
each in a process of its own: the loop and vmap(grad) make large tensors anew all the time, and what an earlier
contender left in the allocator decides whether the kernel has to hand out and clear pages for them. As the best case
for the loop, it also runs with glibc told to keep what is freed. Peaks are above the loaded model, in fresh processes.
Every result is checked against the loop over single samples. Then the global top 0.5 % of 100M scores in 50 tensors,
beside torch.cat + torch.topk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk

from . import study
from .finetuning.memory import PeakMemory
from .finetuning.training import silence
from .models import model_folder
from .study import Content, in_fresh_process, positive, program
from .timing import interleaved, seconds

SAMPLES, TOKENS, CLASSES = 64, 64, 31
SCORES, TENSORS, SHARE = 100_000_000, 50, 0.005
TOLERANCE = 1e-4  # relative, of the whole diagonal: fp32 sums in other orders


def load() -> tuple[Any, dict[str, Tensor]]:
    silence()
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    # eager: the masks of the other attention cannot be made under vmap
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder("minilm"), num_labels=CLASSES, attn_implementation="eager"
    ).eval()
    ids = torch.randint(1000, 20000, (SAMPLES, TOKENS))
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, CLASSES, (SAMPLES,)),
    }


def parts(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    return [{key: x[i : i + size] for key, x in batch.items()} for i in range(0, SAMPLES, size)]


def ours(size: int) -> Callable[[Any, Any], dict[str, Tensor]]:
    return lambda model, batch: sk.fisher_diagonal(model, parts(batch, size), progress=False)


def loop(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batches of one and a dense accumulator, as the code of FISH Mask has it."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in parts(batch, 1):
        model.zero_grad()
        model(**sample).loss.backward()
        for name, p in model.named_parameters():
            totals[name] += torch.square(p.grad).data
    model.zero_grad()
    return totals


def vmapped(size: int) -> Callable[[Any, Any], dict[str, Tensor]]:
    """torch.func: per-sample gradients of `size` samples at a time."""

    def run(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor], ids: Tensor, label: Tensor) -> Tensor:
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
            logits = torch.func.functional_call(model, weights, (), inputs).logits
            return nn.functional.cross_entropy(logits, label[None])

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for part in parts(batch, size):
            grads = per_sample(parameters, part["input_ids"], part["labels"])
            for name, grad in grads.items():
                totals[name] += grad.square_().sum(0)
        return totals

    return run


OURS = "fisher_diagonal, batches of 12"
LOOP, LOOP_KEEPING = "loop over single samples", "the loop, glibc told to keep freed memory"
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
CONTENDERS: dict[str, Callable[[Any, Any], dict[str, Tensor]]] = {
    OURS: ours(12),
    "fisher_diagonal, batches of 64": ours(64),
    LOOP: loop,
    LOOP_KEEPING: loop,
    "vmap(grad), 64 at a time": vmapped(64),
    "vmap(grad), 8 at a time": vmapped(8),
}


def peak(name: str) -> int:
    """Bytes above the loaded model at the highest point, F included."""
    model, batch = load()
    memory = PeakMemory("cpu")
    memory.start()
    kept = CONTENDERS[name](model, batch)
    assert kept
    return memory.read()


class Worker:
    """A process for one contender, which keeps the loaded model."""

    def __init__(self, name: str) -> None:
        self.name = name
        added = KEEPING if name == LOOP_KEEPING else {}
        os.environ.update(added)  # glibc reads it when the process starts, which is at its first job
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.pool.submit(_load).result()
        for key in added:
            del os.environ[key]

    def save(self, path: Path) -> None:
        self.pool.submit(_save, self.name, path).result()

    def seconds(self, _: int) -> float:
        return float(self.pool.submit(_seconds, self.name).result())


_loaded: list[Any] = []  # in a worker: model and batch


def _load() -> None:
    _loaded[:] = load()


def _save(name: str, path: Path) -> None:
    torch.save(CONTENDERS[name](*_loaded), path)


def _seconds(name: str) -> float:
    return seconds(lambda: CONTENDERS[name](*_loaded))


def times(rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each contender, a list with one entry a round, and its error, measured before."""
    workers = [Worker(name) for name in (LOOP, *(name for name in CONTENDERS if name != LOOP))]
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for worker in workers:
            worker.save(Path(folder) / "found.pt")  # also a warm-up
            found = torch.load(Path(folder) / "found.pt")
            if worker.name == LOOP:
                expected = {name: x.double() for name, x in found.items()}
                whole = sum(float(x.square().sum()) for x in expected.values()) ** 0.5
            error = sum(float((found[n].double() - x).square().sum()) for n, x in expected.items()) ** 0.5 / whole
            if not error <= TOLERANCE:
                raise AssertionError(f"{worker.name} is {error:.3g} away from the loop; it gets no time")
            errors[worker.name] = error
    by_name = {worker.name: worker.seconds for worker in workers}
    found = interleaved({name: by_name[name] for name in CONTENDERS}, least=rounds)
    for worker in workers:
        worker.pool.shutdown()
    return found, errors


def scores() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(SCORES // TENSORS, generator=generator).square_() for _ in range(TENSORS)]


def joined(found: list[Tensor]) -> Tensor:
    return torch.topk(torch.cat(found), int(SHARE * SCORES), sorted=False).indices


def listed(found: list[Tensor]) -> list[Tensor]:
    return sk.ops.topk(found, int(SHARE * SCORES))


TOPK: dict[str, Callable[[list[Tensor]], Any]] = {"sk.ops.topk": listed, "torch.cat + torch.topk": joined}


def topk_peak(name: str) -> int:
    found = scores()
    memory = PeakMemory("cpu")
    memory.start()
    kept = TOPK[name](found)
    assert len(kept)
    return memory.read()


def topk_times(rounds: int) -> dict[str, list[float]]:
    found = scores()
    positions = [part + i * (SCORES // TENSORS) for i, part in enumerate(listed(found))]
    values = torch.cat(found)
    mine, theirs = torch.cat(positions), joined(found).sort().values
    if not torch.equal(mine, theirs) and not torch.equal(values[mine].sort().values, values[theirs].sort().values):
        raise AssertionError("the sets differ by more than ties")
    del values
    calls = {name: lambda _, select=select: seconds(lambda: select(found)) for name, select in TOPK.items()}
    return interleaved(calls, least=rounds)


def rows(found: Content, first: str) -> str:
    """Medians, ratios to `first` formed round by round, peaks."""
    lines, peaks = [], found["peak_bytes"]
    for name, mine in found["seconds"].items():
        ratio = statistics.median(theirs / own for theirs, own in zip(mine, found["seconds"][first], strict=True))
        lines.append(
            [
                name,
                f"{statistics.median(mine):.2f}",
                "" if name == first else f"{ratio:.2f}x",
                f"{peaks[name] / 2**20:,.0f} MiB",
                f"{peaks[name] / max(peaks[first], 1):.1f}",
            ]
        )
    return study.table(["", "seconds", f"{first} is faster by", "peak memory", "times ours"], lines)


def table(content: Content) -> str:
    tables = [rows(content["fisher"], OURS), rows(content["topk"], "sk.ops.topk")]
    return "\n\n".join([*tables, study.written_by(content, "python -m benchmarks fisher")])


def arguments(add: Callable[..., Any]) -> None:
    add("--rounds", type=positive, default=5, help="of each contender [%(default)s]")


def measure(args: argparse.Namespace, origin: Content) -> Content:
    model_folder("minilm")  # or there is nothing to measure
    found, errors = times(args.rounds)
    peaks = {name: in_fresh_process(peak, name) for name in CONTENDERS if name != LOOP_KEEPING}
    peaks[LOOP_KEEPING] = peaks[LOOP]
    of_topk = in_fresh_process(topk_times, args.rounds)
    content = {
        **origin,
        "fisher": {"seconds": found, "errors": errors, "peak_bytes": peaks},
        "topk": {"seconds": of_topk, "peak_bytes": {name: in_fresh_process(topk_peak, name) for name in TOPK}},
    }
    study.write_json(args.out, content)
    return content


main = program("fisher", __doc__, arguments, measure, table, small=("--rounds", "1"))
