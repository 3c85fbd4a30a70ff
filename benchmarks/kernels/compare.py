"""What the kernel benchmarks share: cases, contenders, the check that comes before any time, and the clock.

A `Case` is one job on one input. Its `contenders` are ways to get it done: ours, on each backend there is, and what a
user would call otherwise. A contender whose result is wrong raises `WrongResult` and is given no time.

Times are taken in two states:

    warm   calls follow each other on the same tensors. What of them fits the last-level cache stays there, which
           flatters whoever touches little: a sparse step may find its lines of a tensor that as a whole would not fit.
    cold   before each call, outside the timed region, a buffer four times as large as the last-level cache is read from
           end to end. The call finds neither its tensors nor the interpreter in any cache, as after the forward and
           backward of a real training step. Only reads: dirty lines would be written back at the expense of the call.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsekernels as sk
from sparsekernels.ops.backend import why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATES = ("warm", "cold")
VERDICTS = {True: "met", False: "missed", None: "not measured"}  # of a bar
LINE = 32 if DEVICE.type == "cuda" else 64  # bytes that memory moves at least: a sector, a cache line


class WrongResult(AssertionError):
    """A contender computed something else than the oracle."""


@dataclass
class Problem:
    """The input of a case, and what comes out.

    Attributes:
        shape, density, dtype: for the reader of the results.
        bytes_moved: the least that the job has to read and write, in `formula`'s terms; the same for every contender,
            so that bytes_moved / time compares them.
        expected: what `Contender.result` must return, in the precision of the oracle.
    """

    shape: str
    density: float
    dtype: str
    bytes_moved: int
    formula: str
    expected: list[Tensor]


@dataclass
class Contender:
    """One way to solve a problem.

    Attributes:
        call: what is timed.
        result: what the calls so far computed, comparable with `Problem.expected`.
        untouched: (weight, its original, Index): outside of the Index the two must agree bit for bit.
        expected, tolerance: override those of problem and case: an alternative may follow another rule, or be coarser.
    """

    call: Callable[[], Any]
    result: Callable[[], Sequence[Tensor]]
    untouched: Sequence[tuple[Tensor, Tensor, sk.Index]] = ()
    expected: Sequence[Tensor] | None = None
    tolerance: float | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """One job and everybody who can do it.

    Attributes:
        make: builds the problem; not called before somebody needs it.
        contenders: name -> function from the problem to a Contender.
        ours: the contender that a user of this package meets.
        versus: those that `ratios.py` sets beside it, with the bar (ours must be so many times faster), or None.
        states: only "warm" where arithmetic, not memory, takes the time.
        tolerance: largest |found - expected| as a share of the largest |expected|.
        calls: how many calls lie before the comparison.
    """

    name: str
    make: Callable[[], Problem]
    contenders: Mapping[str, Callable[[Any], Contender]]
    ours: str
    versus: Mapping[str, float | None] = field(default_factory=dict)
    states: Sequence[str] = STATES
    tolerance: float = 1e-6
    calls: int = 1

    def entrant(self, name: str, problem: Problem) -> tuple[Contender, float]:
        """The contender, ready to be timed, and its error.

        Raises:
            WrongResult: it is further from the oracle than the tolerance, or wrote where it must not.
        """
        contender = self.contenders[name](problem)
        for _ in range(self.calls):
            contender.call()
        found = contender.result()
        expected = problem.expected if contender.expected is None else contender.expected
        tolerance = self.tolerance if contender.tolerance is None else contender.tolerance
        errors = [_error(f, e) for f, e in zip(found, expected, strict=True)]
        if not all(error <= tolerance for error in errors):  # written so that NaN fails
            worst = max(range(len(errors)), key=lambda i: (errors[i] != errors[i], errors[i]))
            raise WrongResult(
                f"{self.name}: result {worst} of {name} is {errors[worst]:.3g} away from what was expected, "
                f"allowed is {tolerance:.3g}; it gets no time"
            )
        for weight, original, index in contender.untouched:
            restored = weight.detach().clone()
            addressed(restored, index)[positions(index)] = addressed(original, index)[positions(index)]
            if not torch.equal(restored, original):
                raise WrongResult(f"{self.name}: {name} changed weights that were not selected; it gets no time")
        return contender, max(errors)


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("nan")
    if not expected.numel():
        return 0.0
    difference = (found.detach().to(expected.dtype) - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


def backends(op: str) -> list[str]:
    """The backends that serve `op` here, fastest first; interpreted Triton is no contender."""
    known = ["native", *(["triton"] if DEVICE.type == "cuda" else []), "reference"]
    return [backend for backend in known if why_not(op, backend, DEVICE.type) is None]  # type: ignore[arg-type]


def positions(index: sk.Index) -> Tensor:
    """Positions as torch's indexing takes them."""
    return index.positions.long()


