"""LASER: reduced weights against the SVD, factored and dense, and every way back."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same, best, snapshot, values_of
from models import TRANSFORMERS, Shared, Zoo, batch, transformer, wide_bert
from torch import nn

import sparsekernels as sk
from sparsekernels.methods import laser
from sparsekernels.methods.laser import Reduction
from sparsekernels.nn.low_rank import LowRankLinear
from sparsekernels.structure.matrices import matrices


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("rho", [1.0, 0.5, 0.2, 0.0])
def test_reduced_weights_are_the_best_of_their_rank(rho: float, factored: bool) -> None:
    """Linear, Conv1D, experts and a tied table, whole and by rows, against the SVD in fp64."""
    torch.manual_seed(0)
    model = Zoo()
    names = ["up.weight", "conv.weight", "experts.weight[1]", "head.weight", "embed.weight"]
    plan = [Reduction(name, rho) for name in names]
    before = snapshot(model)
    reduced = laser.reduce(model, plan, factored=factored)
    found = values_of(model)
    if not factored:
        assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    for name in names[:1] + names[3:]:
        weight = before[name]
        torch.testing.assert_close(found[name].double(), best(weight, int(rho * min(weight.shape))), rtol=0, atol=1e-5)
    assert torch.equal(found["experts.weight"][0], before["experts.weight"][0])
    expected = best(before["experts.weight"][1], int(rho * 16))
    torch.testing.assert_close(found["experts.weight"][1].double(), expected, rtol=0, atol=1e-5)
    x = torch.randn(3, 16)
    y = x.double() @ best(before["conv.weight"].T, int(rho * 16)).T + before["conv.bias"].double()
    torch.testing.assert_close(model.conv(x).double(), y, rtol=0, atol=1e-5)
    reduced.revert()
    assert_same(model, before)


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_revert_is_bit_identical(kind: str, factored: bool, dtype: torch.dtype) -> None:
    model = transformer(kind).to(dtype)
    before, modules = snapshot(model), list(model.modules())
    flags = [p.requires_grad for p in model.parameters()]
    labels = list(matrices(model))
    plan = [Reduction(label, 0.2 + 0.2 * (i % 3), 1 + i % 3, i % 3 == 2) for i, label in enumerate(labels)]
    reduced = laser.reduce(model, plan, factored=factored)
    assert not all(torch.equal(x, before[name]) for name, x in values_of(model).items() if name in before)
    b = batch(kind)
    assert bool(model(**b).loss.isfinite())
    reduced.revert()
    assert_same(model, before)
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert [p.requires_grad for p in model.parameters()] == flags
    reduced.revert()  # nothing happens
    assert_same(model, before)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_factored_and_dense_agree(kind: str) -> None:
    model = transformer(kind).eval()
    plan = [Reduction(label, 0.3, 1 + i % 2) for i, label in enumerate(matrices(model))]
    b = batch(kind)
    with laser.reduce(model, plan) as reduced, torch.no_grad():
        assert reduced.parameters_saved > 0
        factored = model(**b).logits
    with laser.reduce(model, plan, factored=False) as reduced, torch.no_grad():
        assert reduced.parameters_saved == 0
        dense = model(**b).logits
    torch.testing.assert_close(factored, dense, rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_counted() -> None:
    model = wide_bert()
    before = sum(p.numel() for p in model.parameters())
    names = [f"bert.encoder.layer.0.{part}.weight" for part in ("intermediate.dense", "attention.self.query")]
    reduced = laser.reduce(model, [Reduction(names[0], 0.1), Reduction(names[1], 0.6)])
    assert reduced.parameters_saved == 192 * 96 - 9 * (192 + 96)  # 0.6 of a square matrix would take more in factors
    assert before - sum(p.numel() for p in model.parameters()) == reduced.parameters_saved
    assert "LowRankLinear" in repr(model.bert.encoder.layer[0].intermediate)
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear


def test_parts_of_a_fused_projection() -> None:
    """GPT-2's c_attn: only the keys change, and are factored beside dense queries and values."""
    model = transformer("gpt2").eval()
    layer = model.transformer.h[0].attn
    x = torch.randn(2, 16)
    whole = layer.c_attn(x)
    with laser.reduce(model, [Reduction("transformer.h.0.attn.c_attn.weight[k]", 0.2)]) as reduced:
        assert isinstance(layer.c_attn, LowRankLinear)
        assert reduced.parameters_saved == 16 * 16 - 3 * 32
        parts = layer.c_attn(x).split(16, -1)
    with laser.reduce(model, [Reduction("transformer.h.0.attn.c_attn.weight[q]", 0.2)]):
        assert layer.c_attn.rows is None  # in order: nothing is permuted
    for name, part, was in zip("qkv", parts, whole.split(16, -1), strict=True):
        assert torch.allclose(part, was, atol=1e-6) == (name != "k")


