"""LowRankLinear against the dense layer that it stands for."""

import pytest
import torch
import torch.nn.functional as F

import sparsekernels as sk
from sparsekernels.low_rank import Block

WIDTH = 12
# Rows and rank of each block; rank None: dense.
SHAPES = {
    "one block": [(10, 3)],
    "one dense block": [(10, None)],
    "rank 0": [(10, 0)],
    "blocks": [(4, 2), (3, 1), (3, 4)],
    "mixed": [(4, 2), (3, None), (2, 0), (1, 1)],
    "all of rank 0": [(4, 0), (6, 0)],
    "more rank than rows": [(2, 5), (8, 9)],
}
layers = pytest.mark.parametrize(
    ("shape", "permuted"),
    [pytest.param(s, p, id=f"{name}{', permuted' * p}") for name, s in SHAPES.items() for p in (False, True)],
)


def made(shape, permuted=False, bias=True, dtype=torch.float32):
    """A layer, and its weight worked out row by row in fp64."""
    torch.manual_seed(0)
    blocks, parts = [], []
    for count, rank in shape:
        if rank is None:
            blocks.append(Block(torch.randn(count, WIDTH).to(dtype)))
            parts.append(blocks[-1].down.double())
        else:
            blocks.append(Block(torch.randn(rank, WIDTH).to(dtype), torch.randn(count, rank).to(dtype)))
            parts.append(blocks[-1].up.double() @ blocks[-1].down.double())
    weight = torch.cat(parts)
    rows = torch.randperm(len(weight)) if permuted else None
    expected = weight.clone()
    for j, row in enumerate([] if rows is None else rows.tolist()):
        expected[row] = weight[j]
    layer = sk.LowRankLinear(blocks, torch.randn(len(weight)).to(dtype) if bias else None, rows)
    assert rows is None or torch.equal(layer.rows, rows)
    return layer, expected


@layers
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_forward_is_that_of_the_dense_layer(shape, permuted, bias):
    layer, weight = made(shape, permuted, bias, torch.float64)
    for lead in [(), (5,), (2, 3), (0,), (2, 0, 3)]:
        x = torch.randn(*lead, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    assert (layer.in_features, layer.out_features) == (WIDTH, len(weight))
