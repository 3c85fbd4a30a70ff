"""LASER: predicted gains against dense gradients, and their heat map."""

from __future__ import annotations

import pytest
import torch
from models import TRANSFORMERS, batch, transformer, wide_bert

import sparsekernels as sk
from sparsekernels.methods import laser
from sparsekernels.methods.laser import Reduction, decompositions, ranking
from sparsekernels.structure.matrices import matrices


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_predictions_are_first_order_gains(kind: str) -> None:
    """<G, W - W_r> for every reduction, G being the dense gradient of the mean loss."""
    model = transformer(kind)
    batches = [batch(kind), batch(kind, rows=2, seed=1)]
    groups = {"blocks": (1, 3), "clusters": (3,)}
    ranking = laser.rank(model, batches, rhos=(0.9, 0.5, 0.2, 0.0), score="first_order", **groups, progress=False)
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
    ranking = laser.rank(model, batches, score="first_order", progress=False)
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
    ranking = laser.rank(model, batches, rhos=rhos, names=names, blocks=(1, 4), score="second_order", progress=False)
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
    assert scores("first_order", [(whole[0][0], values.mean(0))], inner.mean(), [0.34]) == [float(cut.mean())]
    assert scores("second_order", whole, inner, [0.34]) == [float(cut.mean() - cut.square().mean() / 2)]
    few = [(sk.Factors(vectors[:, :2], s[:2], vectors[:, :2]), values[:, :2])]
    assert scores("second_order", few, inner, [0.34, 0.0]) == pytest.approx(
        [float(x.mean() - x.square().mean() / 2) for x in (cut, inner)]
    )


def test_truncated_factors_predict_what_whole_ones_do() -> None:
    model, batches = wide_bert(), [batch("bert", rows=4, length=9)]
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with torch.no_grad():  # singular values that fall, as those of trained weights do
        model.get_parameter(name).mul_(torch.linspace(1, 0, 96) ** 4 * 20)
    whole = laser.rank(model, batches, rhos=[0.1, 0.05, 1.0], names=[name], score="first_order", progress=False)
    by_rho = {reduction.rho: reduction.predicted for reduction in whole}
    before = model.get_parameter(name).detach().clone()
    model.eval()(**batches[0]).loss.backward()
    grad = model.get_parameter(name).grad.clone()
    for rho in (0.1, 0.05):
        few = laser.rank(model, batches, rhos=[rho], names=[name], score="first_order", progress=False)
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


def test_grid() -> None:
    model = transformer("gpt2")
    ranking = laser.rank(model, [batch("gpt2")], progress=False)
    grid = laser.grid(ranking.reductions, ranking.matrices)
    assert grid.kinds[:3] == ["attn.c_attn[q]", "attn.c_attn[k]", "attn.c_attn[v]"]
    assert grid.layers == [0, 1]
    assert grid.values.shape == (2, len(grid.kinds))
    best_q = max(r.predicted for r in ranking if r.matrix == "transformer.h.1.attn.c_attn.weight[q]")
    assert grid.values[1, 0] == pytest.approx(best_q)


def test_grids_are_checked() -> None:
    model = transformer("gpt2")
    found = matrices(model)
    label = next(iter(found))
    with pytest.raises(ValueError, match=r"has no measured gain"):
        laser.grid([Reduction(label, 0.5, predicted=1.0)], found, measured=True)
    with pytest.raises(ValueError, match=r"matrices has no 'x'"):
        laser.grid([Reduction("x", 0.5, predicted=1.0)], found)
    with pytest.raises(ValueError, match=r"no matrix is in a numbered layer"):
        laser.grid([], found)
