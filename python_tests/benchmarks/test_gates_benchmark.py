"""The program of the gates: a small run of it from end to end, going on from its results file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gates as program
from test_finetune import save_model, write_rows

NAMES = (
    *("dense", "LoRA (PEFT)", "gates on rows and columns", "gates on rows and columns + low-rank"),
    *("gates on heads and neurons + low-rank", "gates on heads and neurons + low-rank + rows"),
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process, one thread."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(program, "in_fresh_process", lambda function, *arguments: function(*arguments))
    yield
    torch.set_num_threads(threads)


def test_from_end_to_end(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "model", "bert"), tmp_path / "out" / "gates.json"
    argv = [
        *("--model", str(model), "--data", str(write_rows(tmp_path / "rows.csv")), "--out", str(out)),
        *("--work", str(tmp_path / "work"), "--removed", "0.2", "--removed", "0.4", "--epochs", "4"),
        *("--threads", "1", "--jobs", "1", "--rounds", "2"),
    ]
    assert program.main([*argv, "--seed", "0"]) == 0
    content = json.loads(out.read_text())
    assert len(content["runs"]) == 2 + 4 * 2
    for run in content["runs"]:
        gated = run["name"].startswith("gates")
        assert run["steps"] == 12
        assert run["removed"] >= run["asked"] if gated else run["removed"] == 0
        assert not gated or run["gap"] < 1e-4
    weights = {(run["name"], run["asked"]): run["weights"] for run in content["runs"]}
    assert all(weights[name, 0.4] < weights[name, 0.2] < weights["dense", 0] for name in NAMES[2:])
    trained = {run["name"]: run["trained_weights"] for run in content["runs"]}
    assert trained[NAMES[5]] - trained[NAMES[4]] == 42 * 16  # words by width
    assert set(content["step_times"]) == set(NAMES)
    assert len(content["latency"]) == 1 + 4 * 2
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in NAMES)
    assert out.with_suffix(".md").read_text() in printed
    for plot in ("gates.png", "gates_open.png"):
        assert (out.parent / plot).stat().st_size > 5000

    done = {(run["name"], run["asked"]): run for run in content["runs"]}
    trained_again = []

    def replayed(function: Callable[..., Any], *arguments: Any) -> Any:
        """What the first seed found: whether it goes on does not depend on it."""
        if function is not program.train:
            return content["latency" if function is program.latencies else "step_times"]
        contender, config, *_ = arguments
        trained_again.append(config.seed)
        return {key: x for key, x in done[contender.name, contender.removed].items() if key != "seed"}

    monkeypatch.setattr(program, "in_fresh_process", replayed)
    assert program.main([*argv, "--seed", "0", "--seed", "1"]) == 0
    assert trained_again == [1] * len(content["runs"])
    again = json.loads(out.read_text())
    assert again["runs"][: len(content["runs"])] == content["runs"]
    assert len(again["runs"]) == 2 * len(content["runs"])
    assert program.main([*argv, "--removed", "0.1"]) == 2
    assert "other settings" in capsys.readouterr().err
