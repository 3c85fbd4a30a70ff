"""A function in all processes of a gloo group on this machine, which end in time."""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from ..study import Content, Refused


def in_group(work: Callable[..., Content], arguments: tuple[Any, ...], ranks: int, limit: float) -> list[Content]:
    """Call `work(*arguments)` in each process, with one thread; return what each returned, as JSON keeps it.

    Raises:
        Refused: they took longer than `limit` seconds, and were killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = start_processes(
            _member, (work, arguments, ranks, folder, limit), ranks, join=False, daemon=True, start_method="spawn"
        )
        assert started is not None
        end = time.monotonic() + limit
        try:
            while not started.join(timeout=1.0):
                if time.monotonic() > end:
                    raise Refused(f"{ranks} processes were not done after {limit:.0f} seconds, and were killed")
        finally:
            for process in started.processes:
                process.kill()
        return [json.loads(_result(folder, rank).read_text()) for rank in range(ranks)]


def _result(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.json")


def _member(
    rank: int, work: Callable[..., Content], arguments: tuple[Any, ...], ranks: int, folder: str, limit: float
) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=limit),
    )
    try:
        _result(folder, rank).write_text(json.dumps(work(*arguments)))
    finally:
        gc.collect()
        dist.destroy_process_group()
