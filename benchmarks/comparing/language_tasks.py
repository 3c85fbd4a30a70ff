"""What a language model is fine-tuned to write: the answer to a prompt, from what installed packages carry.

    translation-de, -es, -fr    a string of a message catalogue; its translation
    summary                     the prose of a docstring, without its first paragraph; that paragraph, of one line
    topic                       the prose of a docstring; the subpackage it is from
    arithmetic                  two or three numbers below a hundred to add and subtract; the result, right or wrong

Splits are fixed: which one a pair belongs to is decided by its text alone, of `summary` by the answer. A held-out pair
whose prompt shares `RUN` words in a row with a prompt of the training split, or equals one if it has fewer words, is
left out; `left_out` says how many were.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..finetuning.text_task import SPLITS, DataError, load_task, prose, read_docstrings, split_of
from ..translating.parallel_text import Pair, from_packages
from ..translating.prompts import TRANSLATION

RUN = 8
PROBLEMS = 6000  # that are drawn; fewer are different
DOCUMENTED = ("scipy", "sympy", "numpy", "networkx")
SUMMARY_WORDS, BODY_WORDS = range(4, 17), range(12, 61)  # of a docstring that is used; a longer body is cut


@dataclass(frozen=True)
class LanguageTask:
    """Prompts and answers for each split."""

    form: str  # of a prompt: what it is about stands in the braces
    pairs: dict[str, list[Pair]]
    source: str
    left_out: int
    checkable: bool = False  # whether an answer is right or wrong

    @property
    def sizes(self) -> dict[str, int]:
        return {split: len(self.pairs[split]) for split in SPLITS}


def translation(language: str) -> LanguageTask:
    (text,) = from_packages([language])
    return apart(TRANSLATION, text.pairs, text.source)


def summary() -> LanguageTask:
    found: dict[str, str] = {}  # of equal bodies, the first summary
    for package in DOCUMENTED:
        for doc, _ in read_docstrings(folder(package)):
            if pair := summarised(doc):
                found.setdefault(*pair)
    pairs: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for body, line in sorted(found.items()):
        pairs[split_of(line.casefold())].append((body, line))  # equal summaries are on one side
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in DOCUMENTED)
    return apart("{}\nIn short:", pairs, f"docstrings of {versions}")


def topic() -> LanguageTask:
    task = load_task("classification")
    pairs = {
        split: [(" ".join(text.split()[: BODY_WORDS[-1]]), task.labels[label]) for text, label in task.rows[split]]
        for split in SPLITS
    }
    return apart("{}\nFrom:", pairs, task.source)


def arithmetic() -> LanguageTask:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise DataError(f"this task needs {error.name}: make .venv/reasoning, or pip install reasoning-gym") from None
    sizes = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    problems = reasoning_gym.create_dataset("chain_sum", seed=0, size=PROBLEMS, **sizes)
    pairs: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for sum_, answer in sorted({each["metadata"]["expression"]: each["answer"] for each in problems}.items()):
        pairs[split_of(sum_)].append((sum_, answer))
    version = importlib.metadata.version("reasoning-gym")
    return replace(apart("{} =", pairs, f"chain_sum of reasoning-gym {version}"), checkable=True)


TASKS: dict[str, Callable[[], LanguageTask]] = {
    **{f"translation-{language}": partial(translation, language) for language in ("de", "es", "fr")},
    "summary": summary,
    "topic": topic,
    "arithmetic": arithmetic,
}


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"this task reads the sources of {package}: pip install {package}")
    return Path(spec.origin).parent


def summarised(doc: str) -> Pair | None:
    """The prose that follows the first paragraph, and that paragraph, if both are of a usable length."""
    first, _, rest = doc.strip().partition("\n\n")
    line = prose(first)
    body = prose(rest).split()
    if "\n" in first.strip() or len(line.split()) not in SUMMARY_WORDS or len(body) < BODY_WORDS[0]:
        return None
    return " ".join(body[: BODY_WORDS[-1]]), line


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every `RUN` words in a row; all of them where there are fewer."""
    words = text.casefold().split()
    return (tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1)))


def apart(form: str, pairs: dict[str, list[Pair]], source: str) -> LanguageTask:
    """The task, without held-out pairs whose prompt resembles one that is trained on."""
    train, *held_out = SPLITS
    seen = set(every(prompt for prompt, _ in pairs[train]))
    kept = {split: [pair for pair in pairs[split] if seen.isdisjoint(runs(pair[0]))] for split in held_out}
    left_out = sum(len(pairs[split]) - len(kept[split]) for split in held_out)
    if empty := [split for split, rest in kept.items() if not rest]:
        raise DataError(f"{source}: nothing is left of {' and '.join(empty)} that is not like a text to train on")
    return LanguageTask(form, {train: pairs[train], **kept}, source, left_out)


def every(texts: Iterable[str]) -> Iterator[tuple[str, ...]]:
    return (run for text in texts for run in runs(text))
