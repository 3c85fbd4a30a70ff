"""Adversarial calls of every op: `all_samples()[op name]` is a list of them. A new op is tested by adding its own.

Each tensor lies inside a larger buffer, at an odd offset, between canaries: a kernel that reads aligned or writes past
an end is found out. The oracles are written apart from the package: closed forms in fp64 on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekernels import Index

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
PAD = 67  # elements of canary on either side


@dataclass
class Case:
    """One call: `call(*args, **kwargs)` in public form, `raw` for `torch.ops`, and what must come out.

    `expected` holds the results, then the mutated tensors, in fp64 or, where the result is exact, in its own dtype.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    raw: tuple[Any, ...]
    expected: list[Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    mutated: Sequence[Tensor] = ()
    exact: bool = False
    rounds_to: torch.dtype | None = None  # a result is rounded to this before it is widened to its own dtype
    stochastic: bool = False  # rounded to either neighbour
    inside: Sequence[tuple[Tensor, Index]] = ()  # dense tensors that may change at the index only
    # (weight, index, values): afterwards the weight holds the new values at the index, rounded, bit for bit.
    written: Sequence[tuple[Tensor, Index, Tensor]] = ()
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (whole buffer, the view of it that is used)


@dataclass(frozen=True)
class Sample:
    op: str
    name: str
    make: Callable[[Maker], Case]
    heavy: bool = False  # too much for Triton's interpreter

    def case(self, device: torch.device) -> Case:
        maker = Maker(device)
        case = self.make(maker)
        case.buffers = maker.buffers
        return case


class Maker:
    """Seeded tensors between canaries."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.generator = torch.Generator().manual_seed(7)

    def put(self, source: Tensor) -> Tensor:
        """A contiguous copy of `source` on the device, between canaries."""
        canary = -77 if not source.is_floating_point() else -77.25
        buffer = torch.full((source.numel() + 2 * PAD,), canary, dtype=source.dtype, device=self.device)
        view = buffer[PAD : PAD + source.numel()].view(source.shape)
        view.copy_(source)
        self.buffers.append((buffer, view))
        return view

    def randn(self, *shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
        return self.put((torch.randn(shape, generator=self.generator, dtype=FP64) * scale).to(dtype))

    def strided(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A transposed view with a step of two between columns: nothing about it is contiguous."""
        wide = self.randn(shape[1], 2 * shape[0], dtype=dtype)
        return wide[:, ::2].T

    def integers(self, high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self.generator)

    def index(self, layout: Layout) -> Index:
        units = layout.units()
        limit = units.num_positions
        order = torch.randperm(limit, generator=self.generator)
        count = round(layout.share * limit)
        chosen = torch.tensor([limit - 1]) if layout.share == LAST else order[:count].sort().values
        positions = self.put(chosen.to(torch.int64 if layout.wide else torch.int32))
        return units.with_positions(positions)


LAST = -1.0  # the share that stands for the last position alone


@dataclass(frozen=True)
class Layout:
    name: str
    shape: tuple[int, ...]
    share: float
    granularity: str = "element"
    wide: bool = False  # int64 positions
    block: tuple[int, int] | None = None

    def units(self) -> Index:
        return Index(torch.empty(0, dtype=torch.int32), self.shape, self.granularity, self.block)


LAYOUTS = (
    Layout("one", (1, 1), 1),
    Layout("none", (5, 7), 0),
    Layout("all", (5, 7), 1),
    Layout("last", (17, 33), LAST),
    Layout("some", (17, 33), 0.1),
    Layout("int64", (17, 33), 0.3, wide=True),
    Layout("1d", (19,), 0.4),
    Layout("0d", (), 1),
    Layout("3d", (3, 4, 5), 0.3),
    Layout("many", (301, 299), 0.3),
    Layout("rows-one", (1, 7), 1, "row"),
    Layout("rows-none", (5, 7), 0, "row"),
    Layout("rows-all", (5, 7), 1, "row"),
    Layout("rows-last", (17, 33), LAST, "row"),
    Layout("rows-int64", (17, 33), 0.3, "row", wide=True),
    Layout("rows-1d", (13,), 0.5, "row"),
    Layout("rows-width1", (13, 1), 0.5, "row"),
    Layout("rows-3d", (4, 3, 5), 0.5, "row"),
    Layout("rows-many", (200, 300), 0.2, "row"),
    Layout("columns-none", (5, 7), 0, "column"),
    Layout("columns-all", (5, 7), 1, "column"),
    Layout("columns-last", (17, 33), LAST, "column"),
    Layout("columns-int64", (17, 33), 0.3, "column", wide=True),
    Layout("columns-height1", (1, 13), 0.5, "column"),
    Layout("columns-3d", (4, 3, 5), 0.5, "column"),
    Layout("columns-many", (200, 300), 0.2, "column"),
    Layout("blocks-none", (5, 7), 0, "block", block=(2, 2)),
    Layout("blocks-whole", (6, 8), 0.5, "block", block=(3, 4)),
    Layout("blocks-cut", (17, 33), 1, "block", block=(4, 8)),
    Layout("blocks-last", (17, 33), LAST, "block", block=(4, 8)),
    Layout("blocks-int64", (17, 33), 0.3, "block", wide=True, block=(5, 3)),
    Layout("blocks-narrow", (17, 33), 0.3, "block", block=(4, 1)),
    Layout("blocks-3d", (3, 5, 7), 0.4, "block", block=(2, 3)),
    Layout("blocks-many", (200, 300), 0.2, "block", block=(16, 32)),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}
HALF_LAYOUTS = [BY_NAME[name] for name in ("none", "some", "many", "rows-int64", "rows-3d", "columns-3d", "blocks-3d")]


def grid() -> Iterator[tuple[Layout, torch.dtype]]:
    """Every layout in fp32, some of them in every other dtype."""
    yield from ((layout, FP32) for layout in LAYOUTS)
    yield from itertools.product(HALF_LAYOUTS, (BF16, FP16, FP64))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")


def boxes(index: Index) -> Iterator[tuple[int, slice, slice]]:
    """Of each column or block, its matrix, and its rows and columns there, counted apart from the package."""
    m, n = index.shape[-2:]
    height, width = (m, 1) if index.granularity == "column" else index.block
    starts = [(i, j) for i in range(0, m, height) for j in range(0, n, width)]
    for position in index.positions.tolist():
        matrix, at = divmod(position, len(starts))
        i, j = starts[at]
        yield matrix, slice(i, min(i + height, m)), slice(j, min(j + width, n))


def take(dense: Tensor, index: Index) -> Tensor:
    """The selected values, by plain indexing: the oracle of gather."""
    positions, dense = index.positions.cpu().long(), dense.cpu()
    if index.granularity == "element":
        return dense.reshape(-1)[positions].clone()
    if index.granularity == "row":
        return (dense.flatten(0, -2) if dense.dim() > 1 else dense)[positions].clone()
    matrices = dense.reshape(-1, *dense.shape[-2:])
    found = [matrices[at][rows, columns] for at, rows, columns in boxes(index)]
    if index.granularity == "column":
        return torch.cat([matrices.new_zeros(matrices.shape[1], 0), *found], 1)
    out = matrices.new_zeros(len(found), *index.block)
    for block, values in zip(out, found, strict=True):
        block[: values.shape[0], : values.shape[1]] = values
    return out


def put(dense: Tensor, index: Index, values: Tensor) -> Tensor:
    """A copy of `dense` with `values` at the selected positions: the oracle of scatter."""
    positions = index.positions.cpu().long()
    out, values = dense.cpu().clone(), values.cpu().to(dense.dtype)
    if index.granularity == "element":
        out.view(-1)[positions] = values
    elif index.granularity == "row":
        (out.flatten(0, -2) if out.dim() > 1 else out)[positions] = values
    else:
        matrices = out.view(-1, *out.shape[-2:])
        for k, (at, rows, columns) in enumerate(boxes(index)):
            box = matrices[at][rows, columns]
            box[:] = values[:, k : k + 1] if index.granularity == "column" else values[k, : len(box), : box.shape[1]]
    return out


def slices(numbers: Tensor, shape: torch.Size) -> Index:
    """The elements with these numbers in the first dimension."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[numbers.cpu().long()] = True
    return Index.from_mask(mask)


def raw_of(index: Index) -> tuple[Tensor, list[int]]:
    return index.positions, list(index.tile)


def with_specials(x: Tensor) -> None:
    """NaN, infinities, both zeros and a denormal among the values."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40], dtype=FP64)
    x.view(-1)[: 6 * (x.numel() // 6)] = special.to(x.dtype).to(x.device).repeat(x.numel() // 6)
