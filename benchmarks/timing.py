"""The clock of all benchmarks: single calls, interleaved contenders, and what this machine can do at most.

Contenders are interleaved: each is timed once a round, in a new random order every round, so what slows the machine
down slows all of them, and ratios are formed within a round. That does not help where threads lack cores: a call that
waits for a thread without one takes milliseconds. Hence the warning if the machine is busy.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BUSY = 0.5  # load average over the last minute above which other programs are in the way


def interleaved(
    samples: Mapping[str, Callable[[int], float]], *, least: int, most: int | None = None, budget: float = 0.0
) -> dict[str, list[float]]:
    """Call every sample once a round, in random order, with the number of the round; return what they returned.

    There are `least` rounds, and further ones until `budget` seconds are over, up to `most`.
    """
    found: dict[str, list[float]] = {name: [] for name in samples}
    order, draw, start, done = list(samples), random.Random(0), time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while done < least or (time.perf_counter() - start < budget and (most is None or done < most)):
            draw.shuffle(order)
            for name in order:
                found[name].append(samples[name](done))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return found


def quantiles(numbers: Sequence[float], at: Sequence[float] = (0.1, 0.5, 0.9)) -> list[float]:
    return torch.tensor(numbers, dtype=torch.float64).quantile(torch.tensor(at, dtype=torch.float64)).tolist()


def median(numbers: Sequence[float]) -> float:
    return quantiles(numbers, (0.5,))[0]


def beside(times: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Of every contender, its median in ms, and the median of the ratios to `base` within a round."""
    return {
        name: {"ms": 1e3 * median(mine), "speedup": median([b / t for b, t in zip(times[base], mine, strict=True)])}
        for name, mine in times.items()
    }


def warn_if_busy() -> float:
    """The load average over the last minute."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"warning: {load:.2g} threads were busy over the last minute; ratios will be off", file=sys.stderr)
    return load


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


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


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
    source = torch.rand(2**29 if DEVICE.type == "cuda" else 2**26, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _steady(lambda: target.copy_(source))


@functools.cache
def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of torch's matmul of two square matrices, a multiplication and an addition each; once."""
    size = 8192 if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / _steady(lambda: a @ b)


def _steady(call: Callable[[], Any]) -> float:
    """The median of eleven calls; on a GPU after half a second of them, until its clocks are up, or down."""
    begin = time.perf_counter()
    while DEVICE.type == "cuda" and time.perf_counter() - begin < 0.5:
        synchronized(call)()
    return median(event_seconds(call, 11) if DEVICE.type == "cuda" else [seconds(call) for _ in range(11)])
