"""Ctrl-C in the middle of a step is delayed until the step is complete."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.signal turns numbers into enums and back: ten times as long
from types import FrameType
from typing import Any


class Held:
    """The handler of SIGINT while it is held: it stores the signal for the previous handler."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.caught: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.caught = number, frame


def hold_interrupts() -> Held | None:
    """Delay SIGINT; None if it raises nothing here: outside the main thread, or without a Python handler."""
    handler = _signal.getsignal(_signal.SIGINT)
    if not callable(handler):
        return None
    held = Held(handler)
    try:
        _signal.signal(_signal.SIGINT, held)
    except ValueError:  # not the main thread, which alone is interrupted
        return None
    return held


def release_interrupts(held: Held | None) -> None:
    """Restore the previous handler, and pass it a signal that came meanwhile."""
    if held is None:
        return
    _signal.signal(_signal.SIGINT, held.handler)
    if held.caught is not None:
        held.handler(*held.caught)
