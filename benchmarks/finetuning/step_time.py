"""Time training steps of several methods against each other, fairly on a noisy machine."""

from __future__ import annotations

import statistics
import time
from itertools import cycle
from typing import Any

import torch

from .config import Config
from .methods import METHODS, name_of
from .text_task import TextTask
from .training import clock, load, progress_bar, to_device, training_step

WARM_UP = 3


def compare_step_times(configs: list[Config], task: TextTask, seconds: float) -> dict[str, Any]:
    """Let the methods take turns, one step each on the same batch, for about ``seconds``.

    The first config is the baseline. Each turn gives one ratio per method, so slow spells of the machine hit both
    sides; the order within a turn is reversed every other time. Reported are medians over the turns.
    """
    device = configs[0].device
    if configs[0].threads:
        torch.set_num_threads(configs[0].threads)
    runs = []
    for config in configs:
        loaded = load(config, task)
        loaded.model.train()
        batches = loaded.batches(config, "train", seed=config.seed * 1000)
        prepared = METHODS[config.method].prepare(loaded.model, batches, config)
        runs.append((name_of(config), loaded.model, prepared))
    times: dict[str, list[list[float]]] = {name: [] for name, _, _ in runs}
    deadline = time.perf_counter() + seconds
    with progress_bar(round(seconds), "step times", "s") as bar:
        for turn, batch in enumerate(cycle(batches)):
            batch = to_device(batch, device)
            for name, model, prepared in runs if turn % 2 else reversed(runs):
                _, parts = training_step(model, prepared, batch, configs[0])
                start = clock(device)
                prepared.optimizer.zero_grad()
                parts[2] += clock(device) - start
                if turn >= WARM_UP:
                    times[name].append(parts)
            left = deadline - time.perf_counter()
            bar.update(min(bar.total, round(seconds - left)) - bar.n)
            if left <= 0 and turn > WARM_UP:
                break
    baseline = [sum(parts) for parts in times[runs[0][0]]]
    return {
        "baseline": runs[0][0],
        "pairs": len(baseline),
        "methods": {
            name: {
                "step_ms": 1e3 * statistics.median(map(sum, rows)),
                "split_ms": [1e3 * statistics.median(column) for column in zip(*rows, strict=True)],
                "speedup": statistics.median(base / sum(row) for base, row in zip(baseline, rows, strict=True)),
            }
            for name, rows in times.items()
        },
    }
