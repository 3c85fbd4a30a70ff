"""Saves that do not get to their end, and several at once: what was there or what is new, whole, and nothing beside."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import kills, start
from processes import in_another_process, uses_processes
from safetensors.torch import save_file
from torch import nn

import sparsekernels as sk
from sparsekernels import Delta, Index, Selection
from sparsekernels.common import files
from sparsekernels.methods import laser
from sparsekernels.methods.laser import Reduction

SIZE = 256


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))


def load_reductions(path: Path) -> Any:
    return laser.load(model(0), path)


def make_selection(seed: int, path: Path) -> None:
    Selection.random(model(0), 0.5, seed=seed).save(path)


def make_delta(seed: int, path: Path) -> None:
    with sk.train_only(model(seed), Selection.random(model(0), 0.5)) as tuned:
        tuned.delta().save(path)


def make_reductions(seed: int, path: Path) -> None:
    with laser.reduce(model(seed), [Reduction("0.weight", 0.25), Reduction("1.weight", 0.25)]) as reduced:
        reduced.save(path)


KINDS: dict[str, tuple[Callable[[int, Path], None], Callable[[Path], Any]]] = {
    "selection": (make_selection, Selection.load),
    "delta": (make_delta, Delta.load),
    "reductions": (make_reductions, load_reductions),
}


Content = tuple[dict[str, torch.Tensor], dict[str, str]]


def version(found: Content, known: list[Content]) -> int:
    """Which of the known contents it is, bit for bit; not that of the bytes, for safetensors orders metadata anyhow."""
    tensors, metadata = found
    for number, (others, about) in enumerate(known):
        alike = about == metadata and others.keys() == tensors.keys()
        if alike and all(torch.equal(others[name], x) for name, x in tensors.items()):
            return number
    raise AssertionError("neither the old content nor the new one")


@uses_processes
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_save_leaves_the_old_file_or_the_new_one(kind: str, tmp_path: Path) -> None:
    make, load = KINDS[kind]
    folder = tmp_path / "out"
    folder.mkdir()
    target, versions = folder / "file", [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(versions):
        make(seed, path)
    whole = [files.load_tensors(path, kind) for path in versions]
    make(0, target)
    found, beside = [0, 0], 0
    for _ in kills(load, versions, target, longest=0.08):
        found[version(files.load_tensors(target, kind), whole)] += 1
        load(target)
        left = [path for path in folder.iterdir() if path != target]
        assert len(left) <= 1, "each save removes what the killed ones before it left"
        beside += len(left)
    print(f"{kind}: {found} of the two versions, {beside} left something beside it")
    assert beside  # or none was killed on the way
    make(1, target)
    assert version(files.load_tensors(target, kind), whole) == 1
    assert list(folder.iterdir()) == [target]


@uses_processes
def test_loading_while_another_process_saves_gives_one_or_the_other(tmp_path: Path) -> None:
    """A file that is opened twice, once for its header and once for its data, may be two files."""
    target, versions = tmp_path / "file", [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(versions):
        Selection.random({"w": (50,)}, 0.2 + 0.5 * number).save(path)
    whole = [files.load_tensors(path, "selection") for path in versions]
    Selection.load(versions[0]).save(target)
    saver = start(Selection.load, versions, target)
    found, end = set(), time.monotonic() + 60
    for number in itertools.count():
        found.add(version(files.load_tensors(target, "selection"), whole))
        if (number >= 200 and len(found) == 2) or time.monotonic() > end:
            break
    assert saver.is_alive()
    saver.kill()
    saver.join()
    assert found == {0, 1}


def test_two_saves_at_once_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save removes what dead ones left, never the folder of one that is under way."""
    path = tmp_path / "s"
    halfway, go_on = threading.Event(), threading.Event()

    def slow(tensors: dict[str, torch.Tensor], name: Path, *rest: Any) -> None:
        save_file(tensors, name, *rest)
        halfway.set()
        go_on.wait(60)

    slow_one, quick_one = Selection({"a": Index.full((2,))}), Selection({"a": Index.full((3,))})
    monkeypatch.setattr(files, "save_file", slow)
    thread = threading.Thread(target=slow_one.save, args=(path,))
    thread.start()
    assert halfway.wait(60)
    monkeypatch.setattr(files, "save_file", save_file)
    quick_one.save(path)
    assert dict(Selection.load(path)) == dict(quick_one)
    go_on.set()
    thread.join()
    assert dict(Selection.load(path)) == dict(slow_one)
    assert list(tmp_path.iterdir()) == [path]


