"""Samples of stochastic gates; the oracle has a Philox of its own, and closed forms in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import expit, ndtr
from torch import Tensor

from sparsekernels import ops

from .case import BF16, FP16, FP32, FP64, Case, Maker, Sample, short

NAN, INF = float("nan"), float("inf")
KINDS = ("stg", "finegates", "hard_concrete")
NOISE = {"stg": 0.5, "finegates": 0.3, "hard_concrete": 2 / 3}
KEY = 0x299F31D0A4093822
WORD = np.uint64(0xFFFFFFFF)


def philox(key: int, count: int, stream: int) -> list[np.ndarray]:
    """The four words of counters (0, stream), (1, stream), ..."""
    i = np.arange(count, dtype=np.uint64)
    c = [i & WORD, i >> np.uint64(32), np.full_like(i, stream), np.zeros_like(i)]
    k0, k1 = key % 2**32, (key >> 32) % 2**32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(k0), b & WORD, a >> np.uint64(32) ^ c[3] ^ np.uint64(k1), a & WORD]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def sech2(x: np.ndarray) -> np.ndarray:
    """The derivative of tanh."""
    return 4 * expit(2 * x) * expit(-2 * x)


def draw(logits: Tensor, kind: str, key: int | None, stream: int = 0) -> tuple[Tensor, Tensor]:
    """Values and slopes of gates, in fp64."""
    x, noise = logits.detach().cpu().double().numpy(), NOISE[kind]
    u, v = ((w >> np.uint64(9)).astype(float) / 2**23 + 2.0**-24 for w in philox(key or 0, len(x), stream)[:2])
    if kind == "hard_concrete":
        s = expit(x if key is None else (np.log(u / (1 - u)) + x) / noise)
        center, slope = 1.2 * s - 0.1, 1.2 * s * (1 - s) / (1 if key is None else noise)
    else:
        normal = 0.0 if key is None else np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
        center = (np.tanh(x) if kind == "finegates" else x) + 0.5 + noise * normal
        slope = sech2(x) if kind == "finegates" else np.ones_like(x)
    inside = (center > 0) & (center < 1)
    return torch.from_numpy(np.clip(center, 0, 1)), torch.from_numpy(np.where(inside, slope, 0))


def logits_of(maker: Maker, count: int, kind: str, dtype: torch.dtype = FP32, strided: bool = False) -> Tensor:
    """Some of them clamped for certain, at either end."""
    if strided:
        return maker.strided(count, 1, dtype=dtype)[:, 0]
    logits = maker.randn(count, dtype=dtype, scale=2.0 if kind == "hard_concrete" else 0.6)
    logits[3::7], logits[5::7] = (-20.0, 20.0) if kind == "hard_concrete" else (-9.0, 9.0)
    return logits


def key_of(maker: Maker, key: int | None) -> Tensor | None:
    return None if key is None else maker.put(torch.tensor([key]))


def values(
    count: int, kind: str, dtype: torch.dtype = FP32, key: int | None = KEY, stream: int = 0,
    strided: bool = False, special: bool = False,
) -> Callable[[Maker], Case]:  # fmt: skip
    def make(maker: Maker) -> Case:
        logits = logits_of(maker, count, kind, dtype, strided)
        if special:
            logits[:4] = torch.tensor([NAN, INF, -INF, 1e30])
        kwargs = {"kind": kind, "noise": NOISE[kind], "key": key_of(maker, key), "stream": stream}
        raw = (logits.contiguous(), KINDS.index(kind), NOISE[kind], kwargs["key"], stream)
        return Case(ops.gate_values, (logits,), raw, [*draw(logits, kind, key, stream)], kwargs)

    return make


def values_samples() -> Iterator[Sample]:
    def sample(name: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("gate_values", name, values(*args, **more), heavy)

    for kind in KINDS:
        for count in (0, 1, 5, 64, 301):
            yield sample(f"{kind}-{count}", count, kind)
            yield sample(f"{kind}-{count}-f64", count, kind, FP64)
        yield sample(f"{kind}-9000", 9000, kind, heavy=True)
        for key in (None, -1, 2**40 + 1):
            yield sample(f"{kind}-key-{key}", 33, kind, key=key)
            yield sample(f"{kind}-key-{key}-f64", 33, kind, FP64, key=key)
        for stream in (1, 2**32 - 1):
            yield sample(f"{kind}-stream-{stream}", 33, kind, stream=stream)
        yield sample(f"{kind}-strided", 21, kind, strided=True)
        yield sample(f"{kind}-special", 21, kind, special=True)
        yield sample(f"{kind}-special-no-key", 21, kind, key=None, special=True)


def probabilities(
    counts: tuple[int, ...], kind: str, dtype: torch.dtype = FP32, strided: bool = False, special: bool = False
) -> Callable[[Maker], Case]:
    def make(maker: Maker) -> Case:
        logits = [logits_of(maker, count, kind, dtype, strided) for count in counts]
        if special:
            logits[0][:4] = torch.tensor([NAN, INF, -INF, 1e18])
        x, noise = torch.cat(logits).cpu().double().numpy(), NOISE[kind]
        if kind == "hard_concrete":
            p = expit(x + noise * np.log(11))
            slope = p * (1 - p)
        else:
            score = ((np.tanh(x) if kind == "finegates" else x) + 0.5) / noise
            p, slope = ndtr(score), np.exp(-(score**2) / 2) / np.sqrt(2 * np.pi) / noise
            slope = slope * sech2(x) if kind == "finegates" else slope
        raw = ([each.contiguous() for each in logits], KINDS.index(kind), noise)
        kwargs = {"kind": kind, "noise": noise}
        return Case(ops.gate_probabilities, (logits,), raw, [torch.from_numpy(p), torch.from_numpy(slope)], kwargs)

    return make


def probabilities_samples() -> Iterator[Sample]:
    def sample(name: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("gate_probabilities", name, probabilities(*args, **more), heavy)

    for kind in KINDS:
        for name, counts in {"none": (0,), "one": (1,), "list": (5, 0, 64, 1, 130), "many": (17,) * 20}.items():
            yield sample(f"{kind}-{name}", counts, kind)
            yield sample(f"{kind}-{name}-f64", counts, kind, FP64)
        yield sample(f"{kind}-large", (9000, 3, 20000), kind, heavy=True)
        yield sample(f"{kind}-strided", (13, 8), kind, strided=True)
        yield sample(f"{kind}-special", (21,), kind, special=True)


def gated(*args: Any, **kwargs: Any) -> list[Tensor]:
    """gated_weight, without the bias where there is none."""
    return [x for x in ops.gated_weight(*args, **kwargs) if x is not None]


def weighted(
    shape: tuple[int, int], kind: str = "stg", dtype: torch.dtype = FP32, out: torch.dtype | None = None,
    sides: str = "rc", bias: bool = True, transposed: bool = False, group: int = 1,
    key: int | None = KEY, strided: bool = False, special: bool = False,
) -> Callable[[Maker], Case]:  # fmt: skip
    """`shape` counts gates; sides: which of rows and columns have them."""

    def make(maker: Maker) -> Case:
        m, n = shape[0], shape[1] * group
        lies = (n, m) if transposed else (m, n)
        weight = maker.strided(*lies, dtype=dtype) if strided else maker.randn(*lies, dtype=dtype)
        shift = maker.randn(m, dtype=dtype) if bias else None
        if special:
            weight.view(-1)[:4] = torch.tensor([NAN, INF, -INF, 1e-40], dtype=FP64).to(dtype)
        wide = torch.promote_types(dtype, FP32)
        rows, columns = (
            logits_of(maker, size, kind, wide, strided) if side in sides else None
            for side, size in zip("rc", shape, strict=True)
        )
        expected, expected_shift = weight.cpu().double(), None if shift is None else shift.cpu().double()
        if rows is not None:
            z = draw(rows, kind, key, 0)[0]
            expected = expected * (z if transposed else z[:, None])
            expected_shift = None if expected_shift is None else expected_shift * z
        if columns is not None:
            z = draw(columns, kind, key, 1)[0].repeat_interleave(group)
            expected = expected * (z[:, None] if transposed else z)
        options = {"key": key_of(maker, key), "transposed": transposed}
        kwargs = {"kind": kind, "noise": NOISE[kind], **options, "dtype": out}
        packed = [None if x is None else x.contiguous() for x in (weight, shift, rows, columns)]
        raw = (*packed, KINDS.index(kind), NOISE[kind], *options.values(), out or dtype, group)
        return Case(
            gated, (weight, shift, rows, columns), raw, [expected] + [expected_shift] * bias,
            {**kwargs, "column_group": group},
        )  # fmt: skip

    return make


def weighted_samples() -> Iterator[Sample]:
    def sample(name: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("gated_weight", name, weighted(*args, **more), heavy)

    for transposed in (False, True):
        tag = "-transposed" if transposed else ""
        for shape in ((1, 1), (17, 33), (1, 33), (33, 1), (0, 7), (7, 0), (64, 48)):
            yield sample(f"{shape[0]}x{shape[1]}{tag}", shape, transposed=transposed)
        for kind in KINDS:
            for key in (None, -5):
                yield sample(f"{kind}-key-{key}{tag}", (17, 33), kind, key=key, transposed=transposed)
        for sides in ("r", "c", ""):
            for bias in (False, True):
                name = f"{sides or 'neither'}{'-bias' * bias}{tag}"
                yield sample(name, (17, 33), sides=sides, bias=bias, transposed=transposed)
        for dtype in (FP32, BF16, FP16, FP64):
            for out in (FP32, BF16, FP16, *[FP64] * (dtype == FP64)):
                name = f"{short(dtype)}-to-{short(out)}{tag}"
                yield sample(name, (17, 33), dtype=dtype, out=out, transposed=transposed)
        for group in (2, 3):
            yield sample(f"group-{group}{tag}", (9, 11), group=group, transposed=transposed)
            yield sample(f"group-{group}{tag}-bf16", (9, 11), dtype=BF16, group=group, transposed=transposed)
        yield sample(f"strided{tag}", (17, 33), strided=True, transposed=transposed)
        yield sample(f"special{tag}", (17, 33), special=True, transposed=transposed)
        yield sample(f"special-bf16{tag}", (17, 33), dtype=BF16, special=True, transposed=transposed)
        for dtype in (FP32, BF16):
            name = f"large-{short(dtype)}{tag}"
            yield sample(name, (301, 299), "finegates", dtype, transposed=transposed, heavy=True)
    yield sample("wide", (3, 9001), heavy=True)
    yield sample("tall", (9001, 3), heavy=True)


def gradient(
    tokens: int, count: int, kind: str = "stg", dtype: torch.dtype = FP32, group: int = 1, key: int | None = KEY,
    stream: int = 0, gates: torch.dtype | None = None, apart: int = 0, strided: bool = False, special: bool = False,
) -> Callable[[Maker], Case]:  # fmt: skip
    """apart: elements between rows. special: NaN where gates are closed, infinities where they are clamped."""

    def make(maker: Maker) -> Case:
        width = count * group
        a, b = (
            maker.strided(tokens, width, dtype=dtype) if strided else maker.randn(tokens, width + apart, dtype=dtype)
            for _ in range(2)
        )
        a, b = a[:, :width], b[:, :width]
        logits = logits_of(maker, count, kind, gates or torch.promote_types(dtype, FP32))
        z, _ = draw(logits, kind, key, stream)
        logits[(z > 0) & (z < 0.05)] = 20.0  # 1 / z knows z no better than 1e-7 / z
        z, slopes = draw(logits, kind, key, stream)
        if special:
            # No NaN in a result: opcheck does not bear it. One infinity to a group: two might make NaN.
            clamped, closed = ((x == 0).nonzero().flatten() * group for x in (slopes, z))
            a[-1, clamped[::2]], b[-1, clamped[::3]], a[0, closed[::4]] = INF, INF, NAN
        products = (a.cpu().double() * b.cpu().double()).sum(0).unflatten(0, (count, group)).sum(1)
        each = z.repeat_interleave(group)
        of_values = torch.where(z == 0, 0, products / z)
        expected = [
            torch.where(slopes == 0, 0, slopes * of_values),
            of_values,
            torch.where(each == 0, 0, each * a.cpu().double().sum(0)),
        ]
        options = {"key": key_of(maker, key), "stream": stream, "group": group}
        packed = [x.contiguous() if x.stride(-1) != 1 else x for x in (a, b)]
        raw = (*packed, logits, KINDS.index(kind), NOISE[kind], *options.values())
        kwargs = {"kind": kind, "noise": NOISE[kind], **options}
        return Case(ops.gate_gradient, (a, b, logits), raw, expected, kwargs)

    return make


def gradient_samples() -> Iterator[Sample]:
    def sample(name: str, *args: Any, heavy: bool = False, **more: Any) -> Sample:
        return Sample("gate_gradient", name, gradient(*args, **more), heavy)

    for tokens, count in ((0, 5), (1, 1), (1, 33), (7, 0), (7, 33), (9, 64), (64, 17), (65, 17), (131, 5)):
        for dtype in (FP32, BF16):
            yield sample(f"{tokens}x{count}-{short(dtype)}", tokens, count, dtype=dtype)
    for kind in KINDS:
        for key in (None, -5):
            yield sample(f"{kind}-key-{key}", 11, 33, kind, key=key)
        for dtype in (FP16, FP64):
            yield sample(f"{kind}-{short(dtype)}", 13, 33, kind, dtype)
        yield sample(f"{kind}-stream", 13, 33, kind, stream=1)
        yield sample(f"{kind}-special", 9, 40, kind, special=True)
        yield sample(f"{kind}-special-group", 9, 20, kind, BF16, group=4, special=True)
    for dtype in (FP32, BF16, FP64):
        for group in (2, 7, 64):
            yield sample(f"group-{group}-{short(dtype)}", 19, 6, dtype=dtype, group=group)
        yield sample(f"apart-{short(dtype)}", 19, 33, dtype=dtype, apart=5)
        yield sample(f"strided-{short(dtype)}", 19, 33, dtype=dtype, strided=True)
        yield sample(f"long-{short(dtype)}", 2100, 19, dtype=dtype, heavy=True)
        yield sample(f"wide-{short(dtype)}", 70, 2100, dtype=dtype, heavy=True)
        yield sample(f"wide-groups-{short(dtype)}", 70, 33, dtype=dtype, group=64, heavy=True)
    yield sample("f64-f32-gates", 19, 33, dtype=FP64, gates=FP32)


def gates_samples() -> Iterator[Sample]:

    yield from values_samples()
    yield from probabilities_samples()
    yield from weighted_samples()
    yield from gradient_samples()
