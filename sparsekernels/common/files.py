"""Safetensors files that are either complete or absent, and whose contents are checked before use."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed saves are not removed
    fcntl = None  # type: ignore[assignment]

CONTENT, LOCK = "content", "lock"  # files in a folder of `replacing`; a writer holds a lock on the second


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file; an exception, a kill or a power cut meanwhile leaves the old file intact."""
    with replacing(path) as partial:
        # Copies: safetensors refuses tensors that share memory, such as one Index under two names.
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, partial, dict(metadata))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file to write, which replaces `path` at the end, unless an exception is raised.

    It is in a folder of its own beside `path`, `.<name>.<random>.partial`: a killed process cannot clean up, and
    safetensors writes a temporary file too. The folder has a lock that the kernel releases when the process dies,
    however it was killed and in any pid namespace; the next save of this path removes folders that are not locked.

    The file is flushed to the disk before it is moved, because after a power cut the new name could otherwise have no
    content. The flush takes as long as the disk needs: measured on ext4, 1 ms for 40 kB, 13 ms for 4 MB, 90 ms for 40
    MB, as much as the rest.
    """
    path = Path(path)
    _remove_leftovers(path)
    folder, lock = _locked_folder(path)
    try:
        partial = folder / CONTENT
        yield partial
        # The lock file has the mode of any new file; safetensors creates its own with 0600.
        os.chmod(partial, os.fstat(lock).st_mode & 0o777)
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(path: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        with suppress(FileNotFoundError):  # another save removed the folder as a leftover before it was locked
            return folder, _locked(folder, wait=True)


def _locked(folder: Path, wait: bool) -> int:
    """A descriptor that holds the lock of the folder until it is closed.

    Raises:
        FileNotFoundError: the folder was removed meanwhile. Another OSError: the lock is taken, and wait is false.
    """
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if fcntl is not None:
            # If the file system has no locks, nothing is removed. Not lockf: its locks are per process, and two
            # threads may save.
            with suppress(OSError) if wait else nullcontext():
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
            raise FileNotFoundError(f"{folder / LOCK} was replaced")
    except BaseException:
        os.close(lock)
        raise
    return lock


def _remove_leftovers(path: Path) -> None:
    """Remove leftovers of killed saves of `path`, as far as possible."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(f".{path.name}.") + r"\w{8}\.partial")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if ours.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    lock = _locked(Path(entry.path), wait=False)
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(lock)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `save_tensors` wrote with metadata["sparsekernels"] == kind.

    Raises:
        FileNotFoundError; ValueError for a damaged file or one of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with open(path, "rb") as opened, safe_open(_once(path, opened.fileno()), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("sparsekernels") != kind:
                found = metadata.get("sparsekernels", "another kind of file")
                raise ValueError(f"{path} holds {found}, not a {kind}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except (SafetensorError, TypeError) as error:  # TypeError: a size of 2^63 or more next to one of 0
        raise ValueError(f"{path} is damaged or truncated: {error}") from error


def _once(path: str | Path, opened: int) -> str:
    """A name for an open file. By its path safe_open would open it again, and it may have been replaced in between."""
    name = f"/dev/fd/{opened}"
    return name if os.path.exists(name) else str(path)


def described(path: str | Path, text: str | None, schema: Any) -> Any:
    """Parse the JSON in a file's metadata; raises ValueError unless it matches `schema`.

    A schema is a type, which a value has exactly (True is not an int); [schema], a list; {str: schema}, an object with
    any names; {"name": schema, ...}, an object with exactly these names; or a tuple of schemas, one of which matches.
    """
    if text is None:
        raise ValueError(f"{path} is damaged: its metadata is missing")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its metadata is not valid JSON: {error}") from error
    _check(path, value, schema)
    return value


def _check(path: str | Path, value: Any, schema: Any) -> None:
    if isinstance(schema, tuple):
        for option in schema[:-1]:
            with suppress(ValueError):
                return _check(path, value, option)
        _check(path, value, schema[-1])
    elif isinstance(schema, dict) and isinstance(value, dict):
        if str not in schema and value.keys() != schema.keys():
            raise ValueError(f"{path} is damaged: {sorted(value)} instead of {sorted(schema)} in its metadata")
        for name, entry in value.items():
            _check(path, entry, schema[str] if str in schema else schema[name])
    elif isinstance(schema, list) and isinstance(value, list):
        for entry in value:
            _check(path, entry, schema[0])
    elif type(value) is not schema:
        raise ValueError(f"{path} is damaged: unexpected {type(value).__name__} in its metadata")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def check_names(path: str | Path, tensors: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """Raise ValueError unless the file has exactly these tensors."""
    expected = set(expected)
    for wrong, what in ((expected - tensors.keys(), "lacks"), (tensors.keys() - expected, "should not contain")):
        if wrong:
            raise ValueError(f"{path} is damaged: it {what} {min(wrong)!r}")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """A context in which errors are reported as damage of the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{path} is damaged: {what}") from error
