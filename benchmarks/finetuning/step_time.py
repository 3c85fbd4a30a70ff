"""Time training steps of several methods against each other."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..timing import beside, interleaved, median
from .config import Config
from .methods import METHODS, Prepared, name_of
from .text_task import Batch, TextTask
from .training import clock, load, to_device, training_step

WARM_UP = 3


def compare_step_times(configs: list[Config], task: TextTask, seconds: float) -> dict[str, Any]:
    """Interleave the methods, one step each on the same batch, for about ``seconds``; the first config is the baseline.

    Reported are medians over the rounds, of the times and of the ratios to the baseline.
    """
    if configs[0].threads:
        torch.set_num_threads(configs[0].threads)
    parts: dict[str, list[list[float]]] = {}
    samples = {}
    for config in configs:
        loaded = load(config, task)
        loaded.model.train()
        batches = loaded.batches(config, "train", seed=config.seed * 1000)
        prepared = METHODS[config.method].prepare(loaded.model, batches, config)
        parts[name_of(config)] = []
        samples[name_of(config)] = partial(_step, config, loaded.model, prepared, batches, parts[name_of(config)])
    times = {name: taken[WARM_UP:] for name, taken in interleaved(samples, least=WARM_UP + 1, budget=seconds).items()}
    baseline = name_of(configs[0])
    return {
        "baseline": baseline,
        "pairs": len(times[baseline]),
        "methods": {
            name: {
                "step_ms": found["ms"],
                "split_ms": [1e3 * median(column) for column in zip(*parts[name][WARM_UP:], strict=True)],
                "speedup": found["speedup"],
            }
            for name, found in beside(times, baseline).items()
        },
    }


def _step(
    config: Config, model: nn.Module, prepared: Prepared, batches: list[Batch], parts: list[list[float]], done: int
) -> float:
    batch = to_device(batches[done % len(batches)], config.device)
    _, split = training_step(model, prepared, batch, config)
    start = clock(config.device)
    prepared.optimizer.zero_grad()
    split[2] += clock(config.device) - start
    parts.append(split)
    return sum(split)