def addressed(tensor: Tensor, index: sk.Index) -> Tensor:
    """A view of the tensor whose dimension 0 the positions of the index count."""
    return tensor if index.rows else tensor.view(-1)


def take(tensor: Tensor, index: sk.Index) -> Tensor:
    """The selected part, by torch alone."""
    return addressed(tensor.detach(), index).index_select(0, positions(index))


def random_elements(shape: Sequence[int], density: float) -> sk.Index:
    """Each element with probability `density`."""
    return sk.Index.from_mask(torch.rand(*shape, device=DEVICE) < density)


def random_rows(shape: Sequence[int], count: int) -> sk.Index:
    """`count` rows of dimension 0."""
    return sk.Index(torch.randperm(shape[0], device=DEVICE)[:count].sort().values, shape, rows=True)


def touched_bytes(index: sk.Index, itemsize: int) -> int:
    """Bytes of the cache lines that hold the selected part of a tensor."""
    if index.rows:
        return index.numel * itemsize
    return LINE * int(torch.unique_consecutive(positions(index) * itemsize // LINE).numel())


def synchronized(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, and the wait for what it launched on a GPU."""
    if DEVICE.type == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def seconds(call: Callable[[], Any], repeat: int = 1) -> float:
    """Wall-clock time of one call, as the mean over `repeat` in a row."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def event_seconds(call: Callable[[], Any], rounds: int, ahead: float = 0.0) -> list[float]:
    """Times of single calls on a GPU, between events; nothing waits before the last.

    Before each, the GPU is kept busy for about `ahead` seconds, so that the host is done when the call begins there.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for before, after in events:
        if ahead:
            torch.cuda._sleep(int(2e9 * ahead))  # cycles
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def duration(seconds: float) -> str:
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def failed(name: str, error: Exception) -> dict[str, Any]:
    """What stands in a record in the place of a contender's numbers."""
    return {"name": name, "failed": f"{type(error).__name__}: {error}"[:500]}


def free() -> None:
    """Give back what nobody holds any more."""
    with contextlib.suppress(RuntimeError):  # after an illegal access all that follows fails, and says so itself
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def cache_bytes() -> int:
    """Size of the last-level cache."""
    if DEVICE.type == "cuda":
        return int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units.get(size[-1], 1) for size in sizes), default=2**25)


@functools.cache
def _buffer() -> Tensor:
    return torch.zeros(max(4 * cache_bytes(), 2**26) // 4, device=DEVICE)


def evict() -> None:
    """Leave nothing of interest in any cache."""
    synchronized(_buffer().sum)()


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second of `copy_` between two tensors, reads and writes both counted; measured once.

    They have 256 MiB each, on a GPU 2 GiB. On a CPU a store that first fetches its line moves half as much again as is
    counted here: shares can be a little above 1.
    """
    on_gpu = DEVICE.type == "cuda"
    source = torch.rand(2**29 if on_gpu else 2**26, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    begin = time.perf_counter()
    while on_gpu and time.perf_counter() - begin < 0.5:  # until its clocks are up
        target.copy_(source)
        torch.cuda.synchronize()
    for _ in range(11):
        times += event_seconds(lambda: target.copy_(source), 1) if on_gpu else [seconds(lambda: target.copy_(source))]
    return 2 * source.numel() * source.element_size() / sorted(times)[5]


@functools.cache
def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of torch's matmul of two square matrices, a multiplication and an addition each; once."""
    size = 8192 if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))

    def call() -> Tensor:
        return a @ b

    begin = time.perf_counter()
    while DEVICE.type == "cuda" and time.perf_counter() - begin < 0.5:  # until its clocks are up, or down
        synchronized(call)()
    times = event_seconds(call, 11) if DEVICE.type == "cuda" else [seconds(call) for _ in range(11)]
    return 2 * size**3 / sorted(times)[5]
