"""Ctrl-C in the middle of a step: it waits until the step is whole."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.signal turns numbers into enums and back: ten times as long
from types import FrameType
from typing import Any


class Held:
    """The handler of SIGINT while it is held: it remembers the signal for the handler that was there before."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.caught: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.caught = number, frame


def hold_interrupts() -> Held | None:
    """Let SIGINT wait; None where it raises nothing: in a thread other than the main one, or with no Python handler."""
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
    """Put the handler back, and let it have what came meanwhile."""
    if held is None:
        return
    _signal.signal(_signal.SIGINT, held.handler)
    if held.caught is not None:
        held.handler(*held.caught)
