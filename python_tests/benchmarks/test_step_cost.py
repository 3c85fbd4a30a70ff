"""The experiment on the cost of a step: what each contender trains, and the table and figure of its results."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from benchmarks import step_cost  # noqa: E402

VOCABULARY, WIDTH, INNER = 49152, 48, 96


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).train()


PROJECTIONS = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
BLOCKS = 4 * WIDTH * WIDTH + 3 * 64 * WIDTH  # one of each matrix, which is as wide as a block or less
TRAINED = {
    "frozen": 0,
    "dense, AdamW": VOCABULARY * WIDTH + PROJECTIONS + 3 * WIDTH,
    "LoRA r=16 (PEFT), AdamW": 16 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER)),
    "SHiRA r=16 (PEFT), AdamW": 16 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER)),
    "1 % of elements, SparseAdamW": 4 * (int(WIDTH * WIDTH / 100) + 1) + 3 * (int(WIDTH * INNER / 100) + 1),
    "5 % of columns, SparseAdamW": 4 * 3 * WIDTH + 2 * 3 * INNER + 5 * WIDTH,
    "5 % in blocks of 64 x 64, SparseAdamW": BLOCKS,
    "100 embedding rows, SparseAdamW": 100 * WIDTH,
    "1 % of columns, SparseAdamW": 4 * WIDTH + 2 * INNER + WIDTH,
    "5 % of rows, SparseAdamW": 4 * 3 * WIDTH + 2 * 5 * WIDTH + 3 * INNER,
    "1 % of rows, SparseAdamW": 4 * WIDTH + 2 * WIDTH + INNER,
    "1 % in blocks of 64 x 64, SparseAdamW": BLOCKS,
}


def test_every_contender_is_expected() -> None:
    assert list(TRAINED) == list(step_cost.CONTENDERS)


@pytest.mark.parametrize("name", TRAINED)
def test_a_contender_trains_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    monkeypatch.setattr(step_cost, "language_model", lambda name: model)
    mine, theirs = multiprocessing.Pipe()
    threads = torch.get_num_threads()
    thread = threading.Thread(target=step_cost.work, args=(theirs, "tiny", name, 1), daemon=True)
    thread.start()

    def received() -> Any:
        assert mine.poll(60), "the contender failed"
        return mine.recv()

    facts = received()
    ids = torch.randint(VOCABULARY, (2, 8))
    for _ in range(2):
        mine.send(ids)
        assert received() > 0
    mine.send(None)
    facts |= received()
    thread.join()
    torch.set_num_threads(threads)
    assert facts["peak_bytes"] >= 0
    assert facts["kept_bytes"] > 0
    assert facts["trained"] == TRAINED[name]
    assert facts["weights"] == sum(value.numel() for value in before.values())
    after = dict(model.named_parameters())
    changed = sum(int((after[key] != value).sum()) for key, value in before.items() if key in after)
    if "SparseAdamW" in name:
        assert 0 < changed <= facts["trained"]
        assert facts["shipped"] >= 4 * facts["trained"]
    elif name.startswith("dense"):
        assert changed > PROJECTIONS


def test_only_columns_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(VOCABULARY, (2, 8))
    kept = {}
    for name in ("1 % of elements, SparseAdamW", step_cost.COLUMNS, step_cost.LORA):
        model, *_ = step_cost.CONTENDERS[name](tiny())
        kept[name] = step_cost.kept_bytes(model, ids)
    assert kept[step_cost.COLUMNS] < kept["1 % of elements, SparseAdamW"] < kept[step_cost.LORA]


def test_table_and_figure(tmp_path: Path) -> None:
    faster = {"low": 1.0, "median": 1.5, "high": 2.0}
    one = {"trained": 1234, "shipped": 2**21, "peak_bytes": 3 * 2**20, "step_seconds": 0.25}
    one |= {"kept_bytes": 4 * 32 * 2000, **{f"faster_than_{name}": faster for name in step_cost.BESIDE}}
    content = {
        "machine": {"gpu": None, "cpu": "a CPU", "versions": {"torch": "2"}},
        "commit": "abc",
        "command": "python -m benchmarks step-cost",
        "settings": {"model": "tiny", "rounds": 3, "samples": 2, "length": 16},
        "weights": 5678,
        "contenders": dict.fromkeys(TRAINED, one),
    }
    text = step_cost.table(json.loads(json.dumps(content)))
    cell = "1.50 (1.00 to 2.00)"
    assert f"| dense, AdamW | 1,234 | 250 | {cell} | {cell} | {cell} | 2.0k | 3 MiB | 2 MiB |" in text
    (figure,) = step_cost.draw(content, tmp_path / "step_cost.json")
    assert figure.read_bytes().startswith(b"\x89PNG")
