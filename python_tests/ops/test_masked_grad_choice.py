"""Who computes the gradient of rows and columns on the CPU where no backend is named."""

from __future__ import annotations

import pytest
import torch

from sparsekernels import Index, ops
from sparsekernels.ops import masked_grad
from sparsekernels.ops.backend import has_native

pytestmark = pytest.mark.skipif(not has_native("masked_grad_linear", "cpu"), reason="needs the native CPU library")


@pytest.mark.parametrize("granularity", ["row", "column"])
@pytest.mark.parametrize(
    ("dtype", "fast_bf16", "native"),
    [
        (torch.float32, True, True),
        (torch.float64, True, True),
        (torch.float16, True, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, True),
    ],
)
def test_bf16_is_left_to_torch_where_that_is_faster(
    granularity: str, dtype: torch.dtype, fast_bf16: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_grad, "FAST_BF16", fast_bf16)
    grad, x = torch.randn(300, 40).to(dtype), torch.randn(300, 56).to(dtype)
    index = Index(torch.tensor([1, 5, 6, 30]), (40, 56), granularity)
    found, kernel, matmul = (ops.masked_grad_linear(grad, x, index, backend=b) for b in (None, "native", "reference"))
    assert not torch.equal(kernel, matmul)  # sums in another order, or rounded
    assert torch.equal(found, kernel if native else matmul)


def test_a_matrix_of_one_column_is_left_to_torch() -> None:
    grad, x = torch.randn(300, 40), torch.randn(300, 1)
    index = Index(torch.tensor([1, 5, 6, 30]), (40, 1), "row")
    found, matmul = (ops.masked_grad_linear(grad, x, index, backend=b) for b in (None, "reference"))
    assert torch.equal(found, matmul)
    assert not torch.equal(found, ops.masked_grad_linear(grad, x, index, backend="native"))
