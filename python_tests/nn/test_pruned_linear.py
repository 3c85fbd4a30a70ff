"""PrunedLinear against the dense layer that it stands for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsekernels.nn.pruned import PrunedLinear

M, N = 11, 9
INDICES = {
    "some of both": ([1, 2, 7], [0, 3, 4, 8]),
    "rows": ([0, 10], None),
    "columns": (None, [5]),
    "all": (None, None),
    "all, by number": (list(range(M)), list(range(N))),
    "no rows": ([], [1, 2]),
    "no columns": ([3, 4], []),
    "nothing": ([], []),
}
cases = pytest.mark.parametrize(("rows", "columns"), INDICES.values(), ids=INDICES)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def made(rows, columns, bias=True, dtype=torch.float64):
    """A layer, and its weight and bias worked out one by one."""
    torch.manual_seed(0)
    r, c = range(M) if rows is None else rows, range(N) if columns is None else columns
    weight, b = torch.randn(len(r), len(c)).to(dtype), torch.randn(len(r)).to(dtype) if bias else None
    dense, dense_bias = torch.zeros(M, N, dtype=dtype), torch.zeros(M, dtype=dtype) if bias else None
    for i, row in enumerate(r):
        for j, column in enumerate(c):
            dense[row, column] = weight[i, j]
        if bias:
            dense_bias[row] = b[i]
    index = [None if i is None else torch.tensor(i, dtype=torch.int64) for i in (rows, columns)]
    layer = PrunedLinear(weight, b, *index, in_features=N, out_features=M)
    return layer, dense, dense_bias


@cases
@biases
def test_forward_is_that_of_the_dense_layer(rows, columns, bias):
    layer, weight, b = made(rows, columns, bias)
    for lead in [(), (5,), (2, 3), (0,), (2, 0, 3)]:
        x = torch.randn(*lead, N, dtype=torch.float64)
        y = layer(x)
        assert y.shape == (*lead, M)
        assert torch.allclose(y, F.linear(x, weight, b), rtol=1e-13, atol=1e-13)
    x = torch.randn(N, 4, 2, dtype=torch.float64).permute(2, 1, 0)  # not contiguous
    assert torch.allclose(layer(x), F.linear(x, weight, b), rtol=1e-13, atol=1e-13)


@cases
@biases
def test_gradients_are_those_of_the_dense_layer(rows, columns, bias):
    layer, weight, b = made(rows, columns, bias)
    dense = [weight.requires_grad_(), *([b.requires_grad_()] if bias else [])]
    x, dy = torch.randn(3, 4, N, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, M, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    expected = torch.autograd.grad(F.linear(x, *dense), [x, *dense], dy)
    r, c = slice(None) if rows is None else rows, slice(None) if columns is None else columns
    assert torch.allclose(got[0], expected[0], rtol=1e-13, atol=1e-13)
    assert torch.allclose(got[1], expected[1][r][:, c], rtol=1e-13, atol=1e-13)
    assert not bias or torch.allclose(got[2], expected[2][r], rtol=1e-13, atol=1e-13)


def test_gradients_of_gradients():
    layer, _, _ = made(*INDICES["some of both"])
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x) ** 3, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@cases
def test_low_precision_is_as_exact_as_the_dense_layer(dtype, rows, columns):
    layer, weight, b = made(rows, columns, dtype=dtype)
    x = torch.randn(7, N).to(dtype)
    y, exact = layer(x), F.linear(x.double(), weight.double(), b.double())
    error = (F.linear(x, weight, b).double() - exact).abs().max()
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * error + torch.finfo(dtype).eps * exact.abs().max()


@cases
def test_autocast_gives_what_a_linear_would(rows, columns):
    layer, _, _ = made(rows, columns, dtype=torch.float32)
    x = torch.randn(5, N, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, dense = layer(x), layer.to_linear()(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    assert torch.allclose(y.float(), dense.float(), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


@cases
@biases
def test_to_linear(rows, columns, bias):
    layer, weight, b = made(rows, columns, bias)
    layer.weight.requires_grad_(False)
    linear = layer.eval().to_linear()
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, weight)
    assert (linear.bias is None) == (not bias)
    assert not bias or torch.equal(linear.bias, b)
    assert not linear.weight.requires_grad
    assert not bias or linear.bias.requires_grad
    assert not linear.training
    assert linear.weight.data_ptr() != layer.weight.data_ptr() or not layer.weight.numel()
    assert (linear.in_features, linear.out_features) == (layer.in_features, layer.out_features) == (N, M)


def test_what_is_stored():
    weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    layer = PrunedLinear(weight, None, torch.tensor([0, 4]), torch.tensor([1, 2, 3]), in_features=4, out_features=5)
    assert layer.weight is weight
    assert {name: t.dtype for name, t in layer.state_dict().items()} == {
        "weight": torch.float32,
        "rows": torch.int32,
        "columns": torch.int32,
    }
    assert layer.half().rows.dtype == torch.int32
    assert repr(layer) == "PrunedLinear(in_features=4, out_features=5, bias=False, reads 3 and computes 2)"


def test_copies_compute_the_same():
    layer, _, _ = made(*INDICES["some of both"])
    x = torch.randn(4, N, dtype=torch.float64)
    other, _, _ = made([0, 1, 2], [0, 1, 2, 3])
    other.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(copied(x), layer(x))
    y = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(y, layer(x))


W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight must be \[R, C\] of a floating dtype, got \[3\]"),
        ({"weight": W.int()}, r"got \[2, 3\] of torch.int32"),
        ({"weight": W, "bias": torch.ones(3)}, r"bias must be \[2\] of torch.float32 on cpu, .* got \[3\]"),
        ({"weight": W, "bias": torch.ones(2).half()}, "got .* of torch.float16"),
        ({"weight": W, "out_features": 5}, "out_features is 5, but weight has 2 rows; pass `rows`"),
        ({"weight": W, "in_features": 5}, "in_features is 5, but weight has 3 columns; pass `columns`"),
        ({"weight": W, "rows": torch.arange(2)}, "out_features must be given with rows"),
        ({"weight": W, "columns": torch.arange(3)}, "in_features must be given with columns"),
        ({"weight": W, "rows": torch.arange(3), "out_features": 5}, r"rows must be integers of shape \[2\]"),
        ({"weight": W, "rows": torch.ones(2), "out_features": 5}, "got torch.float32"),
        ({"weight": W, "rows": torch.tensor([True, False]), "out_features": 5}, "got torch.bool"),
        ({"weight": W, "rows": torch.tensor([1, 1]), "out_features": 5}, "rows must be sorted, unique and lie in"),
        ({"weight": W, "rows": torch.tensor([2, 1]), "out_features": 5}, "rows must be sorted"),
        ({"weight": W, "rows": torch.tensor([-1, 1]), "out_features": 5}, r"lie in \[0, 5\)"),
        ({"weight": W, "columns": torch.tensor([1, 2, 3]), "in_features": 3}, r"columns must .* lie in \[0, 3\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrunedLinear(**arguments)


def test_error_of_the_input():
    layer, _, _ = made(*INDICES["some of both"])
    with pytest.raises(ValueError, match=rf"input must be \[..., {N}\], got \[2, 4\]"):
        layer(torch.ones(2, 4, dtype=torch.float64))


@cases
def test_compiled_in_one_graph(rows, columns):
    layer, _, _ = made(rows, columns)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, N, dtype=torch.float64, requires_grad=True)
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(out, [x, layer.weight], dy, retain_graph=True) for out in (y, expected))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
