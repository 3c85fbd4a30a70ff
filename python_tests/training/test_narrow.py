"""Backward keeps only the input features that the gradient of the selected weights depends on, once for all layers."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import transformer
from test_train_only_memory import saved_bytes
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparsekernels as sk
from sparsekernels import Index, Selection

TOKENS, IN, OUT = 64, 48, 32


def chosen(granularity: str, block: tuple[int, int] | None, *positions: int, shape: tuple[int, ...]) -> Selection:
    return Selection({"weight": Index(torch.tensor(positions), shape, granularity, block)})


# What the layer keeps of its input, in features of IN = 48.
LINEAR = {
    "elements": ("element", None, (5,), 48),
    "rows": ("row", None, (5,), 48),
    "columns": ("column", None, (3, 7, 40), 3),
    "blocks": ("block", (8, 16), (0, 3, 6), 16),  # all of one set of columns
    "cut block": ("block", (8, 20), (2,), 8),  # the last 8 columns
    "blocks in most columns": ("block", (8, 16), (0, 1), 48),
}
CONV1D = {  # the weight is [IN, OUT]
    "elements": ("element", None, (5,), 48),
    "rows": ("row", None, (5, 6), 2),
    "columns": ("column", None, (3, 7), 48),
    "blocks": ("block", (16, 8), (0, 2, 3), 16),
    "cut block": ("block", (20, 8), (8, 9), 8),
    "narrow blocks": ("block", (16, 1), (0, 1), 48),
}


def one_layer(kind: str) -> tuple[nn.Module, dict[str, tuple], tuple[int, int]]:
    if kind == "linear":
        return nn.Linear(IN, OUT), LINEAR, (OUT, IN)
    return Conv1D(OUT, IN), CONV1D, (IN, OUT)


@pytest.mark.parametrize(
    ("kind", "case"), [*(("linear", case) for case in LINEAR), *(("conv1d", case) for case in CONV1D)]
)
def test_what_a_layer_keeps(kind: str, case: str) -> None:
    model, cases, shape = one_layer(kind)
    granularity, block, positions, kept = cases[case]
    selection = chosen(granularity, block, *positions, shape=shape)
    dense, x = copy.deepcopy(model), torch.randn(TOKENS, IN)
    dense(x).square().sum().backward()
    tuned = sk.train_only(model, selection)
    assert saved_bytes(model, lambda: model(x)) == 4 * TOKENS * kept
    model(x).square().sum().backward()
    (values,) = tuned.parameters()
    expected = sk.ops.gather(dense.weight.grad, selection["weight"])
    assert torch.allclose(values.grad, expected, rtol=1e-5, atol=1e-4)


def attention(**more: bool) -> tuple[nn.ModuleDict, Callable[[nn.ModuleDict, Tensor], Tensor]]:
    layers = {name: nn.Linear(IN, width, **more) for name, width in (("q_proj", 32), ("k_proj", 8), ("v_proj", 8))}
    return nn.ModuleDict(layers), lambda model, x: sum(model[name](x).sum() for name in model)


def test_layers_that_read_one_input_keep_one_copy() -> None:
    model, run = attention(bias=False)
    x = torch.randn(TOKENS, IN)
    shared = Selection.random(model, 0.25, granularity="column")
    assert all(torch.equal(index.positions, shared["q_proj.weight"].positions) for index in shared.values())
    with sk.train_only(model, shared):
        assert saved_bytes(model, lambda: run(model, x)) == 4 * TOKENS * 12
    apart = Selection.random(model, 0.25, granularity="column", share_inputs=False)
    with sk.train_only(model, apart):
        assert saved_bytes(model, lambda: run(model, x)) == 3 * 4 * TOKENS * 12


def test_under_autocast_the_copy_is_half_precision_and_shared() -> None:
    model, run = attention(bias=False)
    x = torch.randn(TOKENS, IN)
    with sk.train_only(model, Selection.random(model, 0.25, granularity="column")):

        def loss() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(model, x)

        assert saved_bytes(model, loss) == 2 * TOKENS * 12


def test_an_input_changed_in_between_is_copied_again() -> None:
    """q reads x, then x is changed in place, then k reads it: each gradient is that of what its layer read."""
    model, _ = attention(bias=False)
    with sk.train_only(model, Selection.random(model, 0.25, granularity="column")) as tuned:
        x = torch.randn(TOKENS, IN)
        read = x.clone(), (x * 2).clone()
        loss = model["q_proj"](x).sum()
        x *= 2
        (loss + model["k_proj"](x).sum()).backward()
        for name, values in tuned.named_parameters():
            if "v_proj" not in name:
                columns = tuned.selection[name].positions
                expected = read["k_proj" in name].sum(0)[columns.long()].expand_as(values)
                assert torch.allclose(values.grad, expected, rtol=1e-5, atol=1e-5)


def test_another_input_at_the_same_address_is_another_input() -> None:
    model, _ = attention(bias=False)
    with sk.train_only(model, Selection.random(model, 0.25, granularity="column")) as tuned:
        expected, columns = torch.zeros(IN), tuned.selection["q_proj.weight"].positions.long()
        for seed in range(20):
            x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(seed))
            model["q_proj"](x).sum().backward()
            expected += x.sum(0)
            del x
        values = dict(tuned.named_parameters())["q_proj.weight"]
        assert torch.allclose(values.grad, expected[columns].expand_as(values), rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_longer_than_the_graph() -> None:
    model, run = attention(bias=False)
    sk.train_only(model, Selection.random(model, 0.25, granularity="column"))
    narrow = model["q_proj"]._sparse_slots["weight"].narrow.features
    assert narrow is model["k_proj"]._sparse_slots["weight"].narrow.features
    loss = run(model, torch.randn(TOKENS, IN))
    of, _, copy_ = narrow.last
    assert copy_() is not None
    loss.backward()
    del loss
    gc.collect()
    assert copy_() is None
    assert of() is None
    with torch.no_grad():
        run(model, torch.randn(TOKENS, IN))
    assert narrow.last[2]() is None, "no copy where there is no graph"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_keep_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, run = attention(bias=False)
    x = torch.randn(TOKENS, IN)
    sk.train_only(model, Selection.random(model, 0.25, granularity="column"))
    run(model, x).backward()
    twin = copied(model)
    twin.zero_grad()
    run(twin, x).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_a_llama_keeps_less_than_with_elements() -> None:
    """Only columns keep less: 30 % of the inputs of the projections."""
    bytes_of = {}
    for granularity in ("element", "column"):
        model = transformer("llama")
        names = [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
        with sk.train_only(model, Selection.random(model, 0.3, names=names, granularity=granularity)):
            tokens = torch.arange(24).view(2, 12)
            bytes_of[granularity] = saved_bytes(model, lambda: model(tokens, labels=tokens).loss)  # noqa: B023
    assert bytes_of["column"] < 0.9 * bytes_of["element"]


def test_changes_that_torch_does_not_track_are_seen() -> None:
    """As with elements: a graph that was made before must not lend its copy to a later one."""
    model = nn.Linear(IN, OUT, bias=False)
    selection = chosen("column", None, 3, 7, shape=(OUT, IN))
    with sk.train_only(model, selection) as tuned:
        (values,) = tuned.parameters()
        buffer = np.zeros((TOKENS, IN), np.float32)
        x, losses = torch.from_numpy(buffer), []
        for i in range(3):
            buffer[:] = i + 1
            losses.append(model(x).sum())
        losses[-1].backward()
        assert torch.equal(values.grad, torch.full_like(values, 3.0 * TOKENS))
        values.grad, alive = None, model(x)
        x.data = torch.full((2 * TOKENS, IN), 2.0)
        model(x).sum().backward()
        assert torch.equal(values.grad, torch.full_like(values, 4.0 * TOKENS))
        del alive


@pytest.mark.parametrize("case", LINEAR)
def test_a_model_that_moves_afterwards(case: str) -> None:
    """Trainer and accelerate move it; positions go with it."""
    model, _, shape = one_layer("linear")
    granularity, block, positions, _ = LINEAR[case]
    tuned = sk.train_only(model, chosen(granularity, block, *positions, shape=shape))
    model.to("meta")
    model(torch.randn(TOKENS, IN, device="meta")).sum().backward()
    (values,) = tuned.parameters()
    assert values.grad.is_meta
    assert values.grad.shape == values.shape


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_a_linear_and_a_conv1d_that_are_tied(granularity: str) -> None:
    encoder, decoder = nn.Linear(IN, OUT, bias=False).double(), Conv1D(IN, OUT).double()
    decoder.weight = encoder.weight
    model = nn.Sequential(encoder, decoder)
    dense, x = copy.deepcopy(model), torch.randn(TOKENS, IN, dtype=torch.float64)
    dense(x).square().sum().backward()
    tuned = sk.train_only(model, Selection.random({"0.weight": (OUT, IN)}, 0.1, granularity=granularity))
    model(x).square().sum().backward()
    (values,) = tuned.parameters()
    assert torch.allclose(values.grad, sk.ops.gather(dense[0].weight.grad, tuned.selection["0.weight"]))


def test_only_the_bias_of_a_conv1d_and_no_tokens() -> None:
    model = Conv1D(OUT, IN)
    sk.train_only(model, Selection({"bias": Index(torch.tensor([1]), (OUT,))}))
    assert model(torch.zeros(0, IN)).shape == (0, OUT)


def test_what_a_cut_block_lacks_is_never_read() -> None:
    model = nn.Linear(7, 5, bias=False)
    tuned = sk.train_only(model, Selection.random(model, 1.0, granularity="block", block=(4, 4)))
    (values,) = tuned.parameters()
    values.data.normal_()
    tuned.sync_()
    version = model.weight._version
    for _ in range(3):
        model(torch.randn(2, 7)).sum().backward()
    assert model.weight._version == version, "the weight is what the values say, and is not written again"
    assert torch.equal(
        tuned.delta().changes["weight"].values, sk.ops.gather(model.weight.detach(), tuned.selection["weight"])
    )
