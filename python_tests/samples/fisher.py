"""Samples of the squared per-sample gradients of matrices; the oracle makes every sample's whole gradient in fp64.

`total` and `norms` are added to, so they start from numbers that are not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsekernels import Index, ops

from . import masked_grad
from .case import BF16, FP16, FP32, FP64, Case, Layout, Maker, Sample, short, take
from .masked_grad import INF, NAN, SHAPE, rows_of, rows_or_elements

LAYOUTS = (
    *masked_grad.LAYOUTS,
    Layout("sparse", (150, 130), 0.008),
    Layout("sparse-int64", (150, 130), 0.005, wide=True),
    Layout("rows-last", SHAPE, -1.0, "row"),
)
WHOLE = (  # of these no index is given
    Layout("whole", SHAPE, 1),
    Layout("whole-one", (1, 1), 1),
    Layout("whole-wide", (3, 200), 1),
    Layout("whole-tall", (300, 5), 1),
    Layout("whole-many", (150, 130), 1),
)
BY_NAME = {layout.name: layout for layout in (*LAYOUTS, *WHOLE)}
SIZES = [(b, s) for b in (1, 2, 5) for s in (0, 1, 7, 33, 70)]
HALVES_AND_DOUBLE = (BF16, FP16, FP64)
OUTPUTS = ("total", "norms")


def index_of(maker: Maker, layout: Layout) -> Index | None:
    return None if layout.name.startswith("whole") else maker.index(layout)


def adding(
    maker: Maker,
    call: Callable[..., Any],
    activations: tuple[Tensor | None, ...],
    grads: Tensor,
    index: Index | None,
    options: tuple[Any, ...] | None,
    wanted: str,
    special: bool,
    **kwargs: Any,
) -> Case:
    """The case whose per-sample gradients are `grads` [B, *shape of the parameter].

    `options` follow the positions in the raw call; None: not even `rows` does. wanted: "total", "norms" or "both".
    """
    first = activations[0]
    assert first is not None
    wide = torch.promote_types(first.dtype, FP32)
    squares = grads.square()
    if index is not None:
        squares = grads.new_empty((len(grads), *index.compact_shape))
        for b, grad in enumerate(grads):
            squares[b] = take(grad, index).square()
    total = None if wanted == "norms" else maker.randn(*squares.shape[1:], dtype=wide)
    norms = None if wanted == "total" else maker.randn(squares.shape[0], dtype=wide)
    expected = [
        before.cpu().double() + added
        for before, added in ((total, squares.sum(0)), (norms, squares.flatten(1).sum(1)))
        if before is not None
    ]
    if special:  # what overflows does so in the dtype of the sums
        expected = [x.to(wide) for x in expected]
    mutated = [x for x in (total, norms) if x is not None]
    contiguous = [None if x is None else x.contiguous() for x in activations]
    positions, rows = (None, False) if index is None else rows_or_elements(index)
    if index is not None and index.granularity in ("column", "block") and total is not None:
        total_of_op = maker.randn(len(positions), dtype=wide)
    else:
        total_of_op = total
    raw = (*contiguous, total_of_op, norms, positions, *(() if options is None else (rows, *options)))
    return Case(call, (*activations, total, norms, index), raw, expected, kwargs=kwargs, mutated=mutated)


def activation(maker: Maker, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Tensor:
    if not strided:
        return maker.randn(*shape, dtype=dtype)
    return maker.strided(shape[0] * shape[1], shape[2], dtype=dtype).unflatten(0, shape[:2])


def padding_tokens(kind: str, size: tuple[int, int]) -> Tensor:
    """Which tokens are padding, [B, S]: at the "right" or "left" of samples, one of which is all padding; "holes"
    everywhere; or "all" of them."""
    b, s = size
    place = torch.arange(s)
    if kind == "all":
        return torch.ones(b, s, dtype=torch.bool)
    if kind == "holes":
        return (place[None, :] + torch.arange(b)[:, None]) % 3 == 0
    lengths = torch.tensor([s, 0, s // 2, 1, s - 1]).repeat(b)[:b, None]
    return place >= lengths if kind == "right" else place < s - lengths


def linear(
    layout: Layout,
    dtype: torch.dtype = FP32,
    size: tuple[int, int] = (2, 7),
    wanted: str = "both",
    padding: str | None = None,
    strided: bool = False,
    special: float | None = None,
    unseen: bool = False,
) -> Callable[[Maker], Case]:
    """`size` is samples and tokens. Padding has rows of 0 and of -0 in grad_output, and NaN in input.

    special: the number in the last token of the first sample of grad_output, and of the last sample of input.
    unseen: a real token whose grad_output is zero at every selected row, and whose input is infinite. 0 times
    infinity is NaN: the token counts.
    """

    def make(maker: Maker) -> Case:
        rows, columns = layout.shape
        index = index_of(maker, layout)
        grad, x = (activation(maker, (*size, width), dtype, strided) for width in (rows, columns))
        real = torch.ones(size, dtype=torch.bool)
        if padding is not None:
            real = ~padding_tokens(padding, size)
            grad[~real] = 0.0
            grad[~real, ::2] = -0.0
            x[~real] = NAN
        if special is not None:
            grad[0, -1, 0], x[-1, -1, -1] = special, special
        if unseen:
            assert index is not None
            seen = rows_of(index)
            grad[0, 1] = torch.ones(rows, dtype=dtype).index_fill_(0, seen, 0.0)
            x[0, 1] = INF
        filled = x.cpu().double().masked_fill(~real[:, :, None], 0)
        grads = torch.einsum("bsm,bsn->bmn", grad.cpu().double(), filled)
        odd = unseen or special is not None
        return adding(maker, ops.fisher_linear_, (grad, x), grads, index, (), wanted, odd)

    return make


def linear_samples() -> Iterator[Sample]:
    def sample(name: str, layout: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("fisher_linear_", name, linear(BY_NAME[layout], *args, **more), heavy)

    for name in BY_NAME:
        yield sample(name, name)
    for dtype in HALVES_AND_DOUBLE:
        for name in ("none", "some", "many", "sparse", "rows-some", "whole", "whole-many"):
            yield sample(f"{name}-{short(dtype)}", name, dtype)
    for size in SIZES:
        yield sample(f"whole-{size[0]}x{size[1]}", "whole", size=size)
    for size in ((1, 0), (5, 1), (1, 70), (5, 33)):
        for name in ("some", "sparse", "rows-int64"):
            yield sample(f"{name}-{size[0]}x{size[1]}", name, size=size)
        yield sample(f"whole-bf16-{size[0]}x{size[1]}", "whole", BF16, size)
        yield sample(f"whole-f64-{size[0]}x{size[1]}", "whole", FP64, size)
    for name in ("whole", "some", "sparse", "rows-some"):
        yield sample(f"{name}-no-samples", name, size=(0, 7))
        for wanted in OUTPUTS:
            yield sample(f"{name}-{wanted}", name, wanted=wanted)
        for dtype in (FP32, BF16):
            tag = f"{name}-{short(dtype)}"
            yield sample(f"{tag}-padding-right", name, dtype, (5, 33), padding="right")
            yield sample(f"{tag}-strided", name, dtype, strided=True)
        yield sample(f"{name}-padding-left", name, size=(5, 7), padding="left")
        yield sample(f"{name}-padding-holes", name, FP64, (2, 33), padding="holes")
        yield sample(f"{name}-padding-all", name, FP16, (2, 7), padding="all")
        yield sample(f"{name}-padding-nan", name, size=(2, 8), padding="holes", special=NAN)
        for value in (NAN, INF, 1e30, 1e-40):
            yield sample(f"{name}-special-{value}", name, special=value)
    yield sample("last-special-inf", "last", special=INF)
    for name in ("last", "sparse-int64", "rows-some"):
        yield sample(f"{name}-unseen", name, unseen=True)
    yield sample("whole-total-f64", "whole", FP64, wanted="total")
    for name in ("whole-many", "many", "sparse", "rows-many"):
        for dtype in (FP32, BF16):
            yield sample(f"{name}-{short(dtype)}-20x70", name, dtype, (20, 70), heavy=True, padding="right")
        yield sample(f"{name}-2x1100", name, size=(2, 1100), heavy=True)
    yield sample("sparse-norms-bf16", "sparse", BF16, wanted="norms")


def embedding(
    layout: Layout,
    dtype: torch.dtype = FP32,
    size: tuple[int, int] = (2, 7),
    wanted: str = "both",
    contention: int | None = None,
    padding: str | None = None,
    ids_dtype: torch.dtype = torch.int64,
    misses: bool = False,
    strided: bool = False,
    special: float | None = None,
) -> Callable[[Maker], Case]:
    """`contention`: how many different ids there are (1: every token is the same), None for the whole table.

    padding: "hit" makes the id of the first token the padding id, "miss" takes one that no token has; "right" and the
    like (see `padding_tokens`) give such tokens the padding id. A gradient at padding is NaN.
    "zeros": padding at the right, but no padding id; the gradients are zero.
    misses: no id is selected.
    """

    def make(maker: Maker) -> Case:
        table, width = layout.shape
        index = index_of(maker, layout)
        ids = maker.put(choose_ids(maker, layout, index, size, contention, misses).to(ids_dtype))
        grad = activation(maker, (*size, width), dtype, strided)
        if special is not None:
            grad[0, :, 0] = special
        padding_idx = None
        if padding == "zeros":
            blank = padding_tokens("right", size)
            ids[blank], grad[blank] = 0, 0.0
        elif padding == "miss":
            padding_idx = min(set(range(table)).difference(ids.flatten().tolist()))
        elif padding is not None:
            padding_idx = int(ids[0, 0])
            if padding != "hit":
                ids[padding_tokens(padding, size)] = padding_idx
            grad[ids == padding_idx] = NAN
        grads = torch.zeros(size[0], table, width, dtype=FP64)
        for b, s in torch.cartesian_prod(*map(torch.arange, size)).tolist():
            if int(ids[b, s]) != padding_idx:
                grads[b, int(ids[b, s])] += grad[b, s].cpu().double()
        raw = (-1 if padding_idx is None else padding_idx,)
        case = adding(
            maker, ops.fisher_embedding_, (grad, ids), grads, index, raw, wanted, special is not None,
            padding_idx=padding_idx,
        )  # fmt: skip
        if wanted != "norms":
            total = case.mutated[0]
            case.inside = [(total, looked_up(total, index, ids[ids != padding_idx], width))]
        return case

    return make


def choose_ids(
    maker: Maker, layout: Layout, index: Index | None, size: tuple[int, int], contention: int | None, misses: bool
) -> Tensor:
    table = layout.shape[0]
    pool = torch.randperm(table, generator=maker.generator)
    if index is not None:
        chosen = rows_of(index)
        if misses:
            pool = pool[~torch.isin(pool, chosen)]
        elif len(chosen) and contention is not None:
            pool = torch.cat([chosen[:1], pool[pool != chosen[0]]])  # few ids, but one of them is selected
    pool = pool[:contention]
    return pool[maker.integers(len(pool), size[0] * size[1])].view(size)


def looked_up(total: Tensor, index: Index | None, ids: Tensor, width: int) -> Index:
    """The part of `total` that may change."""
    ids = ids.cpu().long().unique()
    if index is None:
        return Index.unchecked(ids, total.shape, "row")
    if index.granularity == "column":
        return Index.unchecked(ids, total.shape, "row")
    if index.granularity == "block":
        return Index.full(total.shape)
    rows = index.positions.cpu().long() // (1 if index.granularity == "row" else width)
    return Index.unchecked(torch.isin(rows, ids).nonzero().view(-1), total.shape, index.granularity)


def embedding_samples() -> Iterator[Sample]:
    def sample(name: str, layout: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("fisher_embedding_", name, embedding(BY_NAME[layout], *args, **more), heavy)

    for name in BY_NAME:
        yield sample(name, name, size=(2, 21))
    for name in ("whole", "some", "rows-some"):
        for dtype in HALVES_AND_DOUBLE:
            yield sample(f"{name}-{short(dtype)}", name, dtype, (2, 33), contention=4)
        for size in SIZES:
            yield sample(f"{name}-{size[0]}x{size[1]}", name, size=size)
        yield sample(f"{name}-no-samples", name, size=(0, 7))
        for wanted in OUTPUTS:
            yield sample(f"{name}-{wanted}", name, size=(2, 33), contention=5, wanted=wanted)
        for contention in (1, 3, 10):
            yield sample(f"{name}-contention-{contention}", name, size=(5, 40), contention=contention)
        for padding in ("hit", "miss", "right", "left", "holes", "all"):
            yield sample(f"{name}-padding-{padding}", name, size=(5, 9), contention=3, padding=padding)
        yield sample(f"{name}-padding-zeros", name, size=(5, 9), padding="zeros")
        yield sample(f"{name}-ids-int32", name, size=(2, 21), ids_dtype=torch.int32)
        yield sample(f"{name}-ids-int32-padding", name, size=(2, 9), ids_dtype=torch.int32, padding="hit")
        yield sample(f"{name}-strided", name, strided=True)
        yield sample(f"{name}-strided-bf16", name, BF16, strided=True)
        for value in (NAN, INF, 1e30):
            yield sample(f"{name}-special-{value}", name, contention=5, special=value)
    for name in ("whole-many", "many", "rows-many"):
        yield sample(f"{name}-20x70", name, size=(20, 70), contention=40, heavy=True)
    yield sample("last-misses", "last", misses=True)
    yield sample("rows-some-misses", "rows-some", misses=True)
    yield sample("rows-some-misses-norms", "rows-some", misses=True, wanted="norms")


def fisher_samples() -> Iterator[Sample]:
    yield from linear_samples()
    yield from embedding_samples()
