"""LASER: predictions against dense first-order gains, reductions against the SVD, and every way back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import TRANSFORMERS, Zoo, batch, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.low_rank import LowRankLinear
from sparsekernels.matrices import matrices
from sparsekernels.methods import laser
from sparsekernels.methods.laser import Reduction, changes, decompositions, ranking


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, x in before.items():
        assert torch.equal(x, after[name]), name


def best(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Every matrix of the model, dense, wherever it is stored."""
    dense = copy.deepcopy(model)
    for parent in list(dense.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LowRankLinear):
                parent._modules[name] = child.to_linear()
    return {name: p.detach() for name, p in dense.named_parameters()}


# ---- rank


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_predictions_are_first_order_gains(kind: str) -> None:
    """<G, W - W_r> for every reduction, G being the dense gradient of the mean loss."""
    model = transformer(kind)
    batches = [batch(kind), batch(kind, rows=2, seed=1)]
    groups = {"blocks": (1, 3), "clusters": (3,)}
    ranking = laser.rank(model, batches, rhos=(0.9, 0.5, 0.2, 0.0), score="gain", **groups, progress=False)
    assert len(ranking) == 4 * 3 * len(ranking.matrices)
    predicted = [reduction.predicted for reduction in ranking]
    assert predicted == sorted(predicted, reverse=True)
    model.eval()
    sum(model(**b).loss * len(b["labels"]) / 5 for b in batches).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    scale = max(map(abs, predicted))
    for reduction in list(ranking)[::5]:
        matrix = ranking.matrices[reduction.matrix]
        before = matrix.read(model.get_parameter(matrix.parameter)).clone()
        with laser.reduce(model, [reduction], factored=False):
            change = before - matrix.read(model.get_parameter(matrix.parameter))
        gain = float((matrix.read(grads[matrix.parameter]) * change).sum())
        assert abs(gain - reduction.predicted) < 1e-5 * scale, reduction


def test_prediction_is_the_gain_of_a_small_step() -> None:
    """Going a thousandth of the way to the reduced weight, the loss falls by a thousandth of the prediction."""
    model, batches = transformer("bert").double().eval(), [batch("bert")]
    ranking = laser.rank(model, batches, score="gain", progress=False)
    for reduction in (ranking.reductions[0], ranking.reductions[-1]):
        parameter = model.get_parameter(reduction.matrix)
        before = parameter.detach().clone()
        with laser.reduce(model, [reduction], factored=False):
            reduced = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(before + 1e-3 * (reduced - before))
            gain = ranking.loss - float(model(**batches[0]).loss)
            parameter.copy_(before)
        assert gain * 1e3 == pytest.approx(reduction.predicted, rel=0.05)


@pytest.mark.parametrize("rhos", [(0.9, 0.3), (0.1,)], ids=["whole", "truncated"])
def test_second_order_gains(rhos: tuple[float, ...]) -> None:
    """The first-order gain less half the mean square of those of single samples, from their dense gradients."""
    model, names = wide_bert().eval(), ["*.0.intermediate.dense.weight", "*.1.output.dense.weight"]
    b = batch("bert", rows=5, length=9)
    batches = [{key: x[:3] for key, x in b.items()}, {key: x[3:] for key, x in b.items()}]
    ranking = laser.rank(model, batches, rhos=rhos, names=names, blocks=(1, 4), score="second", progress=False)
    assert len(ranking) == 2 * 2 * len(rhos)
    grads = []
    for i in range(5):
        model.zero_grad()
        model(**{key: x[i : i + 1] for key, x in b.items()}).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    for reduction in ranking:
        before = model.get_parameter(reduction.matrix).detach().clone()
        with laser.reduce(model, [reduction], factored=False):
            change = before - model.get_parameter(reduction.matrix).detach()
        gains = torch.stack([(grad[reduction.matrix] * change).sum() for grad in grads]).double()
        expected = float(gains.mean() - gains.square().mean() / 2)
        assert reduction.predicted == pytest.approx(expected, rel=1e-2, abs=1e-5), reduction


