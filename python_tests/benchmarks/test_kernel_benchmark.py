"""The kernel benchmarks: floors from sizes alone, the program on tiny inputs, and the comparison of two commits."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import study, timing
from benchmarks.kernels import base, case, run
from benchmarks.kernels.case import SECTOR, Case, Contender, Floor, Problem, sector_bytes

CASES = run.cases(small=True, sizes="gpu")
# Bytes of a problem are counted on its data; those of a floor are expected, for sectors of a GPU, and each read once.
COUNTED_OTHERWISE = ("topk", "fisher_embedding_", "adamw_rows_", "masked_grad_embedding", "masked_grad_linear, 0.1")
NOT_COUNTED = ("gated Linear", "masked_grad_linear, 2 rows")  # by the problem; or more of it
each_case = pytest.mark.parametrize("found", CASES, ids=lambda found: found.name)


def case_of(name: str, **floor: Any) -> Case:
    found = next(found for found in CASES if found.name.startswith(name))
    return dataclasses.replace(found, floor=dataclasses.replace(found.floor, **floor))


def entry(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "extra_bytes": None, "warm": {"median_seconds": seconds}, **more}


# ---- floors


@each_case
def test_floors_are_what_the_problems_count(found: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, but for chance: of a few hundred elements a tenth more or less is drawn."""
    monkeypatch.setattr(case, "LINE", SECTOR)
    if found.name.startswith(NOT_COUNTED):
        pytest.skip("the problem does not count the same bytes")
    counted, floor = found.make().bytes_moved, found.floor
    if "sectors" in floor.formula:
        assert counted == pytest.approx(floor.bytes, rel=0.3)
    elif found.name.startswith("topk"):
        assert floor.bytes < counted  # the passes of a radix select
    else:
        assert counted == pytest.approx(floor.bytes, rel=0.1 if found.name.startswith(COUNTED_OTHERWISE) else 0.01)


