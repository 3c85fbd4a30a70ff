"""Safetensors files that are either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write beside `path`, then rename over it; a failure leaves what was there."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        # Copies, for safetensors refuses tensors that share memory, as one Index under two names does.
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, dict(metadata)
        )
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `save_tensors` wrote with metadata["sparsekernels"] == kind.

    Raises:
        FileNotFoundError; ValueError for a damaged file or one of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("sparsekernels") != kind:
                found = metadata.get("sparsekernels", "no sparsekernels file")
                raise ValueError(f"{path} holds {found}, not a {kind}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What goes wrong while the contents of a file are put together is the fault of the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
