"""The table of whole training steps: sizes and floors, the loss of all contenders, and the program on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_train as program  # noqa: E402
from gpu_training import llama, scoring, steps  # noqa: E402
from gpu_training.llama import LLAMA_1B, LLAMA_7B, SMALL, Shape  # noqa: E402
from gpu_training.rows import BACKWARD, DENSE, Row, rows  # noqa: E402
from gpu_training.steps import Run, Task  # noqa: E402
from kernels.compare import DEVICE, WrongResult  # noqa: E402

import sparsekernels as sk  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # it is to be renamed
TASK = Task(SMALL, 2, 16, checkpointing=True)


def row_of(name: str) -> Row:
    return next(row for row in rows(small=True) if row.name.startswith(name))


@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_7B, SMALL], ids=lambda shape: shape.name)
def test_sizes_are_those_of_the_model(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "DEVICE", torch.device("meta"))
    model = llama.make_model(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.weights
    assert [matrix.shape for matrix in sk.matrices(model).values()] == shape.matrices
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_floors_of_large_contenders() -> None:
    """Some of them by hand: bytes an element of all weights, or of the selected ones."""
    by_name = {each.name: each for row in rows(small=False)[1:3] for each in row.contenders}
    assert sum(by_name[DENSE].held.values()) == 8 * LLAMA_7B.weights
    selected = 0.05 * LLAMA_7B.projections
    compact = sum(by_name["SIFT 5 %: train_only + SparseAdamW"].held.values())
    assert compact == pytest.approx(2 * LLAMA_7B.weights + 22 * selected)
    leanest = sum(by_name["SIFT 5 %: SparseAdamW at indices, bf16 moments, stepped in backward"].held.values())
    assert leanest == pytest.approx(2 * LLAMA_7B.weights + 8 * selected + 2 * 2048 * 32 * 4096)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(3 * loss, parameters))


@pytest.mark.parametrize("frozen", [False, True])
def test_loss_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    monkeypatch.setattr(llama, "CHUNK", 7)
    model = llama.make_model(SMALL, torch.float64)
    model.model.embed_tokens.weight.requires_grad_(not frozen)
    (batch,) = llama.make_batches(SMALL, 1, 2, 12)
    own, ours = model(**batch).loss, llama.causal_loss(model, batch)
    torch.testing.assert_close(ours.float(), own.float(), rtol=1e-6, atol=0)  # its own rounds logits to fp32
    for found, expected in zip(gradients(model, ours), gradients(model, own), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_loss_under_autocast() -> None:
    model = llama.make_model(SMALL, torch.float32)
    (batch,) = llama.make_batches(SMALL, 1, 2, 12)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = llama.causal_loss(model, batch)
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(llama.causal_loss(model, batch).detach()), rel=1e-2)


def test_stepping_in_backward_is_the_same_step() -> None:
    runs = [steps.sift(TASK, 0.05), steps.sift(TASK, 0.05, in_backward=True)]
    losses = [torch.stack([run.call() for _ in range(4)]) for run in runs]
    torch.testing.assert_close(losses[0], losses[1], rtol=0 if DEVICE.type == "cpu" else 1e-3, atol=0)
    assert losses[0][-1] < losses[0][0]


def test_weights_that_must_not_change_are_noticed() -> None:
    index = sk.Index(torch.tensor([1, 4]), (2, 3))
    original = torch.ones(2, 3, dtype=torch.bfloat16)
    weight = original.clone()
    with pytest.raises(WrongResult, match="of 2 selected weights, steps changed 0 only"):
        steps.check_weight(weight, original, index)
    weight.view(-1)[[1, 4]] = 2.0
    steps.check_weight(weight, original, index)
    weight[1, 2] = math.nan
    with pytest.raises(WrongResult, match="not selected"):
        steps.check_weight(weight, original, index)


def test_the_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    assert program.main(["--small", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    wanted = rows(small=True)
    assert [record["row"] for record in content["results"]] == [row.name for row in wanted]
    for record, row in zip(content["results"], wanted, strict=True):
        names = [each.name for each in row.contenders]
        found = [each["name"] for each in record["contenders"]]
        assert found == names or (sorted(set(names) - set(found)) == [n for n in names if n.startswith("LoRA")])
        for each in record["contenders"]:
            assert each["median_seconds"] > 0
            assert (each["peak_bytes"] is None) == (DEVICE.type == "cpu")
            assert ("times_faster" in each) == (row.baseline is not None)
        for bar, met in zip(row.bars, record["bars"], strict=True):
            assert (met["met"] is None) == (DEVICE.type == "cpu" and bar.quantity == "peak_bytes")
    assert all("selection" in each["before"] for each in content["results"][0]["contenders"][:2])
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    if DEVICE.type == "cpu":
        assert "| not measured |" in text


def test_what_fails_is_noted_and_does_not_hide_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> Run:
        raise torch.OutOfMemoryError("no memory\nleft")

    def wrong(_: list[Any]) -> None:
        raise WrongResult("a loss is not finite")

    row = row_of("LASER")
    (ours, plain), missing = row.contenders, row.contenders[0]
    broken = [
        dataclasses.replace(ours, start=too_large),
        dataclasses.replace(plain, name="wrong", start=lambda: Run(lambda: None, wrong)),
        dataclasses.replace(missing, name="missing", needs="no_such_package"),
        plain,
    ]
    monkeypatch.setattr(program, "rows", lambda small: [dataclasses.replace(row, contenders=broken)])
    assert program.main(["--small", "--out", str(tmp_path / "train.json")]) == 1
    (record,) = json.loads((tmp_path / "train.json").read_text())["results"]
    assert {each["name"]: each.get("failed") for each in record["contenders"]} == {
        ours.name: "OutOfMemoryError: no memory\nleft",
        "wrong": "WrongResult: a loss is not finite",
        BACKWARD: None,
    }
    assert [bar["met"] for bar in record["bars"]] == [None]
    assert "| wrong | failed |  |  |  | WrongResult: a loss is not finite |" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [False, True])
def test_a_contender_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    models: list[weakref.ref[nn.Module]] = []

    def make_model(*args: Any) -> nn.Module:
        assert [each() for each in models] == [None] * len(models)
        model = llama.make_model(*args)
        models.append(weakref.ref(model))
        return model

    def check(_: object) -> None:
        raise WrongResult

    for module in (steps, scoring):
        monkeypatch.setattr(module, "make_model", make_model)
        if fails:
            monkeypatch.setattr(module, "finite", check)
    chosen = [row_of("Step"), row_of("FISH"), row_of("LASER")]
    found = [each for row in chosen for each in program.measure(row, held=0)["contenders"]]
    assert len(models) == len(found) >= 10
    assert any("failed" in each for each in found) == fails


def test_memory_that_is_left_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "allocated", lambda: 10**9)
    row = row_of("LASER")
    with pytest.raises(RuntimeError, match="has left 900000000 bytes behind"):
        program.measured(row.contenders[1], held=10**8)


@pytest.mark.parametrize(("seconds", "peak", "met"), [(0.07, 4.4e9, [True, True]), (0.08, 4.6e9, [False, False])])
def test_bars_can_be_missed(seconds: float, peak: float, met: list[bool]) -> None:
    row = row_of("Step")
    found = [
        {"name": row.contenders[0].name, "median_seconds": seconds, "peak_bytes": peak},
        {"name": DENSE, "median_seconds": 0.1, "peak_bytes": 10e9},
    ]
    record = program.judged(row, found)
    assert [bar["met"] for bar in record["bars"]] == met
    assert record["contenders"][0]["times_faster"] == pytest.approx(0.1 / seconds)
    assert record["contenders"][0]["share_of_peak"] == pytest.approx(peak / 10e9)


@pytest.mark.parametrize(("peak", "met"), [(16.9e9, True), (17.1e9, False)])
def test_the_bar_of_the_large_model(peak: float, met: bool) -> None:
    row = rows(small=True)[2]
    (bar,) = row.bars
    record = program.judged(row, [{"name": bar.contender, "median_seconds": 1.0, "peak_bytes": peak}])
    assert record["bars"] == [{"asked": "at most 17 GB of peak memory", "contender": bar.contender, "met": met}]


def test_without_a_gpu_it_prints_floors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--floors"]) == 0
    text = capsys.readouterr().out
    assert text == (program.RESULTS / "gpu_train_floors.md").read_text(), "write it anew: gpu_train.py --floors"
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            program.main([])
        assert "torch sees no GPU" in capsys.readouterr().err
