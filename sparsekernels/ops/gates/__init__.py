"""Stochastic gates on rows and columns of frozen weights.

A gate is max(0, min(1, s)) for a random s whose centre its logit moves. A draw depends only on (key, stream, number of
the gate): it can be repeated from the key, on any device, so draws are never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import Backend, select
from ..common.arguments import DTYPES, accumulation_dtype, by_rows, packed
from .checks import Kind, check_group, check_like, check_logits, check_matrix, check_noise


def gate_values(
    logits: Tensor,
    *,
    kind: Kind,
    noise: float,
    key: Tensor | None = None,
    stream: int = 0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a gate for each logit, with its derivative; the logits are not changed.

    Equivalent, with u0, u1 = uniform(0, 1); without a key s is its centre, the same without the noise term

        stg:            s = logits + 0.5 + noise * sqrt(-2 * log(u0)) * cos(2 * pi * u1)
        finegates:      the same of tanh(logits)
        hard_concrete:  s = 1.2 * sigmoid((log(u0) - log(1 - u0) + logits) / noise) - 0.1; no key: sigmoid(logits)
        values, slopes = s.clamp(0, 1), torch.where((s > 0) & (s < 1), ds_dlogits, 0)

    Args:
        logits ([n], fp32 or fp64): not changed. mu of stg, its artanh of finegates, log alpha of hard_concrete.
        kind: "stg", "finegates" or "hard_concrete".
        noise: > 0; sigma of the normal noise, or the temperature beta of hard_concrete.
        key ([1], int64, on the device of logits): the key of Philox4x32-10; gate i uses the first two words of counter
            (i, stream), u = ((word >> 9) + 0.5) * 2**-23. None: no noise, as in evaluation.
        stream: in [0, 2**32); other streams give other draws under the same key.

    Returns:
        ([n], [n]), dtype of logits: values in [0, 1], and their derivatives by the logits, 0 where clamped.

    Numerics: in the dtype of logits. Deterministic; backends may differ in the last digits of a value.
    Cost: arithmetic, about 70 integer and 50 floating-point operations per gate.

    Raises:
        ValueError: kind, noise, stream, shapes, dtypes or devices do not fit.

    Source: STG, Yamada et al., arXiv 1810.04247; FineGates, Svirsky et al., arXiv 2412.12951; L0, Louizos et al., arXiv
    1712.01312, for hard_concrete.

    Examples:
        >>> sk.ops.gate_values(torch.tensor([-1.0, 0.0, 1.0]), kind="stg", noise=0.5)
        (tensor([0.0000, 0.5000, 1.0000]), tensor([0., 1., 0.]))
        >>> drawn, _ = sk.ops.gate_values(torch.zeros(1000), kind="stg", noise=0.5, key=torch.tensor([7]))
        >>> 0.45 < float(drawn.mean()) < 0.55
        True
    """
    number = check_noise(kind, noise, key, stream, logits.device)
    check_logits("logits", logits)
    run = select("gate_values", logits.device.type, backend)
    return run(packed(logits), number, noise, _key(key), stream)


