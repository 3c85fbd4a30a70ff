"""Read what gettext catalogues hold: compiled ones (.mo), and sources (.po) where no compiled one lies beside them."""

from __future__ import annotations

import ast
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

MAGIC = 0x950412DE
CONTEXT, PLURAL = "\x04", "\x00"

_STRING = re.compile(r'^(?:(msgctxt|msgid|msgid_plural|msgstr(?:\[\d+\])?)\s+)?(".*")$')


def read_mo(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (message, translation) of a compiled catalogue; of plural forms the first, a context is taken off."""
    data = path.read_bytes()
    order = "<" if data[:4] == struct.pack("<I", MAGIC) else ">"
    if len(data) < 20 or struct.unpack_from(f"{order}I", data)[0] != MAGIC:
        raise ValueError(f"{path} is no compiled gettext catalogue")
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)

    def text(table: int, number: int) -> str:
        length, start = struct.unpack_from(f"{order}2I", data, table + 8 * number)
        return data[start : start + length].decode("utf-8")

    for number in range(count):
        message = text(originals, number).split(CONTEXT)[-1].split(PLURAL)[0]
        if message:
            yield message, text(translations, number).split(PLURAL)[0]


def read_po(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (message, translation) of a source catalogue, as `read_mo`, without fuzzy and obsolete entries."""
    fields: dict[str, str] = {}
    field, fuzzy = "", False
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        found = _STRING.match(line.strip())
        starts = not found or found[1] in ("msgctxt", "msgid")
        if starts and ("msgstr" in fields or "msgstr[0]" in fields):  # the entry before is complete
            message = fields["msgid"]
            if message and not fuzzy:
                yield message, fields.get("msgstr", fields.get("msgstr[0]", ""))
            fields, field, fuzzy = {}, "", False
        if found:
            field = found[1] or field
            fields[field] = fields.get(field, "") + ast.literal_eval(found[2])
        elif line.startswith("#,"):
            fuzzy |= "fuzzy" in line


def language_of(path: Path) -> str:
    """The language of `.../<locale>/LC_MESSAGES/<domain>.mo`: "de" for de and de_DE, "pt_BR" for pt_BR."""
    locale = path.parent.parent.name.replace("-", "_")
    language, _, country = locale.partition("_")
    return language if country == language.upper() else locale


def find(root: Path) -> dict[str, list[Path]]:
    """Language -> the catalogues below ``root``, in a fixed order."""
    found = defaultdict(list)
    for path in sorted([*root.rglob("LC_MESSAGES/*.mo"), *root.rglob("LC_MESSAGES/*.po")]):
        if path.suffix == ".mo" or not path.with_suffix(".mo").is_file():
            found[language_of(path)].append(path)
    return dict(found)


def read(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (message, translation) of a catalogue of either kind."""
    return read_mo(path) if path.suffix == ".mo" else read_po(path)
