"""The study of rows, columns and blocks on a tiny model: every contender trains, and a results file is gone on with."""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, transformer
from torch import nn

from benchmarks import grains, grains_text
from benchmarks.study import Refused, program


class Task:
    """Of the same form as a study's, with random tokens and a model of two layers; its head is the last norm."""

    settings = {"data": "random tokens"}

    def __init__(self, args: argparse.Namespace, higher: bool) -> None:
        self.batch_size, self.steps, self.higher, self.autocast = args.batch_size, args.steps, higher, higher

    def model(self, seed: int) -> nn.Module:
        return transformer("llama")

    def head(self, model: nn.Module) -> list[str]:
        return ["model.norm.weight"] if self.higher else []

    def train(self, seed: int) -> list[Any]:
        return [batch("llama", self.batch_size, seed=10 * seed + step) for step in range(self.steps)]

    def held_out(self, split: str) -> list[Any]:
        return [batch("llama", 4, seed=1000 + len(split))]

    @torch.no_grad()
    def score(self, model: nn.Module, held_out: list[Any]) -> float:
        loss = float(model(**held_out[0]).loss)
        return math.exp(-loss) if self.higher else loss


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grains, "BLOCK", (2, 4))


@pytest.mark.parametrize("study", [grains, grains_text])
def test_every_contender_trains_what_it_says(study: Any, tmp_path: Path) -> None:
    out, higher = tmp_path / "grains.json", study is grains_text
    measure = partial(grains.measure, make_task=partial(Task, higher=higher))
    main = program("grains", None, grains.arguments, measure, study.table)
    options = ["--steps", "4", "--batch-size", "2", "--seeds", "2", "--threads", str(torch.get_num_threads())]
    assert main([*options, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    parameters = dict(transformer("llama").named_parameters())
    weights = sum(p.numel() for name, p in parameters.items() if "_proj" in name)
    head = parameters["model.norm.weight"].numel() if higher else 0
    for name, contender in grains.CONTENDERS.items():
        runs = grains.final_runs(content, name, higher)
        assert [run["seed"] for run in runs] == [0, 1], name
        search = [run for run in content["runs"] if run["name"] == name and run["seed"] == grains.SEARCH_SEED]
        rates = {run["lr"]: run["validation"] for run in search}
        assert runs[0]["lr"] == (max if higher else min)(rates, key=lambda rate: rates[rate])
        assert min(rates) < runs[0]["lr"] < max(rates) or len(rates) == 3 + grains.study.MAX_EXTENSIONS
        if contender.choice == "lora":  # two matrices beside each projection, and the head
            sides = sum(sum(p.shape) for name, p in parameters.items() if "_proj" in name)
            assert runs[0]["trained_weights"] == contender.rank * sides + head
        if contender.density:
            share = (runs[0]["trained_weights"] - head) / weights
            assert contender.density <= share + 1e-3, name
            assert share < contender.density + 0.08, name  # one unit of a small tensor
        assert name in out.with_suffix(".md").read_text()
    count = len(content["runs"])
    assert main([*options, "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["runs"]) == count


def test_a_contender_without_all_its_runs_is_left_out() -> None:
    run = {"name": "dense", "lr": 1e-4, "seed": 0, "validation": 1.0, "test": 1.0}
    content = {"settings": {"seeds": 2}, "runs": [run]}
    assert grains.final_runs(content, "dense") == []
    with pytest.raises(Refused, match="no contender"):
        grains.table(content)


@pytest.mark.parametrize("name", ["dense", "LoRA r=4 (PEFT)", "5% columns, random"])
def test_a_new_head_has_its_own_rate(name: str) -> None:
    task = Task(argparse.Namespace(batch_size=2, steps=8), higher=True)
    model = task.model(0)
    optimizer = grains.prepared(grains.CONTENDERS[name], task, model, task.train(0), 0.5, 0)
    projections, (head,) = ([group for group in optimizer.param_groups if group["lr"] == lr] for lr in (0.5, 1e-2))
    assert [p.numel() for p in head["params"]] == [model.get_parameter("model.norm.weight").numel()]
    assert len(projections) == 1
    assert projections[0]["params"]
