"""The study of rows, columns and blocks on a tiny model: every contender trains, and a results file is gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import batch, transformer
from torch import nn

from benchmarks import grains
from benchmarks.study import Refused


class Task:
    """Of the same form as the study's, with random tokens and a model of two layers."""

    text = SimpleNamespace(source="random tokens", sizes={}, language="none")

    def __init__(self, batch_size: int, steps: int) -> None:
        self.batch_size, self.steps = batch_size, steps

    def make(self) -> nn.Module:
        return transformer("llama")

    def train(self, seed: int) -> list[Any]:
        return [batch("llama", self.batch_size, seed=10 * seed + step) for step in range(self.steps)]

    def held_out(self, split: str) -> list[Any]:
        return [batch("llama", 4, seed=1000 + len(split))]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grains, "Task", Task)
    monkeypatch.setattr(grains, "BLOCK", (2, 4))


def test_every_contender_trains_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "grains.json"
    options = ["--steps", "4", "--batch-size", "2", "--seeds", "2", "--threads", str(torch.get_num_threads())]
    assert grains.main([*options, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    weights = sum(p.numel() for name, p in transformer("llama").named_parameters() if "_proj" in name)
    for name, contender in grains.CONTENDERS.items():
        runs = grains.final_runs(content, name)
        assert [run["seed"] for run in runs] == [0, 1], name
        search = [run for run in content["runs"] if run["name"] == name and run["seed"] == grains.SEARCH_SEED]
        rates = {run["lr"]: run["validation"] for run in search}
        assert runs[0]["lr"] == min(rates, key=lambda rate: rates[rate])
        assert min(rates) < runs[0]["lr"] < max(rates) or len(rates) == 3 + grains.study.MAX_EXTENSIONS
        if contender.density:
            share = runs[0]["trained_weights"] / weights
            assert contender.density <= share + 1e-3, name
            assert share < contender.density + 0.08, name  # one unit of a small tensor
        assert name in out.with_suffix(".md").read_text()
    count = len(content["runs"])
    assert grains.main([*options, "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["runs"]) == count


def test_a_contender_without_all_its_runs_is_left_out() -> None:
    run = {"name": "dense", "lr": 1e-4, "seed": 0, "validation": 1.0, "test": 1.0}
    content = {"settings": {"seeds": 2}, "runs": [run]}
    assert grains.final_runs(content, "dense") == []
    with pytest.raises(Refused, match="no contender"):
        grains.table(content)
