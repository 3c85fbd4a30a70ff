"""The studies of contenders on a tiny model: each trains what it says, and a results file is gone on with."""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, transformer
from torch import nn

import sparsekernels as sk
from benchmarks import gradient_curve, grains, grains_text, language, language_demo
from benchmarks.comparing import contenders, runs
from benchmarks.comparing.contenders import Contender
from benchmarks.comparing.tasks import Completion
from benchmarks.study import MAX_EXTENSIONS, Refused, program


class Task:
    """Of the same form as a study's, with random tokens and a model of two layers; its head is the last norm."""

    settings = {"data": "random tokens", "model": "llama", "task": "random tokens"}

    def __init__(self, args: argparse.Namespace, higher: bool) -> None:
        self.batch_size, self.steps, self.higher, self.autocast = args.batch_size, args.steps, higher, higher
        self.checkable = not higher

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

    def right(self, model: nn.Module, held_out: list[Any]) -> float:
        return 0.25


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "BLOCK", (2, 4))
    monkeypatch.setattr(contenders, "LOW_RANK", 4)


@pytest.mark.parametrize("study", [grains, grains_text, language])
def test_every_contender_trains_what_it_says(study: Any, tmp_path: Path) -> None:
    out, higher, fewest = tmp_path / "found.json", study is grains_text, 4 if study is language else 3
    every = language.CONTENDERS if study is language else grains.CONTENDERS
    every = {
        name: replace(contender, rank=min(contender.rank, 4), every=min(contender.every, 3))
        for name, contender in every.items()
        if contender.density in (0.0, 0.01) and not (study is language and contender in grains.CONTENDERS.values())
    }
    options = {"rates": language.rates} if study is language else {}
    measure = partial(runs.measure, make_task=partial(Task, higher=higher), contenders=every, **options)
    main = program("study", None, study.arguments if study is language else grains.arguments, measure, study.table)
    given = ["--steps", "4", "--batch-size", "2", "--seeds", "2", "--threads", str(torch.get_num_threads())]
    assert main([*given, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    parameters = dict(transformer("llama").named_parameters())
    projections = [p for name, p in parameters.items() if "_proj" in name]
    weights, sides = sum(p.numel() for p in projections), sum(sum(p.shape) for p in projections)
    head = parameters["model.norm.weight"].numel() if higher else 0
    for name, contender in every.items():
        finished = runs.final_runs(content, name, higher)
        assert [run["seed"] for run in finished] == [0, 1], name
        search = [run for run in content["runs"] if run["name"] == name and run["seed"] == runs.SEARCH_SEED]
        rates = {run["lr"]: run["validation"] for run in search}
        best = finished[0]["lr"]
        assert best == (max if higher else min)(rates, key=lambda rate: rates[rate])
        assert min(rates) < best < max(rates) or len(rates) == fewest + MAX_EXTENSIONS
        assert len(rates) >= fewest
        trained = finished[0]["trained_weights"] - head
        if contender.choice in ("lora", "dora", "shira"):  # two matrices beside each projection, or as many entries
            magnitudes = sum(p.shape[0] for p in projections) if contender.choice == "dora" else 0
            assert trained == contender.rank * sides + magnitudes, name
        elif contender.density:
            assert contender.density <= trained / weights + 1e-3, name
            assert trained / weights < contender.density + 0.08, name  # one unit of a small tensor
        assert finished[0]["bytes_to_ship"] >= 4 * trained
        assert finished[0].get("right") == (None if higher else 0.25)
        assert name in out.with_suffix(".md").read_text()
    count = len(content["runs"])
    assert main([*given, "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["runs"]) == count


def test_a_contender_without_all_its_runs_is_left_out() -> None:
    run = {"name": "dense", "lr": 1e-4, "seed": 0, "validation": 1.0, "test": 1.0}
    content: dict[str, Any] = {"settings": {"seeds": 2}, "runs": [{**run, "name": runs.UNTUNED}, run]}
    assert runs.final_runs(content, "dense") == []
    with pytest.raises(Refused, match="no contender"):
        grains.table(content)


def test_an_error_stops_the_other_runs_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Contender] = []

    def train(task: Any, contender: Contender, rate: float, seed: int) -> dict[str, float]:
        if contender.choice == "dense":
            while len(done) < 2:
                time.sleep(0.01)
            raise OSError("no space left")
        done.append(contender)
        time.sleep(0.01)
        return {"validation": rate, "test": rate}

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "caller", lambda task, *_: nullcontext(lambda function, *given: function(task, *given)))
    measure = partial(runs.measure, make_task=partial(Task, higher=False), contenders=grains.CONTENDERS)
    main = program("study", None, grains.arguments, measure, grains.table)
    out = tmp_path / "found.json"
    with pytest.raises(OSError, match="no space left"):
        main(["--workers", "2", "--steps", "4", "--batch-size", "2", "--seeds", "9", "--out", str(out)])
    names = [run["name"] for run in json.loads(out.read_text())["runs"]]
    assert len(names) == 1 + len(done)
    assert len(done) < 2 * (9 + 3)  # of three hundred


def test_runs_that_tell_no_costs_leave_these_columns_out() -> None:
    told = {"peak_bytes": 1, "bytes_to_ship": 1, "cpu_seconds": 1.0}
    scores = {"seed": 0, "validation": 1.0, "test": 1.0, "trained_weights": 1}
    rates = [{**scores, "lr": lr, "validation": abs(lr - 1)} for lr in (0.3, 1.0, 3.0)]
    old = [{**run, "name": "dense"} for run in rates]
    new = [{**run, **told, "name": "LoRA r=16 (PEFT)"} for run in rates]
    settings = {"seeds": 1, "steps": 1, "batch_size": 1}
    for mine, told_of in ((old + new, False), (new, True)):
        base = {"name": runs.UNTUNED, "lr": 0.0, **scores, "test": 2.0}
        content = {
            "settings": settings,
            "runs": [base, *mine],
            "machine": {"gpu": None, "cpu": "", "versions": {"torch": ""}},
        }
        assert ("to ship" in runs.rows_of(content, grains.CONTENDERS, "grains", "", higher=False)) == told_of


def test_more_steps_than_there_are_texts_are_refused() -> None:
    pairs = {split: [("a", "b")] * 9 for split in ("train", "validation", "test")}
    with pytest.raises(Refused, match="--steps is 4, but the task has texts for 3 steps of 4"):
        Completion("no-such-folder", pairs, "{}", batch_size=4, steps=4)


@pytest.mark.parametrize("name", ["dense", "LoRA r=4 (PEFT)", "5% columns, random"])
def test_a_new_head_has_its_own_rate(name: str) -> None:
    task = Task(argparse.Namespace(batch_size=2, steps=8), higher=True)
    model = task.model(0)
    optimizer = contenders.prepare(grains.CONTENDERS[name], task, model, task.train(0), 0.5, 0).optimizer
    projections, (head,) = ([group for group in optimizer.param_groups if group["lr"] == lr] for lr in (0.5, 1e-2))
    assert [p.numel() for p in head["params"]] == [model.get_parameter("model.norm.weight").numel()]
    assert len(projections) == 1
    assert projections[0]["params"]


def test_the_demo_shows_what_each_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Writer(Task):
        pairs = {"test": [("what is one", "a number"), ("what is two", "another number")]}

        def __init__(self, args: argparse.Namespace) -> None:
            super().__init__(args, higher=False)

        def written(self, model: nn.Module, prompts: list[str], max_new_tokens: int) -> list[str]:
            norm = float(model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().norm())
            return [f"{prompt}: {norm:.9f}" for prompt in prompts]

    monkeypatch.setattr(language_demo, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(language_demo, "completion", Writer)
    out = tmp_path / "results.json"
    assert language_demo.main(["--steps", "4", "--batch-size", "2", "--out", str(out)]) == 0
    before, *trained = json.loads(out.read_text())["runs"]
    assert [run["name"] for run in trained] == list(language_demo.RATES)
    assert "trained_weights" not in before
    text = capsys.readouterr().out
    for run in trained:
        assert run["trained_weights"] > 0
        for (prompt, answer, written), (*_, first) in zip(run["samples"], before["samples"], strict=True):
            assert answer in text
            assert written in text
            assert written.startswith(prompt)
            assert (written == first) == run["name"].startswith("LoRA")  # whose weights stay


def test_the_gradient_curve_is_that_of_the_largest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_curve, "completion", partial(Task, higher=False))
    out = tmp_path / "curve.json"
    options = ["--model", "tiny", "--task", "summary", "--batches", "2", "--batch-size", "2"]
    assert gradient_curve.main([*options, "--out", str(out)]) == 0
    runs_ = json.loads(out.read_text())["runs"]
    assert [(run["model"], run["task"], run["seed"]) for run in runs_] == [("tiny", "summary", seed) for seed in (0, 1)]
    for run in runs_:
        model = transformer("llama")
        model(**batch("llama", 2, seed=10 * run["seed"])).loss.backward()
        grads = [
            p.grad.flatten().double() for name, p in model.named_parameters() if "_proj" in name and p.grad is not None
        ]
        largest = [grad.square().sort(descending=True).values[: round(0.1 * len(grad))].sum() for grad in grads]
        wanted = float((sum(largest) / sum(grad.square().sum() for grad in grads)) ** 0.5)
        assert gradient_curve.carried(run["curve"], 0.1) == pytest.approx(wanted, abs=0.01)
    assert "does not hold here" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").is_file()


@pytest.mark.parametrize("budget", ["matrix", "model"])
@pytest.mark.parametrize("choice", ["sift", "fish", "magnitude", "relative", "principal"])
def test_the_largest_scores_are_chosen(choice: str, budget: str) -> None:
    task, model = Task(argparse.Namespace(batch_size=2, steps=8), higher=False), transformer("llama")
    given = task.train(0)
    contender = Contender(choice, 1e-3, density=0.05, budget=budget)
    chosen = contenders.select(contender, model, given, 0)
    weights = {name: p for name, p in model.named_parameters() if "_proj" in name}
    sum(model(**each).loss for each in given[: contenders.GRADIENT_BATCHES]).backward()  # type: ignore[union-attr]
    scores: dict[str, Any] = {}
    for name, p in weights.items():
        assert p.grad is not None
        u, s, v = torch.linalg.svd(p.detach(), full_matrices=False)
        low = (u[:, : contenders.LOW_RANK] * s[: contenders.LOW_RANK]) @ v[: contenders.LOW_RANK]
        by = {"sift": p.grad, "magnitude": p, "relative": p.grad / p, "principal": low}
        scores[name] = by[choice].detach().abs() if choice != "fish" else None
    if choice == "fish":
        scores = sk.fisher_diagonal(
            model.eval(), given[: contenders.FISHER_BATCHES], names=list(weights), progress=False
        )
    shares = {name: len(chosen[name]) / p.numel() if name in chosen else 0.0 for name, p in weights.items()}
    assert sum(map(len, chosen.values())) == pytest.approx(0.05 * sum(p.numel() for p in weights.values()), rel=0.1)
    assert (max(shares.values()) - min(shares.values()) < 0.01) == (budget == "matrix")
    masks = {name: chosen[name].mask() for name in chosen}
    for mine, others in [(name, [name]) if budget == "matrix" else (name, list(weights)) for name in chosen]:
        lowest = float(scores[mine][masks[mine]].min())
        left = [scores[n][~masks[n]] if n in masks else scores[n].flatten() for n in others]
        assert lowest >= max(float(x.max()) for x in left) * (1 - 1e-3)


def test_what_is_re_selected_is_chosen_by_the_weights_of_then() -> None:
    task, model = Task(argparse.Namespace(batch_size=2, steps=8), higher=True), transformer("llama")
    given, copy = task.train(0), transformer("llama")
    contender = Contender("magnitude", 1e-2, density=0.1, every=2)
    prepared = contenders.prepare(contender, task, model, given, 0.5, 0)
    assert prepared.tuned is not None
    first = prepared.tuned.selection
    with torch.no_grad():
        for p in prepared.parameters:
            p.mul_(0.01)  # the largest are no longer the largest
    trained = {name: x.clone() for name, x in model.state_dict().items()}
    contenders.reselect(contender, prepared, copy, given, 0)
    now = prepared.tuned.selection
    assert now != first
    assert now["model.norm.weight"] == first["model.norm.weight"]
    projections = {name: x for name, x in trained.items() if "_proj" in name}
    wanted = sk.Selection.topk(projections, density=0.1, per_tensor=True, magnitude=True)
    assert all(now[name] == index for name, index in wanted.items())
    assert all(torch.equal(x, trained[name]) for name, x in model.state_dict().items())
