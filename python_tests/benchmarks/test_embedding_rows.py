"""The benchmark of training a few embedding rows: what it finds on a small model, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import embedding_contenders as contenders
import embedding_rows as bench
from embedding_contenders import DENSE, HAND, KINDS, OURS, SHIRA, SPARSE, TOKENS
from kernels.compare import WrongResult

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


@pytest.fixture(scope="module")
def task() -> contenders.Task:
    return contenders.make_task(small=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("rows") / "new" / "rows.json"
    assert bench.main(["--small", "--seconds", "0", "--out", str(out)]) == 0
    assert list(out.parent.iterdir()) == [out], "nothing unfinished lies beside it"
    return dict(json.loads(out.read_text()))


def test_everybody_is_measured(found: dict[str, Any]) -> None:
    records = {record["name"]: record for record in found["records"]}
    assert list(records) == [bench.FROZEN, OURS, TOKENS, HAND, DENSE, SPARSE, SHIRA]
    assert {len(times) for times in found["seconds"].values()} == {found["rounds"]}
    assert all(records[name]["error"] < contenders.TOLERANCE for name in KINDS)
    assert [records[name]["steps_checked"] for name in KINDS] == [3, 3, 3, 1, 1, 1]
    assert found["bar"]["found"] == records[TOKENS]["at_least"]
    text = bench.table(found)
    assert len(text.splitlines()) == 2 + len(records)
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_nothing_of_table_size_is_saved_or_made(found: dict[str, Any]) -> None:
    records = {record["name"]: record for record in found["records"]}
    bare, ours, limit = records[bench.FROZEN], records[OURS], found["table_bytes"]
    assert found["nothing_of_table_size"]
    assert ours["saved_of_table_size"] == ours["made_of_table_size"] == 0
    # The ids and the head's input are saved for the gradients of the rows, and nothing else.
    rows, width = found["table"]
    assert ours["saved_bytes"] == bare["saved_bytes"] + found["tokens"] * (8 + 4 * width)
    # The largest tensor is that of the frozen model too: the logits.
    assert ours["largest_made_bytes"] == bare["largest_made_bytes"] == 4 * found["tokens"] * rows < limit
    assert ours["largest_allocation_bytes"] < limit
    assert ours["peak_bytes"] < bare["peak_bytes"] + limit


def test_the_measures_see_what_the_others_make(found: dict[str, Any]) -> None:
    records = {record["name"]: record for record in found["records"]}
    limit = found["table_bytes"]
    assert records[TOKENS]["saved_of_table_size"] == 1
    assert records[TOKENS]["made_of_table_size"] == 4  # two composed tables, two gradients
    assert records[HAND]["made_of_table_size"] == records[DENSE]["made_of_table_size"] == 3  # two gradients, their sum
    for name in (TOKENS, HAND, DENSE, SHIRA):
        assert records[name]["largest_made_bytes"] >= limit
        assert records[name]["largest_allocation_bytes"] >= limit
    assert records[SPARSE]["peak_bytes"] >= records[OURS]["peak_bytes"] + 2 * limit  # moments, and a table of its own


def test_refusals_are_found(found: dict[str, Any]) -> None:
    embedding, head, tied = found["refused"].values()
    assert "Embedding(800, 128) is not supported" in embedding
    assert "not the same dimensions" in head
    assert "does not support dense gradients" in tied


def test_what_is_accepted_after_all_is_not_called_refused(
    task: contenders.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "shira_on", lambda *_: None)
    with pytest.raises(WrongResult, match="no longer refused"):
        contenders.refusals(task)


def test_rows_that_went_elsewhere_get_no_time(task: contenders.Task) -> None:
    kind = KINDS[OURS]
    wanted = contenders.expected(task, kind)

    def hesitant(model: nn.Module, rows: torch.Tensor) -> contenders.Contender:
        contender = kind.make(model, rows)
        calls = iter((True, True, False))
        return replace(contender, update=lambda: contender.update() if next(calls) else None)

    assert contenders.check(task, OURS, kind, wanted) < 1e-5
    with pytest.raises(WrongResult, match="gets no time"):
        contenders.check(task, OURS, replace(kind, make=hesitant), wanted)
    with pytest.raises(WrongResult, match="gets no time"):
        contenders.check(task, OURS, kind, torch.full_like(wanted, torch.nan))


def test_a_changed_row_that_was_not_selected_gets_no_time(task: contenders.Task) -> None:
    kind = KINDS[OURS]
    wanted = contenders.expected(task, kind)
    other = next(row for row in range(800) if row not in task.rows.tolist())

    def careless(model: nn.Module, rows: torch.Tensor) -> contenders.Contender:
        contender = kind.make(model, rows)

        def update() -> None:
            contender.update()
            with torch.no_grad():
                contenders.embedding(model).weight[other, 0] *= 1 + 2**-20

        return replace(contender, update=update)

    with pytest.raises(WrongResult, match="not selected"):
        contenders.check(task, OURS, replace(kind, make=careless), wanted)


def test_each_source_of_the_gradient_counts(task: contenders.Task) -> None:
    """The three oracles differ, so that no contender passes for what it is not."""
    oracles = [contenders.expected(task, replace(KINDS[name], steps=1)) for name in (OURS, SPARSE, SHIRA)]
    start = task.table.detach()[task.rows]
    for i, oracle in enumerate(oracles):
        for other in oracles[:i]:
            assert (oracle - other).norm() > 100 * contenders.TOLERANCE * (oracle - start).norm()


def test_a_wrong_result_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise WrongResult("gets no time")

    monkeypatch.setattr(bench, "check", fail)
    out = tmp_path / "rows.json"
    out.write_text("of before")
    with pytest.raises(WrongResult):
        bench.main(["--small", "--seconds", "0", "--out", str(out)])
    assert out.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [out]


def test_shares_are_differences_within_a_round() -> None:
    """Rounds differ by a factor of ten; the shares do not."""
    base = [0.1, 1.0, 0.3, 0.2, 0.5]
    times = {bench.FROZEN: base, bench.AGAIN: [b + 0.002 for b in base]}
    times |= {OURS: [b + 0.011 for b in base], TOKENS: [b + 0.201 for b in base]}
    share, resolution = bench.shares(times)
    assert share[OURS]["median"] == pytest.approx(0.010)
    assert share[TOKENS]["low"] == pytest.approx(0.200)
    assert resolution == pytest.approx(0.002)
    assert bench.at_least(share[TOKENS], share[OURS], resolution) == pytest.approx(20)
    # What cannot be told from nothing is not taken for less than what can be resolved.
    assert bench.at_least(share[TOKENS], {"high": -1.0}, resolution) == pytest.approx(100)
    assert bench.at_least({"low": -0.1}, share[OURS], resolution) == 0


def test_storages_count_each_once_and_sparse_parts() -> None:
    x = torch.zeros(10, 4)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 5), (7, 5), check_invariants=True)
    assert sorted(bench.storages([x, x[1], (sparse,)]).values()) == [16, 40, 160]


def test_highest_counts_what_was_given_back() -> None:
    assert bench.highest([100, 50, -100, 60, -50, -60]) == 150
