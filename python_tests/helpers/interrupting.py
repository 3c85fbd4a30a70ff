"""Ctrl-C at a chosen line of what a training step runs in Python, of this package or of torch.nn."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import sparsekernels as sk

WATCHED = tuple(str(Path(module.__file__).parent) for module in (sk, torch.nn.modules, torch.optim, torch.utils))


def lines_of(run: Callable[[], Any]) -> int:
    """How many lines there are to interrupt."""
    return _traced(run, 0)[0]


def interrupt(run: Callable[[], Any], line: int) -> bool:
    """Run it with a SIGINT before its `line`th line, counted from 1; whether that was raised."""
    return _traced(run, line)[1]


def _traced(run: Callable[[], Any], line: int) -> tuple[int, bool]:
    seen = 0

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == line:
                signal.raise_signal(signal.SIGINT)
        return inside

    def entered(frame: FrameType, event: str, _: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(WATCHED) else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        run()
    except KeyboardInterrupt:
        return seen, True
    finally:
        sys.settrace(before)
    return seen, False
