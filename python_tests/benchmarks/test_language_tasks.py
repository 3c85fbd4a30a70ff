"""Tasks for language models: what a docstring becomes, and that held-out prompts are not like those trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import VOCABULARY, ids, transformer

from benchmarks.comparing import language_tasks as tasks
from benchmarks.comparing.tasks import Completion
from benchmarks.finetuning.text_task import DataError

WORDS = "the upper part of each matrix is read and the lower part is never looked at in any case"


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        (f"Solve a banded system of equations.\n\n{WORDS}", (WORDS, "Solve a banded system of equations.")),
        (
            f"  Solve a banded system.\n\n    {WORDS}\n\n    Examples\n    --------\n    >>> 1",
            (WORDS, "Solve a banded system."),
        ),
        (f"Solve.\n\n{WORDS}", None),  # too short a summary
        ("Solve a banded system.\n\nToo short a body.", None),
        (f"Solve a banded\nsystem of equations.\n\n{WORDS}", None),  # not one line
        (f"Solve a banded system of equations. {WORDS}", None),  # no second paragraph
        (f"{WORDS} {WORDS}.\n\n{WORDS}", None),  # too long a summary
    ],
)
def test_a_docstring_becomes_its_body_and_its_summary(doc: str, expected: tuple[str, str] | None) -> None:
    assert tasks.summarised(doc) == expected


def test_a_long_body_is_cut() -> None:
    found = tasks.summarised("Solve a banded system.\n\n" + " ".join([WORDS] * 9))
    assert found is not None
    assert len(found[0].split()) == tasks.BODY_WORDS[-1]


def test_held_out_prompts_that_resemble_trained_ones_are_left_out() -> None:
    eight = "one two three four five six seven eight"
    pairs = {
        "train": [(f"zero {eight} nine", "a"), ("short one", "b")],
        "validation": [(f"other words, {eight.upper()}", "c"), ("one two three four five six seven nine", "d")],
        "test": [("Short ONE", "e"), ("short one more", "f")],
    }
    task = tasks.apart("{}:", pairs, "here")
    assert task.pairs["train"] == pairs["train"]
    assert [answer for _, answer in task.pairs["validation"]] == ["d"]
    assert [answer for _, answer in task.pairs["test"]] == ["f"]
    assert task.left_out == 2
    assert task.sizes == {"train": 2, "validation": 1, "test": 1}
    with pytest.raises(DataError, match="nothing is left of test"):
        tasks.apart("{}:", {**pairs, "test": pairs["train"]}, "here")


def test_summaries_are_read_from_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sub"
    package.mkdir()
    docs = [
        f'def f{i}():\n    """Make thing number {i // 3} of many.\n\n    {WORDS} {i} {"x" * i}\n    """\n'
        for i in range(60)
    ]
    (package / "module.py").write_text("\n".join(docs))
    monkeypatch.setattr(tasks, "DOCUMENTED", ("numpy",))
    monkeypatch.setattr(tasks, "folder", lambda package: tmp_path)
    monkeypatch.setattr(tasks, "RUN", 100)  # these bodies differ in their ends alone
    task = tasks.summary()
    answers = {split: {answer for _, answer in pairs} for split, pairs in task.pairs.items()}
    assert sum(len(pairs) for pairs in task.pairs.values()) == 60
    assert not answers["train"] & (answers["validation"] | answers["test"])
    assert task.source.startswith("docstrings of numpy ")
    assert task.form.format("x") == "x\nIn short:"


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="pip install no_such_package"):
        tasks.folder("no_such_package")


def test_sums_are_right_and_on_one_side_each() -> None:
    pytest.importorskip("reasoning_gym")
    task = tasks.arithmetic()
    assert task.checkable
    seen: set[str] = set()
    for pairs in task.pairs.values():
        for problem, answer in pairs:
            assert eval(problem) == int(answer)
        assert seen.isdisjoint(problem for problem, _ in pairs)
        seen |= {problem for problem, _ in pairs}
    assert len(seen) > 4000


def test_what_a_task_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"needs reasoning_gym: make \.venv/reasoning"):
        tasks.arithmetic()


def test_right_answers_are_those_that_greedy_decoding_writes() -> None:
    model = transformer("llama").eval()
    prompts = ids(6, 4)
    written = model.generate(prompts, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    labels = written.clone()
    labels[:, :4] = -100
    changed = torch.tensor([1, 3, 4])
    labels[changed, torch.tensor([4, 5, 6])] += 1
    labels[changed] %= VOCABULARY
    labels[:, :4] = -100
    batch = {"input_ids": torch.where(labels == -100, written, labels), "labels": labels}
    padded = {
        name: torch.nn.functional.pad(x, (0, 2), value=-100 if name == "labels" else 0) for name, x in batch.items()
    }
    for one in (batch, padded):
        assert Completion.right(SimpleNamespace(autocast=False), model, [one]) == 0.5  # type: ignore[arg-type]
