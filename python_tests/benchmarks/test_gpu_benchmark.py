"""The table of kernels at large sizes: floors from sizes alone, and the program on tiny inputs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "kernels"))

import compare
import gpu as program
import gpu_matmul_rows
from compare import Contender, Problem
from gpu_rows import SECTOR, Row, sector_bytes

ROWS = program.rows(small=True)
# Bytes of a problem are counted on its data; those of a floor are expected, for sectors of a GPU, and each read once.
COUNTED_OTHERWISE = ("topk", "fisher_embedding_", "adamw_rows_", "masked_grad_embedding", "masked_grad_linear, 0.1")
NOT_COUNTED = ("gated Linear", "masked_grad_linear, 2 rows")  # by the problem; or more of it


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.case.name.startswith(name))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case.name)
def test_floors_are_what_the_problems_count(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, but for chance: of a few hundred elements a tenth more or less is drawn."""
    monkeypatch.setattr(compare, "LINE", SECTOR)
    if row.case.name.startswith(NOT_COUNTED):
        pytest.skip("the problem does not count the same bytes")
    counted = row.case.make().bytes_moved
    if "sectors" in row.formula:
        assert counted == pytest.approx(row.bytes, rel=0.3)
    elif row.case.name.startswith("topk"):
        assert row.bytes < counted  # the passes of a radix select
    else:
        assert counted == pytest.approx(row.bytes, rel=0.1 if row.case.name.startswith(COUNTED_OTHERWISE) else 0.01)


def test_sectors_of_random_elements() -> None:
    chosen = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0)) < 0.02
    touched = chosen.view(-1, SECTOR // 2).any(1).sum() * SECTOR
    assert sector_bytes(chosen.numel(), 0.02, 2) == pytest.approx(float(touched), rel=0.01)
    assert sector_bytes(1600, 1.0, 2) == 3200


def test_a_few_rows_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert program.main(["--small", "--only", "scatter_", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    names = [row.case.name for row in ROWS if "scatter_" in row.case.name]
    assert [record["case"] for record in content["results"]] == names
    for record in content["results"]:
        assert all(each["median_seconds"] > 0 for each in record["contenders"])
        assert record["floor_seconds"] == pytest.approx(record["bytes"] / content["copy_bytes_per_second"], rel=1e-3)
        assert all(each["extra_bytes"] is None for each in record["contenders"]) == (compare.DEVICE.type == "cpu")
        assert record["share_of_floor"] == pytest.approx(
            record["floor_seconds"] / record["contenders"][0]["median_seconds"], rel=1e-3
        )
        assert record["bars"]
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out


def test_what_fails_is_noted_and_does_not_hide_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_of("gather, 1 %")

    def failing(_: object) -> Contender:
        raise RuntimeError("no memory\nleft")

    def wrong(problem: Problem) -> Contender:
        return Contender(lambda: None, lambda: [torch.zeros_like(problem.expected[0])])

    made = {**row.case.contenders, "torch.index_select": wrong, "t[idx]": failing}
    broken = dataclasses.replace(row, case=dataclasses.replace(row.case, contenders=made))
    monkeypatch.setattr(program, "rows", lambda small: [broken])
    assert program.main(["--small", "--out", str(tmp_path / "gpu.json")]) == 1
    (record,) = json.loads((tmp_path / "gpu.json").read_text())["results"]
    missing = {each["name"]: each["failed"] for each in record["contenders"] if "failed" in each}
    assert missing.keys() == {"torch.index_select", "t[idx]"}
    assert missing["torch.index_select"].startswith("WrongResult")
    assert record["share_of_floor"] > 0
    assert record["times_faster"] == {}
    assert "| t[idx] | failed |  |  |  |  | RuntimeError: no memory |" in capsys.readouterr().out


def test_a_problem_too_large_for_the_machine_is_noted() -> None:
    def too_large() -> Problem:
        raise RuntimeError("no memory")

    row = row_of("topk")
    record = program.measure(dataclasses.replace(row, case=dataclasses.replace(row.case, make=too_large)))
    assert record["contenders"] == [{"name": "topk", "failed": "RuntimeError: no memory"}]


@pytest.mark.parametrize(("seconds", "met"), [(7e-6, True), (9e-6, False)])
def test_bars_can_be_missed(seconds: float, met: bool) -> None:
    row = dataclasses.replace(row_of("adamw_ of compact values, 1 %"), most=8e-6)
    fused = "torch.optim.AdamW(fused=True)"
    record = {
        "floor_seconds": 5e-6,
        "contenders": [
            {"name": row.case.ours, "median_seconds": seconds},
            {"name": fused, "median_seconds": 150e-6},
            {"name": "compact AdamW(fused=True) + index_copy_", "failed": "RuntimeError"},
        ],
    }
    found = program.judged(row, record)
    assert found["times_faster"] == {fused: pytest.approx(150e-6 / seconds, rel=1e-3)}
    assert found["bars"]["at most 8 µs"] is met
    assert found["bars"]["at least 60% of the floor's speed"] is met
    assert found["bars"][f"at least 20x faster than {fused}"] is met


def test_the_longer_floor_counts() -> None:
    row = dataclasses.replace(row_of("masked_grad_linear, 5"), bytes=12.0, operations=200.0)
    assert row.floor(6.0, 100.0) == row.floor(60.0, 100.0) == 2.0
    assert row.floor(4.0, 100.0) == 3.0


@pytest.mark.parametrize(("extra", "met"), [(None, None), (100, True), (101, False)])
def test_memory_is_judged(extra: int | None, met: bool | None) -> None:
    row = dataclasses.replace(row_of("masked_grad_linear, 5"), most_extra=100)
    ours = {"name": row.case.ours, "median_seconds": 1.0, "extra_bytes": extra}
    dense = {"name": "dense gradient + index_select", "median_seconds": 0.9}
    bars = program.judged(row, {"floor_seconds": 0.5, "contenders": [ours, dense]})["bars"]
    assert bars["at most 0.0001 MB of memory"] is met
    assert bars["at least 100% of the speed of dense gradient + index_select"] is False


def test_bars_are_met_at_their_edge_and_unknown_without_a_rival() -> None:
    row = dataclasses.replace(row_of("gather, 1 %"), share=0.5, most=2.0)
    row = dataclasses.replace(row, case=dataclasses.replace(row.case, versus={"t[idx]": 3, "other": 2}))
    ours = {"name": row.case.ours, "median_seconds": 2.0}
    others = [{"name": "t[idx]", "median_seconds": 6.0}, {"name": "other", "failed": "RuntimeError"}]
    bars = program.judged(row, {"floor_seconds": 1.0, "contenders": [ours, *others]})["bars"]
    assert list(bars.values()) == [True, True, True, None]


@pytest.mark.parametrize("row", gpu_matmul_rows.rows(small=True), ids=lambda row: row.case.name)
def test_products_are_checked_and_timed(row: Row) -> None:
    record = program.measure(row)
    assert [each for each in record["contenders"] if "failed" in each] == []


def test_without_a_gpu_it_prints_floors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--floors"]) == 0
    text = capsys.readouterr().out
    assert all(f"| {row.case.name} |" in text for row in program.rows(small=False))
    assert text == (program.RESULTS / "gpu_floors.md").read_text(), "write it anew: gpu.py --floors"
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            program.main([])
        assert "torch sees no GPU" in capsys.readouterr().err