def test_scores_by_hand() -> None:
    """Two samples, three triplets of which one is kept; then the same without the last, which <G, W> makes up for."""
    s, values = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([[1.0, -1.0, 0.5], [3.0, 2.0, -0.5]])
    vectors = torch.eye(3)
    whole = [(sk.Factors(vectors, s, vectors), values)]
    inner = (s * values).sum(1)
    cut = torch.tensor([-2.0 + 0.5, 4.0 - 0.5])
    scores = ranking._scores
    assert scores("gain", [(whole[0][0], values.mean(0))], inner.mean(), [0.34]) == [float(cut.mean())]
    assert scores("second", whole, inner, [0.34]) == [float(cut.mean() - cut.square().mean() / 2)]
    assert scores("sum", [(whole[0][0], values.mean(0))], inner.mean(), [0.34]) == [0.5 + 0.0]
    assert scores("count", [(whole[0][0], values.mean(0))], inner.mean(), [0.34]) == [1.0]
    few = [(sk.Factors(vectors[:, :2], s[:2], vectors[:, :2]), values[:, :2])]
    assert scores("second", few, inner, [0.34, 0.0]) == pytest.approx(
        [float(x.mean() - x.square().mean() / 2) for x in (cut, inner)]
    )


def test_other_scores() -> None:
    model, batches = transformer("bert").eval(), [batch("bert")]
    model(**batches[0]).loss.backward()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    weight = model.get_parameter(name)
    u, _, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    values = torch.diagonal(u.T @ weight.grad @ vh.T)
    cut = values[int(0.2 * min(weight.shape)) :]
    for score, expected in (("sum", float(cut.sum())), ("count", int((cut > 0).sum()))):
        (only,) = laser.rank(model, batches, rhos=[0.2], names=[name], score=score, progress=False)
        assert only.predicted == pytest.approx(expected, rel=1e-3)


def wide_bert() -> nn.Module:
    """Wide enough for the randomised method."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=61, **sizes, num_labels=3))


def test_truncated_factors_predict_what_whole_ones_do() -> None:
    model, batches = wide_bert(), [batch("bert", rows=4, length=9)]
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with torch.no_grad():  # singular values that fall, as those of trained weights do
        model.get_parameter(name).mul_(torch.linspace(1, 0, 96) ** 4 * 20)
    whole = laser.rank(model, batches, rhos=[0.1, 0.05, 1.0], names=[name], score="gain", progress=False)
    by_rho = {reduction.rho: reduction.predicted for reduction in whole}
    before = model.get_parameter(name).detach().clone()
    model.eval()(**batches[0]).loss.backward()
    grad = model.get_parameter(name).grad.clone()
    for rho in (0.1, 0.05):
        few = laser.rank(model, batches, rhos=[rho], names=[name], score="gain", progress=False)
        ((part,),) = few.decompositions.of(model, [(few.matrices[name], decompositions.Split(1, False))], rho).values()
        assert len(part.s) == int(rho * 96)
        (reduction,) = few
        assert reduction.predicted == pytest.approx(by_rho[rho], rel=0.1)
        with laser.reduce(model, [reduction], factored=False, decompositions=few.decompositions):
            exact = float((grad * (before - model.get_parameter(name).detach())).sum())
        assert reduction.predicted == pytest.approx(exact, rel=1e-4)  # of the approximation that is written


def test_decompositions_are_used_again_until_the_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    module = decompositions
    whole = module.factorize

    def counting(weights, *args, **kwargs):
        counted.append(len(weights))
        return whole(weights, *args, **kwargs)

    monkeypatch.setattr(module, "factorize", counting)
    model, batches = transformer("bert"), [batch("bert")]
    first = laser.rank(model, batches, progress=False)
    assert sum(counted) == len(first.matrices)
    counted.clear()
    again = laser.rank(model, batches, decompositions=first.decompositions, progress=False)
    assert counted == []
    assert [r.predicted for r in again] == [r.predicted for r in first]
    changed = next(iter(first.matrices.values())).parameter
    with torch.no_grad():
        model.get_parameter(changed).mul_(2)
    laser.rank(model, batches, decompositions=first.decompositions, progress=False)
    assert sum(counted) == 1


# ---- reduce


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
        assert reduced.saved > 0
        factored = model(**b).logits
    with laser.reduce(model, plan, factored=False) as reduced, torch.no_grad():
        assert reduced.saved == 0
        dense = model(**b).logits
    torch.testing.assert_close(factored, dense, rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_counted() -> None:
    model = wide_bert()
    before = sum(p.numel() for p in model.parameters())
    names = [f"bert.encoder.layer.0.{part}.weight" for part in ("intermediate.dense", "attention.self.query")]
    reduced = laser.reduce(model, [Reduction(names[0], 0.1), Reduction(names[1], 0.6)])
    assert reduced.saved == 192 * 96 - 9 * (192 + 96)  # 0.6 of a square matrix would take more in factors
    assert before - sum(p.numel() for p in model.parameters()) == reduced.saved
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
        assert reduced.saved == 16 * 16 - 3 * 32
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


class Shared(nn.Module):
    """Two Linears of one weight with biases of their own, one of them registered twice; hooks on a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hooked = (nn.Linear(12, 12) for _ in range(3))
        self.b.weight = self.a.weight
        self.again = nn.ModuleList([self.a])
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.hooked(self.again[0](self.b(self.a(x))))


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
        assert reduced.saved == 144 - 3 * 24
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
    assert reduced.saved > 0
    logits = model(**b).logits
    reduced.merge()
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    torch.testing.assert_close(model(**b).logits, logits, rtol=1e-4, atol=1e-5)
    after = snapshot(model)
    reduced.revert()  # no way back
    assert_same(model, after)

    reduced = laser.reduce(model, plan)
    reduced.commit()
    logits = model(**b).logits
    reduced.revert()
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


