"""Samples of the masked gradients; the oracle is the dense gradient in fp64, gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsekernels import Index, ops

from .case import BF16, FP16, FP32, FP64, Case, Layout, Maker, Sample, raw_of, short, take

NAN, INF = float("nan"), float("inf")
SHAPE = (17, 33)
LAYOUTS = (
    Layout("one", (1, 1), 1),
    Layout("none", SHAPE, 0),
    Layout("all", SHAPE, 1),
    Layout("last", SHAPE, -1.0),
    Layout("some", SHAPE, 0.1),
    Layout("int64", SHAPE, 0.3, wide=True),
    Layout("wide", (3, 200), 0.1),
    Layout("tall", (300, 5), 0.1),
    Layout("many", (150, 130), 0.4),
    Layout("rows-none", SHAPE, 0, "row"),
    Layout("rows-all", SHAPE, 1, "row"),
    Layout("rows-some", SHAPE, 0.3, "row"),
    Layout("rows-int64", SHAPE, 0.3, "row", wide=True),
    Layout("rows-width1", (13, 1), 0.5, "row"),
    Layout("rows-many", (300, 65), 0.3, "row"),
    Layout("rows-all-tall", (65, 17), 1, "row"),
    Layout("rows-most", (400, 50), 0.8, "row"),
    Layout("columns-most", (50, 400), 0.8, "column"),
    Layout("columns-none", SHAPE, 0, "column"),
    Layout("columns-all", SHAPE, 1, "column"),
    Layout("columns-some", SHAPE, 0.3, "column"),
    Layout("columns-int64", SHAPE, 0.3, "column", wide=True),
    Layout("columns-many", (300, 65), 0.3, "column"),
    Layout("blocks-none", SHAPE, 0, "block", block=(4, 8)),
    Layout("blocks-cut", SHAPE, 1, "block", block=(4, 8)),
    Layout("blocks-some", SHAPE, 0.4, "block", block=(3, 5)),
    Layout("blocks-int64", SHAPE, 0.3, "block", wide=True, block=(16, 16)),
    Layout("blocks-narrow", SHAPE, 0.3, "block", block=(4, 1)),
    Layout("blocks-many", (300, 65), 0.3, "block", block=(32, 48)),
    Layout("blocks-tall", (260, 5), 0.3, "block", block=(4, 1)),
    Layout("blocks-one-row", (8, 5), -1.0, "block", block=(4, 1)),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def linear(
    layout: Layout, dtype: torch.dtype, tokens: tuple[int, ...], strided: bool = False, special: float | None = None
) -> Callable[[Maker], Case]:
    """`tokens` are the leading dimensions of both activations."""

    def make(maker: Maker) -> Case:
        rows, columns = layout.shape
        if strided:
            grad, x = (maker.strided(*tokens, size, dtype=dtype) for size in (rows, columns))
        else:
            grad, x = (maker.randn(*tokens, size, dtype=dtype) for size in (rows, columns))
        if special is not None:
            grad.view(-1)[0], x.view(-1)[-1] = special, special
        index = maker.index(layout)
        wide = FP64 if special is None else FP32
        flat_grad, flat_x = grad.cpu().to(wide).flatten(0, -2), x.cpu().to(wide).flatten(0, -2)
        expected = take(flat_grad.T @ flat_x, index)
        raw = (grad.flatten(0, -2).contiguous(), x.flatten(0, -2).contiguous(), *raw_of(index))
        # But for the CPU kernel, rows and columns are a matmul, which rounds its result as the activations are.
        rounds_to = dtype if index.granularity in ("row", "column") and dtype in (BF16, FP16) else None
        return Case(ops.masked_grad_linear, (grad, x, index), raw, [expected], rounds_to=rounds_to)

    return make


def linear_samples() -> Iterator[Sample]:
    def sample(name: str, layout: str, dtype: torch.dtype = FP32, tokens: tuple[int, ...] = (29,), **more: object):
        return Sample("masked_grad_linear", name, linear(BY_NAME[layout], dtype, tokens, **more))

    for name in BY_NAME:
        yield sample(name, name)
    for dtype in (BF16, FP16, FP64):
        for name in ("none", "some", "many", "rows-some", "columns-some", "blocks-cut", "blocks-many"):
            yield sample(f"{name}-{short(dtype)}", name, dtype)
    for tokens in (1, 7, 64, 129, 300):
        yield sample(f"tokens-{tokens}", "some", tokens=(tokens,))
        yield sample(f"tokens-{tokens}-blocks", "blocks-some", tokens=(tokens,))
    yield sample("no-tokens", "some", tokens=(0,))
    for name in ("rows", "columns", "blocks"):
        yield sample(f"no-tokens-{name}", f"{name}-some", tokens=(0,))
        yield sample(f"3d-{name}", f"{name}-some", tokens=(3, 5))
    yield sample("3d", "some", tokens=(3, 5))
    yield sample("4d-bf16", "some", BF16, tokens=(2, 3, 5))
    for dtype in (FP32, BF16):
        yield sample(f"strided-{short(dtype)}", "some", dtype, strided=True)
        for name in ("rows", "columns", "blocks"):
            yield sample(f"strided-{name}-{short(dtype)}", f"{name}-some", dtype, strided=True)
    for name in ("rows-many", "rows-all-tall", "columns-many"):  # several packed chunks, and threads
        yield sample(f"tokens-2500-{name}", name, tokens=(2500,))
    for value in (NAN, INF, 1e30, 1e-40):
        yield sample(f"special-{value}", "all", special=value)
        for name in ("blocks-cut", "rows-some", "rows-all", "columns-some", "columns-all"):
            yield sample(f"special-{value}-{name}", name, special=value)
    yield sample("special-nan-some", "int64", special=NAN)


def embedding(
    layout: Layout,
    dtype: torch.dtype,
    tokens: tuple[int, ...],
    contention: int | None,
    padding: str | None = None,
    ids_dtype: torch.dtype = torch.int64,
    misses: bool = False,
    strided: bool = False,
    special: bool = False,
) -> Callable[[Maker], Case]:
    """`contention`: how many different ids there are (1: every token is the same), None for the whole table.

    padding: "hit" makes the id of the first token the padding id, "miss" takes one that no token has.
    misses: no id is selected.
    """

    def make(maker: Maker) -> Case:
        table, width = layout.shape
        index = maker.index(layout)
        chosen = rows_of(index)
        pool = torch.randperm(table, generator=maker.generator)
        if misses:
            pool = pool[~torch.isin(pool, chosen)]
        elif len(chosen) and contention is not None:
            pool = torch.cat([chosen[:1], pool[pool != chosen[0]]])  # few ids, but one of them is selected
        pool = pool[:contention]
        count = torch.Size(tokens).numel()
        ids = maker.put(pool[maker.integers(len(pool), count)].to(ids_dtype)).view(tokens)
        grad = maker.strided(*tokens, width, dtype=dtype) if strided else maker.randn(*tokens, width, dtype=dtype)
        if special:
            grad.view(-1)[:3] = torch.tensor([NAN, INF, -INF], dtype=dtype, device=grad.device)
        padding_idx = None
        if padding is not None:
            padding_idx = (
                int(ids.view(-1)[0]) if padding == "hit" else int(set(range(table)).difference(ids.tolist()).pop())
            )
        expected = take(embedding_oracle(grad, ids, table, padding_idx), index)
        raw_padding = -1 if padding_idx is None else padding_idx
        raw = (grad.flatten(0, -2).contiguous(), ids.flatten(), *raw_of(index), raw_padding)
        if index.granularity == "column":
            narrow = raw[0][:, index.positions.long()].contiguous()
            raw = (narrow, raw[1], torch.arange(table, device=narrow.device), [1, len(index)], raw_padding)
        kwargs = {"padding_idx": padding_idx}
        return Case(ops.masked_grad_embedding, (grad, ids, index), raw, [expected], kwargs=kwargs)

    return make


def rows_of(index: Index) -> Tensor:
    """The rows of a table that are selected, as a whole or in part."""
    positions = index.positions.cpu().long()
    if index.granularity == "row":
        return positions
    return (index.to_elements().positions.cpu().long() // index.shape[-1]).unique()


def rows_or_elements(index: Index) -> tuple[Tensor, bool]:
    """Positions and `rows` of an op that knows no other units."""
    rows = index.granularity == "row"
    return (index if rows else index.to_elements()).positions, rows


def embedding_oracle(grad: Tensor, ids: Tensor, table: int, padding_idx: int | None) -> Tensor:
    dense = torch.zeros(table, grad.shape[-1], dtype=FP64)
    for token, row in zip(ids.flatten().tolist(), grad.cpu().double().flatten(0, -2), strict=True):
        if token != padding_idx:
            dense[token] += row
    return dense


def embedding_samples() -> Iterator[Sample]:
    def sample(name: str, layout: str, dtype: torch.dtype = FP32, tokens: tuple[int, ...] = (41,), **more: object):
        more.setdefault("contention", None)
        return Sample("masked_grad_embedding", name, embedding(BY_NAME[layout], dtype, tokens, **more))

    for name in BY_NAME:
        yield sample(name, name)
    for dtype in (BF16, FP16, FP64):
        for name in ("some", "rows-some", "columns-some", "blocks-some"):
            yield sample(f"{name}-{short(dtype)}", name, dtype, contention=4)
    for layout in ("int64", "rows-some", "columns-some", "blocks-cut"):
        for contention in (1, 3, 10):
            yield sample(f"{layout}-contention-{contention}", layout, tokens=(200,), contention=contention)
        yield sample(f"{layout}-padding-hit", layout, contention=3, padding="hit")
        yield sample(f"{layout}-padding-miss", layout, contention=3, padding="miss")
        yield sample(f"{layout}-ids-int32", layout, ids_dtype=torch.int32)
        yield sample(f"{layout}-no-tokens", layout, tokens=(0,))
        yield sample(f"{layout}-one-token", layout, tokens=(1,), contention=1)
        yield sample(f"{layout}-3d", layout, tokens=(4, 9))
        yield sample(f"{layout}-strided", layout, strided=True)
        yield sample(f"{layout}-special", layout, contention=5, special=True)
    yield sample("last-misses", "last", misses=True)
    yield sample("rows-some-misses", "rows-some", misses=True)


def masked_grad_samples() -> Iterator[Sample]:
    yield from linear_samples()
    yield from embedding_samples()
