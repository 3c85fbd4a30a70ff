"""The LASER program: a small run of it from end to end, going on from its results file, and what it counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import laser as program  # noqa: E402
from reducing import contenders, report  # noqa: E402
from test_finetune import save_model, write_rows  # noqa: E402

import sparsekernels as sk  # noqa: E402

FOUND = [
    *("adapt, accuracy", "random, accuracy", "adapt, loss", "random, loss"),
    *("adapt by rows, accuracy", "search, accuracy"),
]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process, one thread."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(program, "in_fresh_process", lambda function, *arguments: function(*arguments))
    yield
    torch.set_num_threads(threads)


def arguments(tmp_path: Path, kind: str, data: Path) -> list[str]:
    model = save_model(tmp_path / "model", kind)
    return [
        *("--model", str(model), "--data", str(data), "--out", str(tmp_path / "out" / "laser.json")),
        *("--samples", "6", "--validation-texts", "8", "--rho", "0.5", "--rho", "0.2", "--threads", "1"),
    ]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_from_end_to_end(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = write_rows(tmp_path / ("rows.csv" if kind == "bert" else "rows.jsonl"))
    argv = arguments(tmp_path, kind, data)
    if kind == "gpt2":
        argv += ["--task", "causal-lm"]
    assert program.main([*argv, "--seed", "0"]) == 0
    content = json.loads((tmp_path / "out" / "laser.json").read_text())
    (seed,) = content["seeds"]
    assert list(seed["found"]) == FOUND
    matrices = 12 if kind == "bert" else 2 * (3 + 1 + 2)
    assert len(seed["gains"]) == 2 * matrices
    searched, adapted = (seed["found"][name] for name in ("search, accuracy", "adapt, accuracy"))
    assert searched["evaluations"] >= 1 + 2 * matrices
    assert searched["texts"] == 8 * searched["evaluations"]
    assert adapted["texts"] >= 6 * (adapted["evaluations"] + 3)
    assert len(adapted["plan"]) <= contenders.ROUNDS
    measured = {(gain["matrix"], gain["rho"]): gain["measured"] for gain in seed["gains"]}
    for reduction in seed["found"]["adapt, loss"]["plan"][:1]:  # tried on the same texts as those gains
        assert reduction["measured"] == pytest.approx(measured[reduction["matrix"], reduction["rho"]], abs=1e-5)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in FOUND)
    assert (tmp_path / "out" / "laser.md").read_text() in printed
    for plot in ("laser_gains.png", "laser_correlation.png"):
        assert (tmp_path / "out" / plot).stat().st_size > 5000

    # It goes on with the second seed, whatever that finds.
    monkeypatch.setattr(program, "in_fresh_process", lambda function, args, task, number: {**seed, "seed": number})
    assert program.main([*argv, "--seed", "0", "--seed", "1"]) == 0
    again = json.loads((tmp_path / "out" / "laser.json").read_text())
    assert [done["seed"] for done in again["seeds"]] == [0, 1]
    assert again["seeds"][0] == seed
    assert program.main([*argv, "--rho", "0.1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_quality_counts_every_text_alike() -> None:
    class Fixed(nn.Module):
        """Logits and a loss that say which batch it was."""

        def forward(self, x: torch.Tensor, labels: torch.Tensor):
            return transformers.modeling_outputs.SequenceClassifierOutput(loss=x.mean(), logits=x)

    first = {"x": torch.tensor([[2.0, 0.0], [0.0, 4.0], [6.0, 0.0]]), "labels": torch.tensor([0, 1, 1])}
    second = {"x": torch.tensor([[8.0, 0.0]]), "labels": torch.tensor([0])}
    found = contenders.quality(Fixed(), [first, second])
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx((3 * 2.0 + 4.0) / 4)
    better, equal = contenders.Quality(0.76, 9.0), contenders.Quality(0.75, 2.0)
    assert better.value > equal.value > found.value


def test_correlation_is_within_a_rho() -> None:
    gains = [{"rho": rho, "predicted": rho * i, "measured": i - rho} for rho in (0.1, 0.9) for i in range(5)]
    assert report.correlation(gains, 0.1, "predicted", "measured") == pytest.approx(1)
    assert report.correlation(gains, None, "predicted", "measured") < 0.99


def test_places_are_those_of_the_package() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(4, 4)}) for _ in range(2)])})
    for label, matrix in sk.matrices(model).items():
        found = report.place(label)
        assert (found.layer, found.kind) == (matrix.layer, matrix.kind)


def test_heat_map_shows_the_grid() -> None:
    values = torch.tensor([[1.0, -3.0], [float("nan"), 2.0]])
    axes = report.pyplot().subplots()[1]
    report.heat_map(sk.methods.laser.Grid([0, 5], ["q", "mlp"], values), axes, "gains")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "mlp"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "5"]
    (image,) = axes.get_images()
    assert image.get_clim() == (-3.0, 3.0)  # no gain is white
    assert image.get_array().mask.tolist() == [[False, False], [True, False]]
