"""Bytes that collectives communicate: counted as they are called, and as shapes predict them for FSDP2.

The payload of an all-gather is its whole output, that of a reduce-scatter or an all-reduce its whole input. It is about
the same for any number of ranks; what a rank sends or receives of it is (ranks - 1) / ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operator of c10d -> its kind, and which argument is the payload.
PAYLOADS = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
}
KINDS = tuple(kind for kind, _ in PAYLOADS.values())
PHASES = ("forward", "backward", "step")


class Collectives(TorchDispatchMode):
    """Counts the payload of each collective that is called while it is active, for the phase that it was told.

    Raises:
        NotImplementedError: in that call, for a collective of another kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = PHASES[0]
        self.bytes: Counter[tuple[str, str]] = Counter()  # (phase, kind) -> bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            operator = func._schema.name.split("::")[1]
            if operator not in PAYLOADS:
                raise NotImplementedError(f"{func} is a collective that this benchmark cannot count yet")
            kind, position = PAYLOADS[operator]
            payload = args[position]
            tensors = payload if isinstance(payload, Sequence) else [payload]
            self.bytes[self.phase, kind] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))

    def table(self) -> dict[str, dict[str, int]]:
        """Phase -> kind -> bytes."""
        return {phase: {kind: self.bytes[phase, kind] for kind in KINDS} for phase in PHASES}


def chunk(shape: Sequence[int], ranks: int) -> int:
    """Elements of a tensor that the first rank holds: dimension 0 is cut into chunks of equal length."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def padded(shapes: Iterable[Sequence[int]], ranks: int) -> int:
    """Elements of tensors that are gathered or reduced; chunks that are short, or empty, count as full ones."""
    return sum(ranks * chunk(shape, ranks) for shape in shapes)


def frozen_elements(blocks: Iterable[Sequence[int]], root: Iterable[Sequence[int]], ranks: int) -> int:
    """Elements of weights gathered in one step: those of blocks again in backward, the rest of the model once."""
    return 2 * padded(blocks, ranks) + padded(root, ranks)


def beyond(
    trained: Sequence[Sequence[int]], ranks: int, gathered: int = 4, reduced: int = 4, written: int = 4
) -> dict[str, int]:
    """Bytes communicated in one step for trained tensors in blocks, beside their frozen weights.

    Args:
        trained: shapes of compact values or of adapters.
        gathered, reduced, written: bytes of an element in forward and in backward; of a gradient; after the step, which
            is 0 where a rank holds the values of its own rows of the weight already (columns, and no selection at all).
    """
    elements = padded(trained, ranks)
    return {
        "forward": gathered * elements,
        "backward": gathered * elements,
        "reduced": reduced * elements,
        "step": written * elements,
    }