def test_sectors_of_random_elements() -> None:
    chosen = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0)) < 0.02
    touched = chosen.view(-1, SECTOR // 2).any(1).sum() * SECTOR
    assert sector_bytes(chosen.numel(), 0.02, 2) == pytest.approx(float(touched), rel=0.01)
    assert sector_bytes(1600, 1.0, 2) == 3200


def test_the_longer_floor_counts() -> None:
    floor = Floor(12.0, "", operations=200.0)
    assert floor.seconds(6.0, 100.0) == floor.seconds(60.0, 100.0) == 2.0
    assert floor.seconds(4.0, 100.0) == 3.0


def test_without_a_gpu_it_prints_floors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--floors"]) == 0
    text = capsys.readouterr().out
    assert all(f"| {found.name} |" in text for found in run.cases(small=False, sizes="gpu"))
    written = (study.RESULTS / "gpu_floors.md").read_text()
    assert text == written, "write it anew: python -m benchmarks kernels --floors > benchmarks/results/gpu_floors.md"
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            run.main(["--sizes", "gpu"])
        assert "torch sees no GPU" in capsys.readouterr().err


# ---- the program


@pytest.mark.parametrize("sizes", ["cpu", "gpu"])
def test_a_few_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: str) -> None:
    out = tmp_path / "kernels.json"
    argv = ["--small", "--seconds", "0", "--sizes", sizes, "--only", "scatter_", "--out", str(out)]
    assert run.main(argv) == 0
    content = json.loads(out.read_text())
    wanted = run.cases(True, sizes, "scatter_")
    assert [record["case"] for record in content["results"]] == [found.name for found in wanted]
    assert content["command"] == f"python -m benchmarks kernels {' '.join(argv)}"
    assert content["machine"]["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    on_cpu = timing.DEVICE.type == "cpu"
    for record, found in zip(content["results"], wanted, strict=True):
        ours, *others = record["contenders"]
        states = found.states if on_cpu else ["warm"]
        assert ours["name"] == found.ours
        assert {each["name"] for each in others} >= set(found.versus)
        assert all(each[state]["median_seconds"] > 0 for each in (ours, *others) for state in states)
        rounds = {len(each[state]["seconds"]) for each in (ours, *others) for state in states}
        assert not on_cpu or rounds == {run.MIN_ROUNDS}
        assert all(each["warm"]["ratio"] > 0 for each in others)
        assert all((each["extra_bytes"] is None) == on_cpu for each in (ours, *others))
        assert record["floor_seconds"] == pytest.approx(record["bytes"] / content["copy_bytes_per_second"], rel=1e-3)
        assert record["share_of_floor"] == pytest.approx(
            record["floor_seconds"] / ours["warm"]["median_seconds"], rel=1e-3
        )
        assert bool(record["bars"]) == (sizes == "gpu")
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out


def test_all_contenders_can_be_timed_and_a_family_chosen(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    assert run.main(["--small", "--seconds", "0", "--sizes", "cpu", "--only", "topk", "--all", "--out", str(out)]) == 0
    for record, found in zip(json.loads(out.read_text())["results"], run.cases(True, "cpu", "topk"), strict=True):
        assert [each["name"] for each in record["contenders"]] == [*found.contenders]
        assert f"topk {case.backends('topk')[-1]}" in found.contenders


def test_what_fails_is_noted_and_does_not_hide_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = case_of("gather, 1 %")

    def failing(_: object) -> Contender:
        raise RuntimeError("no memory\nleft")

    def wrong(problem: Problem) -> Contender:
        return Contender(lambda: None, lambda: [torch.zeros_like(problem.expected[0])])

    made = {**found.contenders, "torch.index_select": wrong, "t[idx]": failing}
    broken = dataclasses.replace(found, contenders=made)
    monkeypatch.setattr(run, "cases", lambda *_: [broken])
    assert run.main(["--small", "--seconds", "0", "--out", str(tmp_path / "gpu.json")]) == 1
    (record,) = json.loads((tmp_path / "gpu.json").read_text())["results"]
    missing = {each["name"]: each["failed"] for each in record["contenders"] if "failed" in each}
    assert missing.keys() == {"torch.index_select", "t[idx]"}
    assert missing["torch.index_select"].startswith("WrongResult")
    assert record["share_of_floor"] > 0
    assert "| t[idx] | failed |  |  |  |  |  | RuntimeError: no memory |" in capsys.readouterr().out


def test_a_problem_too_large_for_the_machine_is_noted() -> None:
    def too_large() -> Problem:
        raise RuntimeError("no memory")

    record = run.measure(dataclasses.replace(case_of("topk"), make=too_large), 0)
    assert record["contenders"] == [{"name": "topk", "failed": "RuntimeError: no memory"}]


@pytest.mark.parametrize(
    "found", [found for found in CASES if found.floor and found.floor.operations], ids=lambda found: found.name
)
def test_products_are_checked_and_timed(found: Case) -> None:
    record = run.measure(found, 0)
    assert [each for each in record["contenders"] if "failed" in each] == []


# ---- bars


@pytest.mark.parametrize(("seconds", "met"), [(7e-6, True), (9e-6, False)])
def test_bars_can_be_missed(seconds: float, met: bool) -> None:
    found, fused = case_of("adamw_ of compact values, 1 %", most=8e-6), "torch.optim.AdamW(fused=True)"
    failed = {"name": "compact AdamW(fused=True) + index_copy_", "failed": "RuntimeError"}
    record = {"floor_seconds": 5e-6, "contenders": [entry(found.ours, seconds), entry(fused, 150e-6), failed]}
    bars = run.judged(found, record)["bars"]
    assert record["contenders"][1]["warm"]["ratio"] == pytest.approx(150e-6 / seconds, rel=1e-3)
    assert bars["at most 8 µs"] is met
    assert bars["at least 60% of the floor's speed"] is met
    assert bars[f"at least 20x faster than {fused}"] is met


@pytest.mark.parametrize(("extra", "met"), [(None, None), (100, True), (101, False)])
def test_memory_is_judged(extra: int | None, met: bool | None) -> None:
    found = case_of("masked_grad_linear, 5", most_extra=100)
    ours = entry(found.ours, 1.0, extra_bytes=extra)
    dense = entry("dense gradient + index_select", 0.9)
    bars = run.judged(found, {"floor_seconds": 0.5, "contenders": [ours, dense]})["bars"]
    assert bars["at most 0.0001 MB of memory"] is met
    assert bars["at least 100% of the speed of dense gradient + index_select"] is False


def test_bars_are_met_at_their_edge_and_unknown_without_a_rival() -> None:
    found = dataclasses.replace(case_of("gather, 1 %", share=0.5, most=2.0), versus={"t[idx]": 3, "other": 2})
    others = [entry("t[idx]", 6.0), {"name": "other", "failed": "RuntimeError"}]
    bars = run.judged(found, {"floor_seconds": 1.0, "contenders": [entry(found.ours, 2.0), *others]})["bars"]
    assert list(bars.values()) == [True, True, True, None]


def test_a_bar_is_judged_in_every_state() -> None:
    found = dataclasses.replace(run.cases(True, "cpu", "gather")[0], versus={"t[idx]": 3})
    theirs = entry("t[idx]", 6.0, cold={"median_seconds": 6.0, "ratio": 2.0})
    theirs["warm"]["ratio"] = 4.0  # of rounds, which is not the ratio of the medians
    ours = entry(found.ours, 2.0, cold={"median_seconds": 3.0})
    bars = run.judged(found, {"floor_seconds": 1.0, "contenders": [ours, theirs]})["bars"]
    assert bars == {"at least 3x faster than t[idx]": True, "at least 3x faster than t[idx], cold": False}


# ---- rounds


def test_every_contender_is_timed_once_a_round_in_changing_order() -> None:
    calls: list[tuple[str, int]] = []

    def sample(name: str) -> Any:
        return lambda done: calls.append((name, done)) or float(done)

    times = timing.interleaved({name: sample(name) for name in "abc"}, least=20)
    assert times == {name: [float(done) for done in range(20)] for name in "abc"}
    rounds = [tuple(name for name, done in calls if done == number) for number in range(20)]
    assert [done for _, done in calls] == [number for number in range(20) for _ in range(3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3
    assert len(timing.interleaved({"a": sample("a")}, least=2, most=4, budget=60)["a"]) == 4


# ---- two commits


class FakeWorker:
    """Takes so many seconds for every sample of the cases that it has."""

    def __init__(self, seconds: float, refused: str | None = None) -> None:
        self.seconds, self.refused, self.facts = seconds, refused, {"package": "", "without_native": None}

    def ask(self, what: str, *about: Any) -> Any:
        return self.refused if what == "prepare" else self.seconds

    def sample(self, state: str, _: int) -> float:
        return self.seconds

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("new", "refused", "slower_than", "status"),
    [(1.02, None, 1.03, 0), (1.04, None, 1.03, 1), (1.04, None, None, 0), (1.0, "WrongResult", None, 1)],
)
def test_a_slower_commit_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    new: float,
    refused: str | None,
    slower_than: float | None,
    status: int,
) -> None:
    workers = iter([FakeWorker(1.0), FakeWorker(new, refused)])
    monkeypatch.setattr(base, "built", lambda _: Path())
    monkeypatch.setattr(base, "Worker", lambda *_: next(workers))
    arguments = argparse.Namespace(base="old", slower_than=slower_than, seconds=0.0, out=None)
    assert base.main(arguments, run.cases(True, "cpu", "topk")[:1], study.origin("kernels", [])) == status
    printed = capsys.readouterr().out
    assert ("slower warm, cold" in printed) == (status == 1 and not refused)
    assert (f"{new:.3f} ({new:.3f} to {new:.3f})" in printed) == (not refused)
    assert not refused or "| new: WrongResult |" in printed


def test_a_worker_prepares_times_and_tells_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole process, with the package of this tree."""
    worker = base.Worker(study.ROOT, argparse.Namespace(small=True, sizes="cpu"))
    try:
        name = run.cases(True, "cpu", "topk")[-1].name
        assert worker.ask("prepare", name) is None
        assert 0 < worker.sample("warm", 0) < 1
        assert 0 < worker.sample("cold", 0) < 1
        assert worker.ask("prepare", "no such case") == "there is no such case"
    finally:
        worker.close()
    assert worker.process.returncode == 0
    with pytest.raises(RuntimeError, match="should load the package of"):
        base.Worker(tmp_path, argparse.Namespace(small=True, sizes="cpu"))


def test_a_commit_that_is_not_there_is_named() -> None:
    with pytest.raises(study.Refused, match="git knows no commit 'no-such-revision'"):
        base.built("no-such-revision")
