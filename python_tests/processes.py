"""Run a function in several processes of one gloo group."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

Work = Callable[[int, int, str], None]  # (rank, number of processes, folder)


def in_processes(work: Work, folder: Path, count: int = 2) -> None:
    """Run `work` in `count` processes; what one of them raises is raised here."""
    torch.multiprocessing.spawn(_within_group, args=(count, str(folder), work), nprocs=count)


def _within_group(rank: int, world: int, folder: str, work: Work) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        work(rank, world, folder)
    finally:
        # A DistributedDataParallel that outlives its group joins, holding the GIL, a thread that waits for the GIL.
        gc.collect()
        dist.destroy_process_group()
