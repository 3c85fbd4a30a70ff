"""Which implementation serves an op: registers the table with torch's dispatcher, and explains what is missing.

The ladder is native (C++ or CUDA) -> Triton -> reference. Each choice is made once; the dispatcher stores it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .table import Op

Backend = Literal["reference", "triton", "native"]
NAMESPACE = "sparsekernels"
PACKAGE = Path(__file__).resolve().parent.parent
ROWS: dict[str, Op] = {}  # the table by name, filled by register()

_dispatched: dict[str, Callable[..., Any]] = {}  # each op as called through torch's dispatcher
_native: set[tuple[str, str]] = set()  # (op, device) pairs that a native library serves
_library = torch.library.Library(NAMESPACE, "DEF")
_load_errors: dict[str, str] = {}  # device -> why its native library is not in use
_said: set[str] = set()


def build_facts() -> dict[str, Any]:
    """What setup.py recorded about the build of this installation; empty for a source tree that was never built."""
    path = PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load_native(device: str) -> None:
    path = PACKAGE / f"_{device}.so"
    if device == "cuda" and torch.version.cuda is None:
        _load_errors[device] = "this torch has no CUDA"
    elif not path.exists():
        facts = build_facts().get(device, {})
        _load_errors[device] = facts.get("reason", "it was not built; run `pip install .` in the source tree")
    else:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            _load_errors[device] = f"{path.name} does not load: {error}"


def has_native(name: str, device: str) -> bool:
    """Whether a native library serves the op on `device` ("cpu" or "cuda")."""
    return (name, device) in _native


def _say_once(device: str, rung: str) -> None:
    if device not in _said and (device in _load_errors or rung != "Triton"):
        _said.add(device)
        why = _load_errors.get(device, "the op has no kernel for this device")
        warnings.warn(
            f"sparsekernels: no native {device} library ({why}); using {rung} instead. "
            "`python -m sparsekernels` shows what serves each op.",
            RuntimeWarning,
            stacklevel=4,
        )


def in_full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which matmuls of such tensors keep their dtype, also under autocast."""
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _unaware_of_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation in Python so that the torch functions it calls ignore autocast."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = _tensors(args)
        if not tensors or tensors[0].is_meta or not torch.is_autocast_enabled(tensors[0].device.type):
            return run(*args, **kwargs)
        with in_full_precision(tensors[0]):
            return run(*args, **kwargs)

    return call


def _tensors(args: tuple[Any, ...]) -> Sequence[Tensor]:
    return args[0] if isinstance(args[0], (list, tuple)) else args[:1]


def _fallback(op: Op) -> Callable[..., Any]:
    run = _unaware_of_autocast(op.reference)

    @functools.wraps(op.reference)
    def reference(*args: Any, **kwargs: Any) -> Any:
        tensors = _tensors(args)
        if tensors:
            _say_once(tensors[0].device.type, "the slower PyTorch reference")
        return run(*args, **kwargs)

    return reference


def triton_missing(device: str = "cuda") -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda":
        return None if torch.version.cuda or torch.version.hip else "this torch has no GPU support"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Triton runs on GPUs (on the CPU only interpreted, with TRITON_INTERPRET=1)"


def triton_kernel(name: str) -> Callable[..., Any]:
    """The Triton launcher of an op; imports Triton on first use."""
    return getattr(importlib.import_module(f"{__package__}.{ROWS[name].family}.triton"), name)


def _triton_dispatch(op: Op) -> Callable[..., Any]:
    def launch(*args: Any, **kwargs: Any) -> Any:
        _say_once("cuda", "Triton")
        return _unaware_of_autocast(triton_kernel(op.name))(*args, **kwargs)

    return launch


def register(table: Iterable[Op]) -> None:
    """Define every op of the table and attach its implementations; called once, on import."""
    for op in table:
        ROWS[op.name] = op
        _library.define(op.name + op.schema)
        _library.impl(op.name, _fallback(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_library)
        _dispatched[op.name] = getattr(torch.ops.sparsekernels, op.name).default
    for device in ("cpu", "cuda"):
        _load_native(device)
        for name in ROWS:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device.upper()):
                _native.add((name, device))
    if triton_missing("cuda") is None:
        for op in ROWS.values():
            if not has_native(op.name, "cuda"):
                _library.impl(op.name, _triton_dispatch(op), "CUDA")


def why_not(name: str, backend: Backend, device: str) -> str | None:
    """Why `backend` cannot serve op `name` on `device`; None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return triton_missing(device)
    if device in _load_errors:
        return _load_errors[device]
    return None if has_native(name, device) else f"there is no native kernel of {name} for {device}"


def serving(name: str, device: str) -> Backend:
    """The backend that answers a plain call of op `name` on `device`."""
    if has_native(name, device):
        return "native"
    return "triton" if device == "cuda" and triton_missing(device) is None else "reference"


def select(name: str, device: str, backend: Backend | None) -> Callable[..., Any]:
    """The callable of op `name` for `backend`; None is the dispatcher's choice."""
    if backend is None:
        return _dispatched[name]
    if backend not in ("reference", "triton", "native"):
        raise ValueError(f'backend must be None, "reference", "triton" or "native", got {backend!r}')
    reason = why_not(name, backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot serve {name} on {device}: {reason}")
    if backend == "native":
        return _dispatched[name]
    return _unaware_of_autocast(ROWS[name].reference if backend == "reference" else triton_kernel(name))
