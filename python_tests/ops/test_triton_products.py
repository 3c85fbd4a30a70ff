"""Triton launchers that have several ways, or that leave products to torch: each way gives the same."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import pytest
import torch
from samples.case import Sample
from samples.fisher import BY_NAME, linear
from samples.masked_grad import linear as masked_linear

from sparsekernels.ops import backend
from sparsekernels.ops.common.products import product


@pytest.mark.parametrize("few", [0, 10**9], ids=["dot-products", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["all", "last", "some", "sparse-int64"])
def test_fisher_linear_either_way(
    few: int, dtype: torch.dtype, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few positions or many: whichever way is taken for them, the other one gives the same."""
    monkeypatch.setattr(importlib.import_module("sparsekernels.ops.fisher.triton"), "FEW", few)
    sample = linear(BY_NAME[layout], dtype, (2, 7), padding="holes")
    case = Sample("fisher_linear_", layout, sample).case(device)
    case.call(*case.args, backend="triton")
    for found, expected in zip(case.mutated, case.expected, strict=True):
        torch.testing.assert_close(found.cpu(), expected.to(found.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fisher_linear_by_large_tiles(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles down in groups of two, the last ones cut off; tokens end within a step; a padding token holds NaN."""
    module = importlib.import_module("sparsekernels.ops.fisher.triton")
    monkeypatch.setattr(module, "ENOUGH", 0)
    monkeypatch.setattr(module, "GROUP", 2)
    grad, x = torch.randn(3, 70, 300).to(dtype), torch.randn(3, 70, 140).to(dtype)
    grad[1, 40:], x[1, 50] = 0, float("nan")
    found = torch.zeros(300, 140, device=device), torch.zeros(3, device=device)
    backend.triton_kernel("fisher_linear_")(grad.to(device), x.to(device), *found, None, False)
    squares = torch.einsum("bsm,bsn->bmn", grad.double(), x.nan_to_num().double()).square()
    for each, expected in zip(found, (squares.sum(0), squares.sum((1, 2))), strict=True):
        torch.testing.assert_close(each.cpu(), expected.float(), rtol=1e-4, atol=1e-4)


def test_three_bf16_parts_make_fp32(device: torch.device) -> None:
    """Their sum is the number, bit for bit, and the smallest comes first; infinity and NaN stay what they are."""
    parts = importlib.import_module("sparsekernels.ops.singular_values.triton").bf16_parts
    x = torch.randn(100, 31) * 10.0 ** torch.randint(-20, 20, (100, 31))
    found = parts(x.to(device)).cpu()
    assert found.dtype == torch.bfloat16
    found = found.float()
    assert torch.equal(found[0] + found[1] + found[2], x)
    assert bool((found[0].abs() <= found[1].abs()).all())
    assert bool((found[1].abs() < found[2].abs()).all())
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    assert torch.equal(parts(special.to(device)).float().sum(0).cpu().nan_to_num(3.0), special.nan_to_num(3.0))


@pytest.mark.parametrize("per_sample", [False, True])
def test_singular_values_by_parts(per_sample: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for bf16 on a GPU, though the CPU widens what it multiplies: as exact as in fp32."""
    module = importlib.import_module("sparsekernels.ops.singular_values.triton")
    monkeypatch.setattr(module, "has_tensor_cores", lambda x: True)
    monkeypatch.setattr(module, "CHUNK_BYTES", 6 * 20 * 31 * 2)
    dy, x = torch.randn(5, 31, 20).bfloat16(), torch.randn(5, 31, 12).bfloat16()
    u, v = torch.randn(20, 7), torch.randn(12, 7)
    found = module.singular_value_grad_linear(*(t.to(device) for t in (dy, x, u, v)), per_sample).cpu()
    expected = ((dy.double() @ u.double()) * (x.double() @ v.double())).sum(1)
    expected = expected if per_sample else expected.sum(0)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("chunk", [1, 3000], ids=["unit-by-unit", "chunks"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_singular_values_by_chunks(
    chunk: int, per_sample: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projections in chunks that end within a sample, if samples are summed, and between them, if not."""
    monkeypatch.setattr(importlib.import_module("sparsekernels.ops.singular_values.triton"), "CHUNK_BYTES", chunk)
    dy, x, u, v = torch.randn(5, 31, 20), torch.randn(5, 31, 12), torch.randn(20, 7), torch.randn(12, 7)
    run = backend.triton_kernel("singular_value_grad_linear")
    found = run(*(t.to(device) for t in (dy, x, u, v)), per_sample).cpu()
    expected = ((dy.double() @ u.double()) * (x.double() @ v.double())).sum(1)
    torch.testing.assert_close(found, (expected if per_sample else expected.sum(0)).float(), rtol=1e-5, atol=1e-4)


def test_one_block_of_the_product_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sparsekernels.ops.masked_grad.triton")
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 11 * 5)
    made: list[weakref.ref[torch.Tensor]] = []

    def watched_product(*args: Any) -> torch.Tensor:
        assert all(block() is None for block in made)
        made.append(weakref.ref(block := product(*args)))
        return block

    monkeypatch.setattr(module, "product", watched_product)
    grad, x, every = torch.randn(29, 17), torch.randn(29, 11), torch.arange(17 * 11)
    found = module.masked_grad_linear(*(t.to(device) for t in (grad, x, every)), (1, 1)).cpu()
    assert len(made) == 4
    torch.testing.assert_close(found.view(17, 11), grad.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "count", "by_blocks"), [(29, 41, False), (29, 300, True), (4, 300, False)])
def test_the_way_is_chosen_by_density_and_tokens(
    tokens: int, count: int, by_blocks: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("sparsekernels.ops.masked_grad.triton")
    asked: list[int] = []
    monkeypatch.setattr(module, "product", lambda *args: asked.append(1) or product(*args))
    grad, x = torch.randn(tokens, 60, device=device), torch.randn(tokens, 50, device=device)
    module.masked_grad_linear(grad, x, torch.arange(count, device=device), (1, 1))
    assert bool(asked) == by_blocks


@pytest.mark.parametrize("block_bytes", [1, 1000, 10**9], ids=["row-by-row", "blocks", "one-block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["all", "last", "some", "sparse-int64"])
def test_masked_grad_linear_either_way(
    block_bytes: int, dtype: torch.dtype, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dot products, or blocks of the dense product: whichever way is taken, the other one gives the same."""
    module = importlib.import_module("sparsekernels.ops.masked_grad.triton")
    case = Sample("masked_grad_linear", layout, masked_linear(BY_NAME[layout], dtype, (29,))).case(device)
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    for few in (0, 10**9):
        monkeypatch.setattr(module, "FEW", {})
        monkeypatch.setattr(module, "FEW_WIDE", (few, 0))
        found = case.call(*case.args, backend="triton")
        torch.testing.assert_close(found.cpu(), case.expected[0].to(found.dtype), rtol=1e-5, atol=1e-5)