def gate_probabilities(
    logits: Sequence[Tensor], *, kind: Kind, noise: float, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the probability that each gate is above 0 under its noise, with its derivative, over a list.

    Equivalent to

        stg:            p = Phi((torch.cat(logits) + 0.5) / noise), Phi being the normal distribution function
        finegates:      the same of tanh(logits)
        hard_concrete:  p = sigmoid(torch.cat(logits) - noise * log(0.1 / 1.1))

    Args:
        logits (each [n], fp32 or fp64, all of one dtype): at least one vector; not changed.
        kind, noise: as in gate_values.

    Returns:
        ([sum n], [sum n]), dtype of logits: probabilities, the vectors concatenated, and dp/dlogits.

    Numerics: in the dtype of logits; absolute errors of a few units in the last place of 1. Deterministic.
    Cost: one read of logits, two writes of their size; one launch on the CPU, one for each vector on a GPU.

    Raises:
        ValueError: no logits, or kind, noise, shapes, dtypes or devices do not fit.

    Source: as of gate_values; the sum of these is the L0 penalty of all three papers.

    Examples:
        >>> p, slopes = sk.ops.gate_probabilities([torch.tensor([-0.5]), torch.zeros(2)], kind="stg", noise=0.5)
        >>> p
        tensor([0.5000, 0.8413, 0.8413])
    """
    logits = list(logits)
    if not logits:
        raise ValueError("logits is empty: pass at least one vector")
    number = check_noise(kind, noise, None, 0, logits[0].device)
    for i, each in enumerate(logits):
        check_logits(f"logits[{i}]", each)
        if each.dtype != logits[0].dtype or each.device != logits[0].device:
            raise ValueError(
                f"logits[{i}] is {each.dtype} on {each.device}, logits[0] {logits[0].dtype} on {logits[0].device}: "
                "they must agree"
            )
    run = select("gate_probabilities", logits[0].device.type, backend)
    return run([packed(each) for each in logits], number, noise)


def gated_weight(
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    kind: Kind,
    noise: float,
    key: Tensor | None = None,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    column_group: int = 1,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply a weight and its bias by gates on rows and columns, drawn in the same pass; neither is changed.

    Equivalent, with `gate = lambda logits, stream: gate_values(logits, ..., stream=stream)[0]`, to

        z_r, z_c = gate(rows, 0), gate(columns, 1).repeat_interleave(column_group)
        return (weight * z_r[:, None] * z_c).to(dtype), (bias * z_r).to(dtype)

    Args:
        weight ([M, N], or [N, M] if transposed, as in Conv1D; fp32, fp64, bf16, fp16): not changed.
        bias ([M], dtype of weight): multiplied by the gates of the rows. None: no bias.
        rows ([M], fp32; fp64 for fp64 weights): logits of gates on outputs; None: not gated.
        columns ([N / column_group], likewise): logits of gates on inputs; None: not gated.
        kind, noise, key: as in gate_values; rows use stream 0, columns stream 1.
        transposed: whether weight is stored as [N, M].
        dtype: of the results, fp32, fp64, bf16 or fp16; None: that of weight. Use bf16 for what autocast would cast to
            bf16.
        column_group: number of neighbouring columns that share a gate.

    Returns:
        (shape of weight, [M] or None), in `dtype`, contiguous, in new memory.

    Numerics: products in fp32 (fp64 for an fp64 weight), rounded once. Deterministic.
    Cost: one read of weight, one write of the result. Scratch: M + N gates on the CPU; none on a GPU.

    Raises:
        ValueError: kind, noise, shapes, groups, dtypes or devices do not fit.

    Source: FineGates (Svirsky et al., arXiv 2412.12951); gating the weight instead of activations is ours.

    Examples:
        >>> rows = torch.tensor([2.0, -2.0])  # the first open, the second shut
        >>> sk.ops.gated_weight(torch.ones(2, 3), torch.ones(2), rows, kind="stg", noise=0.5)
        (tensor([[1., 1., 1.],
                [0., 0., 0.]]), tensor([1., 0.]))
    """
    number = check_noise(kind, noise, key, 0, weight.device)
    check_matrix("weight", weight)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be fp32, fp64, bf16 or fp16, got {dtype}")
    n, m = weight.shape if transposed else weight.shape[::-1]
    compute = accumulation_dtype(weight.dtype)
    check_group("column_group", column_group)
    for name, logits, size, group in (("rows", rows, m, 1), ("columns", columns, n, column_group)):
        if logits is not None:
            check_logits(name, logits, size, group, f"the {name} of weight {list(weight.shape)}")
            check_like(name, logits, compute, weight, "weight")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != m:
            raise ValueError(f"bias must have shape [{m}], one for each row, got {list(bias.shape)}")
        check_like("bias", bias, weight.dtype, weight, "weight")
    gates = [None if x is None else packed(x) for x in (bias, rows, columns)]
    run = select("gated_weight", weight.device.type, backend)
    gated, gated_bias = run(packed(weight), *gates, number, noise, _key(key), transposed, dtype, column_group)
    return gated, None if bias is None else gated_bias


def gate_gradient(
    a: Tensor,
    b: Tensor,
    logits: Tensor,
    *,
    kind: Kind,
    noise: float,
    key: Tensor | None = None,
    stream: int = 0,
    group: int = 1,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of gates from the activations on their side of a Linear, and that of a gated bias.

    Equivalent, with `z, slopes = gate_values(logits, ...)`, to

        of_values = (a * b).sum(0).unflatten(0, (-1, group)).sum(1) / z  # 0 where z is, whatever a and b are
        gradient = slopes * of_values  # 0 where slopes are, likewise
        scaled_sum = z.repeat_interleave(group) * a.sum(0)  # 0 where z is

    For y = F.linear(x, *gated_weight(...)): for the rows a, b = dy, y; for the columns a, b = x, dy @ W', with W' the
    gated weight. Either product has the gate as a factor, hence the division.

    Args:
        a ([T, W], fp32, fp64, bf16, fp16; W = n * group): not changed. The row stride may exceed W.
        b (like a): not changed.
        logits ([n], fp32 or fp64): of the gates; not changed.
        kind, noise, key, stream: those the gates were drawn with.
        group: number of neighbours that share a gate.

    Returns:
        ([n], [n], [W]), dtype of logits: the gradient of the logits; that of the values of the gates, also where they
        are clamped at 1 (its square is their Fisher information); for a = dy, the gradient of the bias.

    Numerics: products and sums of 64 tokens in fp32 (fp64 for fp64), sums of those in fp64. Deterministic, no atomics.
    Cost: one read of a and b; T/64 partial sums of both. Copies: of activations whose columns are not contiguous.

    Raises:
        ValueError: kind, noise, stream, shapes, group, dtypes or devices do not fit.

    Source: ours; the gates as of gate_values.

    Examples:
        >>> dy, y, logits = torch.ones(4, 2), torch.ones(4, 2), torch.zeros(2)
        >>> sk.ops.gate_gradient(dy, y, logits, kind="stg", noise=0.5)  # gates are 0.5
        (tensor([8., 8.]), tensor([8., 8.]), tensor([2., 2.]))
    """
    number = check_noise(kind, noise, key, stream, a.device)
    check_matrix("a", a)
    if b.shape != a.shape or b.dtype != a.dtype or b.device != a.device:
        raise ValueError(
            f"b is {list(b.shape)}, {b.dtype} on {b.device}; a is {list(a.shape)}, {a.dtype} on {a.device}: "
            "they must agree"
        )
    check_group("group", group)
    check_logits("logits", logits, a.shape[1], group, f"the columns of a {list(a.shape)}")
    if logits.device != a.device:
        raise ValueError(f"logits is on {logits.device}, expected {a.device}; pass logits.to({str(a.device)!r})")
    run = select("gate_gradient", a.device.type, backend)
    return run(by_rows(a), by_rows(b), packed(logits), number, noise, _key(key), stream, group)


def _key(key: Tensor | None) -> Tensor | None:
    return None if key is None else key.detach()
