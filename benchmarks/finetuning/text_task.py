"""The text a model is fine-tuned on: docstrings found on this machine, or a file of your own.

The built-in task: given the prose of a docstring, name the subpackage of scipy or sympy that it comes from. It needs
no network. To keep it a task about meaning, whatever spells out the answer is removed: everything after the first
section heading (Parameters, Examples, References ...), doctest lines and their output, reST directives, and every
mention of ``scipy`` or ``sympy`` with the dotted path that follows it. Ordinary words that happen to name a
subpackage ("matrices", "geometry") stay: they are the subject matter.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.util
import json
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..study import Refused

PACKAGES = ("scipy", "sympy")
MIN_WORDS = 5  # shorter docstrings ("Return the result.") say nothing about where they come from
MIN_TEXTS = 100  # a class with fewer texts would have fewer than ten in the test split
SPLITS = ("train", "validation", "test")

_UNDERLINE = re.compile(r"^([=\-~^*#])\1{2,}$")
_ROLE = re.compile(r":[\w:]+:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`")
_IMPORT_PATH = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)*", re.IGNORECASE)


class DataError(Refused):
    """The text to train on cannot be used; the message says what to change."""


@dataclass
class TextTask:
    """Rows of (text, label id) for each split; ``labels`` is empty for language modelling."""

    rows: dict[str, list[tuple[str, int]]]
    labels: list[str]
    source: str
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = {split: len(self.rows[split]) for split in SPLITS}


def prose(docstring: str) -> str:
    """Return the opening prose of a docstring on one line, without examples, directives or import paths."""
    lines: list[str] = []
    in_example = False
    for line in (raw.strip() for raw in docstring.splitlines()):
        if not line:
            in_example = False
        elif line.startswith(">>>"):
            in_example = True
        elif _UNDERLINE.match(line):
            if len(lines) > 1:  # the line above is a section heading; as the very first line it is the title
                lines.pop()
                break
        elif not in_example and not line.startswith(".. "):
            lines.append(line)
    text = _ROLE.sub(r"\1", " ".join(lines))
    return " ".join(_IMPORT_PATH.sub(" ", text).split())


def docstrings(root: Path, package: str) -> Iterator[tuple[str, str]]:
    """Yield (prose, "package.subpackage") of every docstring that `read_docstrings` finds."""
    return ((prose(doc), f"{package}.{subpackage}") for doc, subpackage in read_docstrings(root))


def read_docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (docstring, subpackage) for every public subpackage below ``root``, in a fixed order.

    Sources are parsed, never imported. Top-level modules, tests and private subpackages (vendored code) are left out.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) < 2 or parts[0].startswith("_") or "tests" in parts:
            continue
        with warnings.catch_warnings():  # other people's invalid escape sequences are not this program's business
            warnings.simplefilter("ignore")
            nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while nodes:
            node = nodes.pop()
            if isinstance(node, documented) and (doc := ast.get_docstring(node)):
                yield doc, parts[0]
            nodes += (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))


def label_texts(
    rows: Iterable[tuple[str, str]], min_words: int = MIN_WORDS, min_texts: int = MIN_TEXTS
) -> list[tuple[str, str]]:
    """Drop short texts, repeats, texts found under two labels, then labels with fewer than ``min_texts`` texts."""
    found: dict[str, set[str]] = defaultdict(set)
    for text, label in rows:
        if len(text.split()) >= min_words:
            found[text].add(label)
    unique = [(text, next(iter(labels))) for text, labels in sorted(found.items()) if len(labels) == 1]
    counts = Counter(label for _, label in unique)
    return [(text, label) for text, label in unique if counts[label] >= min_texts]


def split_of(text: str) -> str:
    """Return the split a text belongs to: 80 % train, 10 % validation, 10 % test, decided by the text alone.

    So a text never changes sides when others are added or removed, on any machine and with any Python.
    """
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return SPLITS[0] if share < 0.8 else SPLITS[1] if share < 0.9 else SPLITS[2]


def read_file(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Read a .jsonl or .csv file of rows that have the columns ``needed``; rows with an empty text are left out."""
    if not path.is_file():
        raise DataError(f"--data: there is no file {path}")
    if path.suffix not in (".jsonl", ".csv"):
        raise DataError(f"--data: {path.name} must end in .jsonl or .csv")
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8", newline="") as file:
        records: Iterable[tuple[int, Any]] = enumerate(csv.DictReader(file) if path.suffix == ".csv" else file, 1)
        for number, record in records:
            if isinstance(record, str):
                if not record.strip():
                    continue
                try:
                    record = json.loads(record)
                except json.JSONDecodeError as error:
                    raise DataError(f"--data: line {number} of {path.name} is not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise DataError(f"--data: line {number} of {path.name} is not a JSON object")
            if missing := [name for name in needed if record.get(name) is None]:
                raise DataError(
                    f"--data: row {number} of {path.name} lacks {' and '.join(map(repr, missing))}; "
                    f"it has {', '.join(map(repr, record)) or 'nothing'}"
                )
            if str(record["text"]).strip():
                rows.append({name: str(record[name]) for name in needed})
    return rows


def load_task(task: str, data: Path | None = None) -> TextTask:
    """Build the splits for ``task`` ("classification" or "causal-lm") from ``data``, or from installed docstrings."""
    if data is not None:
        needed = ("text", "label") if task == "classification" else ("text",)
        pairs = [(row["text"], row.get("label", "")) for row in read_file(data, needed)]
        source = data.name
    else:
        found: list[tuple[str, str]] = []
        for package in PACKAGES:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise DataError(
                    f"the built-in task reads the sources of {package}: pip install {package}, or use --data"
                )
            found += docstrings(Path(spec.origin).parent, package)
        pairs = label_texts(found)
        source = f"docstrings of {' and '.join(PACKAGES)}"
    labels = sorted({label for _, label in pairs}) if task == "classification" else []
    if task == "classification" and len(labels) < 2:
        raise DataError(f"{source}: classification needs at least two different labels, found {len(labels)}")
    ids = {label: number for number, label in enumerate(labels)}
    rows: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for text, label in pairs:
        rows[split_of(text)].append((text, ids.get(label, 0)))
    if empty := [split for split in SPLITS if not rows[split]]:
        raise DataError(f"{source}: {len(pairs)} rows are too few: no text falls into {' or '.join(empty)}")
    return TextTask(rows, labels, source)


Batch = dict[str, Tensor]


def make_batches(
    encoded: list[tuple[list[int], int]], batch_size: int, pad: int, *, causal: bool, seed: int | None = None
) -> list[Batch]:
    """Group texts of like length and pad each batch to its own longest text.

    With a seed, texts are shuffled, sorted by length within pools of 32 batches, and the batches shuffled again: little
    padding, yet other neighbours every epoch. Without one (evaluation) all texts are sorted by length.
    """
    order = list(range(len(encoded)))
    pool = len(order)
    if seed is not None:
        shuffle = random.Random(seed)
        shuffle.shuffle(order)
        pool = 32 * batch_size
    groups: list[list[int]] = []
    for start in range(0, len(order), pool):
        members = sorted(order[start : start + pool], key=lambda i: len(encoded[i][0]))
        groups += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    if seed is not None:
        shuffle.shuffle(groups)
    return [_collate([encoded[i] for i in group], pad, causal) for group in groups]


def _collate(rows: list[tuple[list[int], int]], pad: int, causal: bool) -> Batch:
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    input_ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    for row, (ids, _) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    labels = input_ids.masked_fill(mask == 0, -100) if causal else torch.tensor([label for _, label in rows])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
