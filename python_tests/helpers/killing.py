"""Processes that save one thing over another without end, until they are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import processes
import torch

KILLS = int(os.environ.get("SPARSEKERNELS_KILLS", "10"))  # for each kind of file


def save_for_ever(load: Callable[[Path], Any], versions: list[Path], target: Path, started: Connection) -> None:
    torch.set_num_threads(1)
    loaded = [load(path) for path in versions]
    started.send(True)
    while True:
        for version in loaded:
            version.save(target)


def start(load: Callable[[Path], Any], versions: list[Path], target: Path) -> BaseProcess:
    """`save_for_ever` in a process of its own, under way."""
    here, there = multiprocessing.Pipe()

    def run(context: Any) -> BaseProcess:
        process = context.Process(target=save_for_ever, args=(load, versions, target, there), daemon=True)
        process.start()
        return process

    process = processes.start(run)
    there.close()
    assert here.recv()
    return process


def kills(load: Callable[[Path], Any], versions: list[Path], target: Path, longest: float) -> Iterator[int]:
    """Kill `save_for_ever` after up to `longest` seconds, KILLS times; yields after each.

    Every second time it is killed as soon as a file is then half written: on a quick disk hardly any moment is one.
    """
    rng = random.Random(0)
    folder = target if target.is_dir() else target.parent
    for number in range(KILLS):
        process = start(load, versions, target)
        time.sleep(rng.uniform(0, longest))
        while number % 2 and not any(folder.glob(".*.partial")):
            assert process.is_alive()
            time.sleep(0.0005)
        process.kill()
        process.join()
        yield number
