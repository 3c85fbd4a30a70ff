"""LowRankLinear against the dense layer that it stands for."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekernels as sk
from sparsekernels.nn.low_rank import Block

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


@layers
def test_gradients(shape, permuted):
    layer, _ = made(shape, permuted, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))


@layers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_is_the_product_in_the_dtype_of_the_factors(shape, permuted, dtype):
    layer, expected = made(shape, permuted, dtype=dtype)
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight, expected.to(dtype), atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(layer.weight, expected.to(dtype), atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, layer.weight)
    assert torch.equal(linear.bias, layer.bias)
    assert linear.bias.data_ptr() != layer.bias.data_ptr()
    x = torch.randn(5, WIDTH).to(dtype)
    torch.testing.assert_close(layer(x), linear(x), atol=0.1 if dtype.itemsize == 2 else 1e-4, rtol=1e-2)


def test_weight_is_differentiable():
    layer, _ = made(SHAPES["mixed"], permuted=True, dtype=torch.float64)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    grad = torch.randn(5, 10, dtype=torch.float64)
    found = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), list(layer.parameters()), grad)
    expected = torch.autograd.grad(layer(x), list(layer.parameters()), grad)
    torch.testing.assert_close(found, expected)


@layers
def test_autocast_gives_what_a_dense_layer_gives(shape, permuted):
    layer, _ = made(shape, permuted)
    x = torch.randn(5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.3, rtol=2e-2)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", ["one block", "mixed", "all of rank 0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(name, permuted, dtype):
    torch._dynamo.reset()
    layer, _ = made(SHAPES[name], permuted, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, WIDTH).to(dtype).requires_grad_()
    inputs = [x, *layer.parameters()]
    for found, expected in zip(
        [compiled(x), *torch.autograd.grad(compiled(x).sum(), inputs)],
        [layer(x), *torch.autograd.grad(layer(x).sum(), inputs)],
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    layer, _ = made(SHAPES["mixed"], permuted=True)
    x = torch.randn(5, WIDTH, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert all(torch.equal(f, p.grad) for f, p in zip(found, layer.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, sk.SparseAdamW])
def test_factors_train(optimizer):
    layer, _ = made(SHAPES["mixed"], permuted=True)
    x, target = torch.randn(64, WIDTH), torch.randn(64, 10)
    stepper = optimizer(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@layers
@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved])
def test_copies(shape, permuted, way):
    layer, _ = made(shape, permuted)
    twin = way(layer)
    x = torch.randn(5, WIDTH)
    assert torch.equal(twin(x), layer(x))
    assert twin.extra_repr() == layer.extra_repr()
    with torch.no_grad():
        layer.down.add_(1)
        layer.bias.add_(1)
    assert not torch.equal(twin(x), layer(x))


@layers
def test_state_dict_round_trip(shape, permuted):
    layer, weight = made(shape, permuted)
    state = layer.state_dict()
    low = [f"up{k}" for k, (_, rank) in enumerate(shape) if rank is not None]
    assert set(state) == {"down", *low, "bias", *(["places"] if permuted else [])}
    other, _ = made(shape, permuted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    if permuted:
        other.places.copy_(torch.arange(10))
    other.load_state_dict(state)
    torch.testing.assert_close(other.weight, weight.float())
    x = torch.randn(5, WIDTH)
    assert torch.equal(other(x), layer(x))


def test_half_leaves_the_permutation_whole():
    layer, _ = made(SHAPES["blocks"], permuted=True)
    rows = layer.rows
    assert torch.equal(layer.to(torch.bfloat16).rows, rows)
    assert layer.weight.dtype == torch.bfloat16


def test_factors_are_copies_and_keep_nothing_else_alive():
    whole = torch.randn(WIDTH, WIDTH)
    bias = torch.randn(WIDTH)
    for up in (whole[:, :2], None):
        layer = sk.LowRankLinear([Block(whole[:2], up)], bias[: WIDTH if up is not None else 2])
        for parameter in layer.parameters():
            assert parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
            assert parameter.requires_grad
            assert parameter.untyped_storage().data_ptr() not in (whole.data_ptr(), bias.data_ptr())


def test_frozen_parameters_stay_frozen_and_a_bias_the_same_object():
    dense = nn.Linear(WIDTH, 4).requires_grad_(False)
    low = Block(torch.randn(2, WIDTH), nn.Parameter(torch.randn(3, 2)))
    layer = sk.LowRankLinear([Block(dense.weight)], dense.bias)
    assert layer.bias is dense.bias
    assert not layer.down.requires_grad
    assert not layer.to_linear().weight.requires_grad
    assert not layer.to_linear().bias.requires_grad
    assert layer.to_linear().bias is not dense.bias
    layer = sk.LowRankLinear([Block(dense.weight), low])
    assert layer.down.requires_grad
    assert layer.up1.requires_grad
    low.up.requires_grad_(False)
    assert not sk.LowRankLinear([low]).up0.requires_grad
    assert not layer.eval().to_linear().training


def test_blocks_are_what_was_given():
    low, dense = Block(torch.randn(2, WIDTH), torch.randn(3, 2)), Block(torch.randn(4, WIDTH))
    for found, given in zip(sk.LowRankLinear([low, dense]).blocks, [low, dense], strict=True):
        assert torch.equal(found.down, given.down)
        assert (found.up is None) == (given.up is None)
        assert found.up is None or torch.equal(found.up, given.up)


def test_is_smaller():
    def one(rank, rows=6, columns=WIDTH):  # 6 * 12 / (6 + 12) = 4
        return Block(torch.empty(rank, columns), torch.empty(rows, rank))

    dense = Block(torch.empty(6, WIDTH))
    assert [sk.LowRankLinear.is_smaller([one(r)]) for r in (0, 3, 4, 5)] == [True, True, False, False]
    assert not sk.LowRankLinear.is_smaller([dense])
    assert sk.LowRankLinear.is_smaller([dense, one(3)])
    assert sk.LowRankLinear.is_smaller([one(3), one(4)])
    assert not sk.LowRankLinear.is_smaller([one(3), one(5)])


def test_repr_says_what_is_stored():
    layer, _ = made(SHAPES["mixed"])
    stored = (2 + 3 + 0 + 1) * WIDTH + 4 * 2 + 0 + 1
    assert repr(layer) == (
        "LowRankLinear(in_features=12, out_features=10, ranks=[2, dense, 0, 1], bias=True, "
        f"stores {stored} for 120 elements)"
    )


DOWN, UP = torch.zeros(2, WIDTH), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("blocks", "named", "message"),
    [
        ([], {}, r"blocks is empty; pass at least one Block"),
        ([Block(DOWN, UP.T)], {}, r"blocks\[0\]\.up must be \[M, r\] with r = 2 as in its down; got \[2, 4\]"),
        ([Block(DOWN, UP[0])], {}, r"blocks\[0\]\.up must be \[M, r\]"),
        ([Block(DOWN[0], UP)], {}, r"blocks\[0\]\.down must be \[r, N\] .* got \[12\]"),
        ([Block(DOWN.sum(), UP)], {}, r"blocks\[0\]\.down must be \[r, N\] .* got \[\]"),
        ([Block(DOWN), Block(DOWN[:, 1:])], {}, r"blocks\[1\]\.down must be .* all blocks, 12; got \[2, 11\]"),
        ([Block(DOWN, UP.half())], {}, r"blocks\[0\]\.up is torch\.float16 on cpu, blocks\[0\]\.down torch\.float32"),
        ([Block(DOWN), Block(DOWN.to("meta"))], {}, r"blocks\[1\]\.down is torch\.float32 on meta, .* convert one"),
        ([Block(DOWN.int(), UP.int())], {}, r"floating-point dtype, got torch\.int32"),
        ([Block(DOWN, UP)], {"bias": torch.zeros(4).double()}, r"bias is torch\.float64 .* convert one with \.to"),
        ([Block(DOWN, UP)], {"bias": torch.zeros(3)}, r"bias must be \[4\], .* rows of the blocks; got \[3\]"),
        ([Block(DOWN, UP)], {"bias": torch.zeros(1, 4)}, r"bias must be \[4\]"),
        ([Block(DOWN, UP)], {"rows": torch.tensor([0, 1, 2])}, r"rows must contain each of 0 to 3 once"),
        ([Block(DOWN, UP)], {"rows": torch.tensor([0, 1, 2, 2])}, r"rows must contain each of 0 to 3 once"),
        ([Block(DOWN, UP)], {"rows": torch.tensor([1, 2, 3, 4])}, r"for rows in order pass None"),
        ([Block(DOWN, UP)], {"rows": torch.tensor([0.0, 1, 2, 3])}, r"in an integer tensor; got .* torch\.float32"),
        ([Block(DOWN[:, :], UP[:2])], {"rows": torch.tensor([False, True])}, r"integer tensor; got .* torch\.bool"),
    ],
)
def test_errors_name_the_argument_and_the_fix(blocks, named, message):
    with pytest.raises(ValueError, match=message):
        sk.LowRankLinear(blocks, **named)


def test_other_integers_do_for_rows():
    layer = sk.LowRankLinear([Block(DOWN, UP)], rows=torch.tensor([3, 1, 0, 2], dtype=torch.int32))
    assert layer.rows.tolist() == [3, 1, 0, 2]
