"""The benchmark of fully_shard: collectives are called with what shapes predict, and ranks hold what they say."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from benchmarks import sharded
from benchmarks.gpu_training.llama import Shape
from benchmarks.sharding import counting, paper
from benchmarks.sharding.processes import in_group
from benchmarks.step_cost import COLUMNS, DENSE, FROZEN, LORA
from benchmarks.study import Refused

SMALL = Shape("Llama", 128, 320, 2, heads=2, kv_heads=1, vocab=511, tied=False)
RANKS = 2
ELEMENTS, ROWS, _, BLOCKS = sharded.SPARSE
ADDED = {
    FROZEN: [],
    DENSE: [],
    LORA: [size for m, n in SMALL.matrices for size in ((16, n), (m, 16))],
    ELEMENTS: [(math.ceil(m * n / 100),) for m, n in SMALL.matrices],
    ROWS: [(math.ceil(m / 20), n) for m, n in SMALL.matrices],
    COLUMNS: [(m, math.ceil(n / 20)) for m, n in SMALL.matrices],
    BLOCKS: [(math.ceil(m // 64 * (n // 64) / 20), 64, 64) for m, n in SMALL.matrices],
}


def test_counted_is_what_shapes_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sharded.json"
    assert sharded.main(["--small", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    (group,) = content["groups"]
    assert group["processes"] == RANKS
    assert list(group["contenders"]) == list(ADDED)
    blocks, root = paper.blocks_and_root(SMALL)
    every = blocks + root
    assert content["weights"] == SMALL.weights == counting.padded(every, 1)
    for name, added in ADDED.items():
        cost = group["contenders"][name]
        trained = every if name == DENSE else added
        assert cost["trained"] == counting.padded(trained, 1)
        # Rank 0 has the values of its own rows of whole columns; nothing else is gathered after a step but selections.
        expected = counting.beyond(added, RANKS, written=0 if name in (LORA, COLUMNS) else 4)
        if name == DENSE:
            expected["reduced"] = 4 * counting.padded(every, RANKS)
        assert cost["beyond"] == {**expected, "all_reduced": 0}, name
        gathered = sum(kinds["all_gather"] for kinds in cost["communicated"].values())
        values = sum(expected[phase] for phase in counting.PHASES)
        assert gathered == values + 4 * counting.frozen_elements(blocks, root, RANKS), name
        mine = sum(counting.chunk(size, RANKS) for size in trained)
        held = {part: cost["held"][part] for part in ("weights", "values", "moments", "gradients")}
        assert held == {
            "weights": 4 * sum(counting.chunk(size, RANKS) for size in every),
            "values": 0 if name == DENSE else 4 * mine,
            "moments": 8 * mine + 4 * len(trained),  # and the number of steps
            "gradients": 4 * mine,
        }, name
        if name in sharded.SPARSE:
            assert cost["held"]["positions"] > 0
            assert cost["met"] == (sum(expected.values()) <= 4.4 * 4 * counting.padded(added, 1))
        else:
            assert cost["held"]["positions"] == 0
        assert cost["step_seconds"] > 0
    assert group["contenders"][ELEMENTS]["met"]
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "Computed from shapes, not measured" in text


def test_short_chunks_count_as_full_ones() -> None:
    assert counting.chunk((16, 10), 512) == 10
    assert counting.padded([(16, 10), (7,)], 4) == 160 + 8


def test_computed_for_large_models() -> None:
    """Llama-3 70B by hand: K of 1 % of the elements, and 5 % of the columns, of 68.45e9 weights in projections."""
    records = {(each["model"], each["gpus"]): each["contenders"] for each in paper.computed(50.0)}
    contenders = {each["name"]: each for each in records["Llama-3 70B", 64]}
    every, projections, table = 70_553_706_496, 68_451_041_280, 2 * 128_256 * 8192
    for each in contenders.values():
        assert each["weights_gathered"] == pytest.approx(2 * (2 * every - table), rel=1e-3)
        moved = (each["weights_gathered"] + each["beyond"]) * 63 / 64
        assert each["seconds"] == pytest.approx(moved / 50e9)
    elements, columns = contenders["1 % of elements"], contenders["5 % of columns"]
    assert elements["beyond"] == pytest.approx((3 * 4 + 2) * 0.01 * projections, rel=1e-3)
    assert columns["beyond"] == pytest.approx(3 * 4 * 0.05 * projections, rel=1e-2)
    assert elements["held"]["moments"] == pytest.approx(8 * 0.01 * projections / 64, rel=1e-3)
    assert contenders["dense AdamW, all bf16"]["beyond"] == pytest.approx(2 * every, rel=1e-3)


def test_processes_that_take_too_long_are_killed() -> None:
    begin = time.monotonic()
    with pytest.raises(Refused, match="1 processes were not done after 1 seconds"):
        in_group(time.sleep, (600.0,), 1, limit=1.0)
    assert time.monotonic() - begin < 60