def test_save_and_load(tmp_path: Path) -> None:
    model = transformer("gpt2").to(torch.bfloat16)
    labels = list(matrices(model))
    plan = [Reduction(labels[0], 0.3, predicted=1.5), Reduction(labels[4], 0.2, 3, True), Reduction(labels[6], 0.0)]
    before = snapshot(model)
    with laser.reduce(model, plan) as reduced:
        reduced.save(tmp_path / "plan.safetensors")
        expected = snapshot(model)
    for factored in (True, False):
        with laser.load(model, tmp_path / "plan.safetensors", factored=factored) as loaded:
            assert loaded.plan == plan
            assert loaded.plan[0].predicted == 1.5
            if factored:
                assert_same(model, expected)
        assert_same(model, before)
    with pytest.raises(ValueError, match=r"nothing matches .*c_attn"):
        laser.load(transformer("bert"), tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match="holds reductions, not a delta"):
        sk.Delta.load(tmp_path / "plan.safetensors")
    with pytest.raises(FileNotFoundError):
        laser.load(model, tmp_path / "none")
    (tmp_path / "half").write_bytes((tmp_path / "plan.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        laser.load(model, tmp_path / "half")
    assert_same(model, before)


@pytest.mark.parametrize("broken", ["ranks", "rows", "swapped", "missing"])
def test_files_that_contradict_themselves_are_refused(broken: str, tmp_path: Path) -> None:
    from sparsekernels.files import load_tensors, save_tensors

    model = Zoo()
    with laser.reduce(model, [Reduction("experts.weight[0]", 0.5, 3), Reduction("up.weight", 0.5)]) as reduced:
        reduced.save(tmp_path / "file")
    before = snapshot(model)
    tensors, metadata = load_tensors(tmp_path / "file", "reductions")
    if broken == "ranks":
        tensors["1.0.down"] = tensors["1.0.down"][:-1]
    elif broken == "rows":
        tensors["0.1.rows"] = tensors["0.2.rows"]
    elif broken == "swapped":
        tensors["0.0.rows"], tensors["0.1.rows"] = tensors["0.1.rows"], tensors["0.0.rows"]
    else:
        del tensors["1.0.up"]
    save_tensors(tmp_path / "file", tensors, metadata)
    with pytest.raises(ValueError, match="is damaged"):
        laser.load(model, tmp_path / "file")
    assert_same(model, before)


def test_load_refuses_another_shape(tmp_path: Path) -> None:
    with laser.reduce(nn.Sequential(nn.Linear(8, 6)), [Reduction("0.weight", 0.5)]) as reduced:
        reduced.save(tmp_path / "plan")
    with pytest.raises(ValueError, match=r"holds \[6, 8\] for '0.weight', which is \[8, 8\]"):
        laser.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "plan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Reduction("up.weight", 1.5)], r"rho must lie in \[0, 1\], got 1.5 for 'up.weight'"),
        (lambda: [Reduction("up.weight", 0.5, 0)], "blocks must be at least 1"),
        (lambda: [Reduction("up.weight", 0.5, 1, True)], "blocks must be at least 2 to cluster"),
        (lambda: [Reduction("up.weight", 0.5, 33)], "blocks: 'up.weight' has 32 rows"),
        (lambda: [Reduction("none", 0.5)], "nothing matches 'none'"),
        (lambda: [Reduction("up.weight", 0.5), Reduction("up.weight", 0.2)], "reduces 'up.weight' twice"),
        (lambda: [Reduction("experts.weight", 0.5)], r"is no label of a matrix; it stands for 'experts.weight\[0\]'"),
    ],
)
def test_bad_plans_change_nothing(make, message: str) -> None:
    model = Zoo()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        laser.reduce(model, [Reduction("down.weight", 0.5), *make()])
    assert_same(model, before)


