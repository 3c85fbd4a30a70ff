"""Tasks for language models: what a docstring becomes, and that held-out prompts are not like those trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.comparing import language_tasks as tasks
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