def test_only_leftovers_of_the_same_path_are_removed(tmp_path: Path) -> None:
    gone = tmp_path / ".s.abcd_123.partial"
    others = [tmp_path / name for name in (".s2.abcd_123.partial", ".sX.abcd_123.partial", ".s.partial", "s.partial")]
    for folder in (gone, *others):
        folder.mkdir()
        (folder / "s").write_bytes(b"half")
    (tmp_path / ".s.abcd_124.partial").write_bytes(b"a file")
    (tmp_path / ".s.abcd_125.partial").symlink_to(others[0], target_is_directory=True)
    Selection({}).save(tmp_path / "s")
    assert not gone.exists()
    assert all((folder / "s").exists() for folder in others)
    assert not (others[0] / files.LOCK).exists()
    assert len(list(tmp_path.iterdir())) == len(others) + 3


def test_a_folder_taken_away_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another save cannot tell a folder that is not locked yet from a leftover."""
    made = files.tempfile.mkdtemp
    folders = []

    def removed_at_once(**options: Any) -> str:
        folder = made(**options)
        folders.append(folder)
        if len(folders) == 1:
            os.rmdir(folder)
        return folder

    monkeypatch.setattr(files.tempfile, "mkdtemp", removed_at_once)
    Selection({"a": Index.full((2,))}).save(tmp_path / "s")
    assert len(folders) == 2
    assert list(Selection.load(tmp_path / "s")) == ["a"]
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]


def test_a_lock_that_was_replaced_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, one save removed the file and another made it anew: the lock of the old is free."""
    folder = tmp_path / ".s.abcd_123.partial"
    folder.mkdir()
    (folder / files.LOCK).touch()
    (folder / files.CONTENT).touch()
    flock = files.fcntl.flock

    def replaced(lock: int, how: int) -> None:
        (folder / files.LOCK).unlink()
        (folder / files.LOCK).touch()
        flock(lock, how)

    monkeypatch.setattr(files.fcntl, "flock", replaced)
    for wait in (True, False):
        with pytest.raises(FileNotFoundError, match="was replaced"):
            files._locked(folder, wait)
    files._remove_leftovers(tmp_path / "s")
    assert (folder / files.CONTENT).exists()


@pytest.mark.parametrize("name", [files.LOCK, files.CONTENT])
def test_a_file_that_is_called_like_those_of_the_folder(name: str, tmp_path: Path) -> None:
    Selection({"a": Index.full((2,))}).save(tmp_path / name)
    assert list(Selection.load(tmp_path / name)) == ["a"]
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves work; what a killed one left stays, for it cannot be told from one that is under way."""

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    (tmp_path / ".s.abcd_123.partial").mkdir()
    Selection({}).save(tmp_path / "s")
    assert {path.name for path in tmp_path.iterdir()} == {"s", ".s.abcd_123.partial"}


UMASKS = (0o022, 0o077, 0o002, 0)


def save_with_each_umask(folder: Path) -> None:
    for umask in UMASKS:
        os.umask(umask)
        Selection({}).save(folder / str(umask))


@uses_processes
def test_the_mode_is_that_of_a_new_file(tmp_path: Path) -> None:
    """In a process of its own, for the umask is one of all threads."""
    in_another_process(save_with_each_umask, tmp_path)
    for umask in UMASKS:
        assert (tmp_path / str(umask)).stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_umask_of_the_process_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there for a moment for all threads: files that others make then would be open to the world."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail(f"umask({mask})"))
    Selection({}).save(tmp_path / "s")


def test_it_is_on_the_disk_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power cut could leave the new name with the content of neither."""
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    Selection({"a": Index.full((2,))}).save(tmp_path / "s")
    assert order == [(tmp_path / "s").stat().st_ino, "replace"]


def test_saving_over_a_folder_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(IsADirectoryError):
        Selection({}).save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]
