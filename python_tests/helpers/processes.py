"""Functions in other processes: a server imports torch and what tests need, once, and forks them in no time."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

Work = Callable[[int, int, str], None]  # (rank, number of processes, folder)
TORCH = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
IMPORTED = [*TORCH, "transformers.trainer", "gated_models", "models"]
# One server is enough: the tests that use it are one group of pytest-xdist.
uses_processes = pytest.mark.xdist_group("processes")


def start(run: Callable[[Any], Any]) -> Any:
    """`run(context)`, where that of multiprocessing starts processes."""
    # A server that imports once and forks: a fork of this process would inherit the locks of its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        # By this alone the server finds what it is to import beforehand, up to Python 3.12.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        return run(context)


def in_another_process(work: Callable[..., Any], *arguments: Any) -> None:
    """What it raises is raised here, and an exception if it is killed."""
    _forked(_alone, (work, arguments), 1)


def in_processes(work: Work, folder: Path, count: int = 2) -> None:
    """Run `work` in `count` processes of one gloo group; what one of them raises is raised here."""
    _forked(_within_group, (count, str(folder), work), count)


def _forked(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    begin = torch.multiprocessing.start_processes
    started = start(lambda _: begin(function, arguments, count, join=False, start_method="forkserver"))
    while not started.join():
        pass


def _alone(rank: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(*arguments)


def _within_group(rank: int, world: int, folder: str, work: Work) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        work(rank, world, folder)
    finally:
        # A DistributedDataParallel that outlives its group joins, holding the GIL, a thread that waits for the GIL.
        gc.collect()
        dist.destroy_process_group()