def test_a_weight_that_the_parent_reads_stays_dense() -> None:
    import transformers

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 61}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    before = snapshot(model)
    mlp = model.encoder.block[0].layer[1].DenseReluDense
    plan = [Reduction(f"encoder.block.0.layer.1.DenseReluDense.{name}.weight", 0.2) for name in ("wi", "wo")]
    with laser.reduce(model, plan):
        assert isinstance(mlp.wi, LowRankLinear)
        assert type(mlp.wo) is nn.Linear
        assert bool(model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.isfinite().all())
    assert_same(model, before)


def test_tied_modules_share_their_factors() -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(4, 12)
    before = snapshot(model)
    plan = [Reduction("a.weight", 0.25), Reduction("hooked.weight", 0.25)]
    with laser.reduce(model, plan, factored=False):
        dense = model(x)
    with laser.reduce(model, plan) as reduced:
        assert model.a is model.again[0]
        assert model.a.down is model.b.down
        assert model.a.up0 is model.b.up0
        assert model.a.bias is not model.b.bias
        assert type(model.hooked) is nn.Linear  # its hook would be lost
        assert reduced.parameters_saved == 144 - 3 * 24
        torch.testing.assert_close(model(x), dense)
    assert model.a.weight is model.b.weight
    assert_same(model, before)


def test_the_model_itself_is_written_dense() -> None:
    model = nn.Linear(8, 8)
    before = snapshot(model)
    with laser.reduce(model, [Reduction("weight", 0.25)]):
        torch.testing.assert_close(model.weight.detach().double(), best(before["weight"], 2), rtol=0, atol=1e-6)
    assert_same(model, before)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_merge_and_commit(kind: str) -> None:
    model, b = transformer(kind).eval(), batch(kind)
    names = list(model.state_dict())
    plan = [Reduction(label, 0.2) for label in matrices(model)]
    reduced = laser.reduce(model, plan)
    assert reduced.parameters_saved > 0
    logits = model(**b).logits
    reduced.merge()
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    torch.testing.assert_close(model(**b).logits, logits, rtol=1e-4, atol=1e-5)
    after = snapshot(model)
    reduced.revert()  # no way back
    assert_same(model, after)

    assert reduced.parameters_saved == 0
    reduced = laser.reduce(model, plan)
    saved = reduced.parameters_saved
    reduced.discard_originals()
    logits = model(**b).logits
    reduced.revert()
    assert reduced.parameters_saved == saved > 0
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert torch.equal(model(**b).logits, logits)


def test_factors_train() -> None:
    model, b = transformer("bert"), batch("bert")
    reduced = laser.reduce(model, [Reduction("bert.encoder.layer.0.intermediate.dense.weight", 0.2)])
    layer = model.bert.encoder.layer[0].intermediate.dense
    before = layer.weight.detach().clone()
    optimizer = sk.SparseAdamW(model.parameters(), lr=1e-2)
    model(**b).loss.backward()
    optimizer.step()
    trained = layer.weight.detach()
    assert not torch.equal(trained, before)
    reduced.merge()
    assert torch.equal(model.bert.encoder.layer[0].intermediate.dense.weight, trained)
