"""The part of a layer's input that the gradient of its selected weights depends on: all that its backward keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.units import places_of, tiles_of
from ..index import Index
from ..ops import take_columns

WORTH = 3  # blocks that need more than one in so many features keep the input itself: up to three layers share that


class Features:
    """The input features that some layers keep, [F], sorted.

    Layers that read one input take one copy of them: the last one is found again as long as a graph holds it. A layer
    that reads the input once more gets a new copy, because torch does not track every change of a tensor.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.last: tuple[Any, Any, Any] | None = None  # input, what it was then, and its copy
        self.readers: list[Any] = []  # of that copy

    def take(self, input: Tensor, dtype: torch.dtype, reader: Any) -> Tensor:
        """These features of an input, [..., F], in `dtype`, for a layer."""
        if torch.compiler.is_compiling() or input.is_inference():  # the compiler finds equal subexpressions itself
            return self._take(input, dtype)
        state = input._version, input.data_ptr(), input.shape, dtype
        if self.last is not None and not any(each is reader for each in self.readers):
            of, was, copy = self.last
            found = copy()
            if found is not None and of() is input and was == state:
                self.readers.append(reader)
                return found  # type: ignore[no-any-return]
        taken = self._take(input, dtype)
        self.last, self.readers = (weakref.ref(input), state, weakref.ref(taken)), [reader]
        return taken

    def _take(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = self.numbers.to(input.device)
        if not torch.compiler.is_compiling() and not input.is_meta:
            self.numbers = numbers
        return take_columns(input.detach(), numbers).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "last": None, "readers": []}


@dataclass
class Narrow:
    """The features that a layer keeps, and the selection in the weight of these features alone."""

    features: Features
    index: Index

    def on(self, device: torch.device) -> tuple[Features, Index]:
        """Both, with the Index on a device."""
        index = self.index
        if index.positions.device != device:
            index = index.to(device)
            if device.type != "meta":
                self.index = index
        return self.features, index

    def share(self, others: Iterable[Narrow]) -> None:
        """Use the Features of another layer if they are equal."""
        mine = self.features.numbers
        for other in others:
            theirs = other.features.numbers
            if mine.device == theirs.device and torch.equal(mine, theirs):
                self.features = other.features
                return


def narrow_of(index: Index, transposed: bool) -> Narrow | None:
    """What the input of a layer is narrowed to; None if the gradient depends on all features.

    transposed: input features are the rows of the weight, as in Conv1D, not its columns.
    """
    if len(index.shape) != 2 or not len(index) or index.positions.is_meta:
        return None
    outputs, inputs = index.shape[::-1] if transposed else index.shape
    if len(index) == index.num_positions:
        return None
    if index.granularity == ("row" if transposed else "column"):
        shape = torch.Size((len(index), outputs) if transposed else (outputs, len(index)))
        every = torch.arange(shape[0], device=index.positions.device)
        return Narrow(Features(index.positions), Index.unchecked(every, shape, "row"))
    if index.granularity != "block" or (transposed and index.tile[1] == 1):  # one row of such would be columns
        return None
    across = tiles_of(index.shape, index.tile)[1]
    _, row, column = places_of(index.positions, index.shape, index.tile)
    kept, place = (row if transposed else column).unique(return_inverse=True)
    size = index.tile[0 if transposed else 1]
    numbers = (kept[:, None] * size + torch.arange(size, device=kept.device)).reshape(-1)
    numbers = numbers[numbers < inputs]
    if len(numbers) > inputs / WORTH:
        return None
    positions = place * across + column if transposed else row * len(kept) + place
    shape = torch.Size((len(numbers), outputs) if transposed else (outputs, len(numbers)))
    return Narrow(Features(numbers), index.with_positions(positions.to(index.positions.dtype), shape))