def test_broken_weights_are_named_and_nothing_changes() -> None:
    model = Zoo()
    with torch.no_grad():
        model.up.weight[3, 3] = float("inf")
    before = snapshot(model)
    plan = [Reduction("down.weight", 0.5), Reduction("up.weight", 0.5)]
    with pytest.raises(ValueError, match=r"'up.weight' holds NaN or infinity"):
        laser.reduce(model, plan)
    assert_same(model, before)
    with torch.no_grad():
        model.up.weight[3, 3] = 0
    laser.reduce(model, plan).revert()


def test_a_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Zoo()
    before = snapshot(model)
    product = changes.product

    def failing(matrix, mine):
        if matrix.parameter == "embed.weight":
            raise MemoryError
        return product(matrix, mine)

    monkeypatch.setattr(changes, "product", failing)
    with pytest.raises(MemoryError):
        laser.reduce(model, [Reduction(f"{name}.weight", 0.2) for name in ("up", "conv", "embed")])
    assert_same(model, before)
    monkeypatch.setattr(changes, "product", lambda matrix, mine: product(matrix, mine) if matrix.expert == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        laser.reduce(model, [Reduction(f"experts.weight[{i}]", 0.2) for i in range(2)])
    assert_same(model, before)


def test_sparsified_models_are_refused() -> None:
    model = Zoo()
    with sk.sparsify(model, sk.Selection({"head.bias": sk.Index(torch.tensor([0]), (5,))})):
        with pytest.raises(ValueError, match="sparsified"):
            laser.reduce(model, [Reduction("up.weight", 0.5)])
        with pytest.raises(ValueError, match="sparsified"):
            laser.search(model, lambda m: 1 / 0, names=["up.weight"], progress=False)  # refused before it is called


def test_tied_weights_are_named_by_their_label() -> None:
    with pytest.raises(ValueError, match=r"'b.weight' is no label of a matrix; it stands for 'a.weight'"):
        laser.reduce(Shared(), [Reduction("b.weight", 0.5)])


def test_autocast_around_it_changes_nothing() -> None:
    """Decomposed and multiplied in fp32, whatever is around."""
    model, plan = wide_bert(), []
    for name in ("intermediate.dense", "output.dense"):
        plan += [Reduction(f"bert.encoder.layer.{i}.{name}.weight", 0.1, 1 + 2 * i, bool(i)) for i in range(2)]
    with laser.reduce(model, plan, factored=False):
        expected = snapshot(model)
    with torch.autocast("cpu", torch.bfloat16), laser.reduce(model, plan, factored=False):
        assert_same(model, expected)


def test_decompositions_of_a_model_that_moved_are_made_anew() -> None:
    model, batches = transformer("bert"), [batch("bert")]
    ranking = laser.rank(model, batches, progress=False)
    model.double()
    again = laser.rank(model, batches, decompositions=ranking.decompositions, progress=False)
    assert again.loss == pytest.approx(ranking.loss)
    plan = again.best()[:1]
    label = plan[0].matrix
    weight = model.get_parameter(label).detach().clone()
    with laser.reduce(model, plan, factored=False, decompositions=ranking.decompositions):
        expected = best(weight, int(plan[0].rho * min(weight.shape)))
        torch.testing.assert_close(model.get_parameter(label).detach(), expected, rtol=0, atol=1e-12)


# ---- adapt and search


def trained_bert() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A classifier that has learnt its samples by heart, with noise on a weight."""
    model, b = wide_bert().eval(), batch("bert", rows=12, length=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(15):
        model(**b).loss.backward()
        optimizer.step()
        model.zero_grad()
    with torch.no_grad():
        weight = model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight")
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return model.train(), [b]


def minus_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    assert not torch.is_grad_enabled()
    assert not model.training
    return -float(model(**batches[0]).loss)


def test_search_tries_everything() -> None:
    model, batches = trained_bert()
    before, labels = snapshot(model), list(matrices(model))
    reduced = laser.search(model, lambda m: minus_loss(m, batches), rhos=(0.03, 0.5), rounds=2, progress=False)
    assert model.training
    report = reduced.report
    assert [(r.matrix, r.rho) for r in report["tried"]] == [(label, rho) for label in labels for rho in (0.5, 0.03)]
    assert reduced.plan[0] == max(report["tried"], key=lambda reduction: reduction.measured)
    assert report["evaluations"] > len(report["tried"])
    model.eval()
    with torch.no_grad():
        assert report["after"] == pytest.approx(minus_loss(model, batches), abs=1e-5)
    assert report["after"] - report["before"] == pytest.approx(sum(r.measured for r in reduced.plan), abs=1e-6)
    reduced.revert()
    model.train()
    assert_same(model, before)


def test_adapt_that_tries_everything_finds_what_search_finds() -> None:
    model, batches = trained_bert()
    options = {"rhos": (0.5, 0.1, 0.03), "rounds": 1, "progress": False}
    found = laser.search(model, lambda m: minus_loss(m, batches), **options)
    found.revert()
    reduced = laser.adapt(model, batches, tried=1000, **options)
    assert reduced.plan == found.plan
    assert reduced.plan[0].measured == pytest.approx(found.plan[0].measured, rel=1e-4)
    assert reduced.plan[0].predicted is not None


def test_adapt_composes_greedily() -> None:
    model, batches = trained_bert()
    before = snapshot(model)
    reduced = laser.adapt(model, batches, rhos=(0.5, 0.1, 0.03), tried=4, rounds=3, progress=False)
    report = reduced.report
    assert len(reduced.plan) >= 2
    assert len({r.matrix for r in reduced.plan}) == len(reduced.plan)
    assert all(r.measured > 0 for r in reduced.plan)
    assert report["before"] == pytest.approx(sum(r.measured for r in reduced.plan) * -1 + report["after"], abs=1e-6)
    model.eval()
    with torch.no_grad():
        assert report["after"] == pytest.approx(minus_loss(model, batches), abs=1e-5)
    assert report["backwards"] == len(report["tried"]) <= 3
    assert report["evaluations"] == 1 + sum(map(len, report["tried"]))
    for i, tried in enumerate(report["tried"][1:], 1):  # what is reduced already is not tried again
        assert not {r.matrix for r in tried} & {r.matrix for r in reduced.plan[:i]}
    model.train()
    reduced.revert()
    assert_same(model, before)


def test_rows_in_groups_are_tried_too() -> None:
    model, batches = trained_bert()
    options = {"rhos": (0.1,), "rounds": 1, "progress": False}
    reduced = laser.adapt(model, batches, blocks=(1, 2), clusters=(3,), tried=1000, **options)
    assert reduced.report["backwards"] == 2
    (tried,) = reduced.report["tried"]
    assert len(tried) == 3 * 12
    assert {(r.blocks, r.clustered) for r in tried} == {(1, False), (2, False), (3, True)}
    reduced.revert()
    reduced = laser.adapt(model, batches, blocks=(1, 2), clusters=(3,), tried=4, **options)
    (tried,) = reduced.report["tried"]
    assert len(tried) == 4
    assert [r.predicted for r in tried] == sorted((r.predicted for r in tried), reverse=True)


def test_nothing_is_kept_that_does_not_help() -> None:
    model, batches = transformer("bert"), [batch("bert")]
    before = snapshot(model)
    for reduced in (
        laser.adapt(model, batches, lambda model: 0.0, progress=False),
        laser.search(model, lambda model: 0.0, rhos=(0.5,), progress=False),
    ):
        assert reduced.plan == []
        assert reduced.saved == 0
        assert_same(model, before)


@pytest.mark.parametrize("way", ["adapt", "search"])
def test_an_evaluate_that_stops_leaves_the_model_whole(way: str) -> None:
    model, batches = transformer("bert"), [batch("bert")]
    before = snapshot(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    calls: list[int] = []

    def evaluate(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return float(len(calls))  # ever better, so that something is kept before it stops

    def run() -> None:
        if way == "adapt":
            laser.adapt(model, batches, evaluate, tried=4, progress=False)
        else:
            laser.search(model, evaluate, rhos=(0.5,), progress=False)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert_same(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert model.training


@pytest.mark.parametrize("way", ["adapt", "search"])
def test_what_cannot_be_evaluated_is_not_kept(way: str) -> None:
    """Infinite or NaN for a reduction: it gains nothing. For the model as it is: there is nothing to compare with."""
    model, batches = transformer("bert"), [batch("bert")]
    before = snapshot(model)

    def run(values: list[float]) -> laser.Reduced:
        feed = iter([*values, *[0.0] * 1000])
        if way == "adapt":
            return laser.adapt(model, batches, lambda m: next(feed), tried=4, rounds=1, progress=False)
        return laser.search(model, lambda m: next(feed), rhos=(0.5,), rounds=1, progress=False)

    reduced = run([0.0, float("-inf"), float("nan"), float("inf"), 1.0])
    tried = reduced.report["tried"][0] if way == "adapt" else reduced.report["tried"]
    assert [r.measured for r in tried[:4]] == [float("-inf")] * 3 + [1.0]
    assert reduced.plan == [tried[3]]
    reduced.revert()
    with pytest.raises(ValueError, match="evaluate must return a finite number for the model as it is, got nan"):
        run([float("nan")])
    assert_same(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tried": 0}, "tried"),
        ({"rounds": 0}, "rounds"),
        ({"rhos": []}, "rhos must be"),
        ({"rhos": [2.0]}, "rhos must be"),
        ({"score": "best"}, "score must be"),
        ({"blocks": [0]}, "blocks must be"),
        ({"blocks": [1000]}, "blocks and clusters leave nothing to try"),
        ({"blocks": []}, "blocks and clusters leave nothing to try"),
        ({"clusters": [1]}, "clusters at least 2"),
        ({"names": ["nothing"]}, "nothing"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    model = transformer("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        laser.adapt(model, [batch("bert")], progress=False, **options)
    assert_same(model, before)


def test_a_model_without_numbered_blocks_must_be_told_what_to_reduce() -> None:
    model = nn.Sequential()
    model.add_module("only", nn.Linear(4, 4))
    for run in (
        lambda: laser.rank(model, [{"x": torch.ones(1, 4)}], progress=False),
        lambda: laser.adapt(model, [{"x": torch.ones(1, 4)}], lambda m: 0.0, progress=False),
        lambda: laser.search(model, lambda m: 0.0, progress=False),
    ):
        with pytest.raises(ValueError, match="names: the model has no projections in numbered blocks"):
            run()


def test_heat_map_data() -> None:
    model = transformer("gpt2")
    ranking = laser.rank(model, [batch("gpt2")], progress=False)
    grid = laser.grid(ranking.reductions, ranking.matrices)
    assert grid.kinds[:3] == ["attn.c_attn[q]", "attn.c_attn[k]", "attn.c_attn[v]"]
    assert grid.layers == [0, 1]
    assert grid.values.shape == (2, len(grid.kinds))
    best_q = max(r.predicted for r in ranking if r.matrix == "transformer.h.1.attn.c_attn.weight[q]")
    assert grid.values[1, 0] == pytest.approx(best_q)


def test_heat_map_shows_the_grid() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    values = torch.tensor([[1.0, -3.0], [float("nan"), 2.0]])
    axes = laser.heat_map(laser.Grid([0, 5], ["q", "mlp"], values), title="gains")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "mlp"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "5"]
    (image,) = axes.get_images()
    assert image.get_clim() == (-3.0, 3.0)  # no gain is white
    assert image.get_array().mask.tolist() == [[False, False], [True, False]]


def test_grids_are_checked() -> None:
    model = transformer("gpt2")
    found = matrices(model)
    label = next(iter(found))
    with pytest.raises(ValueError, match=r"has no measured gain"):
        laser.grid([Reduction(label, 0.5, predicted=1.0)], found, measured=True)
    with pytest.raises(ValueError, match=r"matrices holds no 'x'"):
        laser.grid([Reduction("x", 0.5, predicted=1.0)], found)
    with pytest.raises(ValueError, match=r"no matrix that lies in a numbered layer"):
        laser.grid([], found)
