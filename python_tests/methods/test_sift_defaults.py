"""SIFT's defaults on real architectures, its patterns, its curve, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import TRANSFORMERS, Zoo, batch, ids, transformer
from torch import Tensor, nn

from sparsekernels import Index, Selection
from sparsekernels.common.names import default_head, default_targets
from sparsekernels.methods import sift
from sparsekernels.methods.gradient_curve import GradientCurve

PROJECTIONS = {
    "bert": r"bert\.encoder\.layer\.[01]\."
    r"(attention\.self\.(query|key|value)|attention\.output\.dense|(intermediate|output)\.dense)",
    "gpt2": r"transformer\.h\.[01]\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))",
    "llama": r"model\.layers\.[01]\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}
PROJECTIONS["bert-mlm"] = PROJECTIONS["bert"]
HEADS = {"bert": ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_targets_and_head(kind: str) -> None:
    """Attention and MLP projections of every block; no embeddings, norms or biases; the task head densely."""
    model = transformer(kind)
    found = sift(model, [batch(kind)], 0.05, progress=False)
    heads = HEADS.get(kind, [])
    targets = [name for name in found if name not in heads]
    expected = [n for n, _ in model.named_parameters() if re.fullmatch(PROJECTIONS[kind] + r"\.weight", n)]
    assert targets == expected == default_targets(model)
    assert len(expected) == {"gpt2": 8, "llama": 14}.get(kind, 12)
    assert [name for name in found if name in heads] == heads == default_head(model)
    assert all(found[name] == Index.full(model.get_parameter(name).shape) for name in heads)
    assert all(found[name].granularity == "element" for name in targets)
    for name in targets:
        numel = model.get_parameter(name).numel()
        assert len(found[name]) == int(0.05 * numel) + 1


def test_a_classifier_under_other_names() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(3, 4)])
            self.score = nn.Linear(4, 2, bias=False)
            self.scored_by = nn.Linear(2, 2)

    model = Classifier()
    assert default_head(model) == ["score.weight"]
    assert default_targets(model) == ["blocks.0.weight", "blocks.1.weight"]


def zoo_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).square().sum()


def run(model: nn.Module, **more: Any) -> Selection:
    options = {"targets": ["up.weight"], "head": (), "loss": zoo_loss, "progress": False}
    return sift(model, [ids(4, 7)], **{**options, **more})


@pytest.mark.parametrize(
    ("targets", "head", "expected"),
    [
        ("up.*", (), ["up.weight", "up.bias"]),
        (["*.bias"], (), ["norm.bias", "up.bias", "conv.bias", "head.bias"]),
        (["down.weight", "up.weight"], "head.*", ["up.weight", "down.weight", "head.weight", "head.bias"]),
        (["[ud]*.weight"], ["head.bias"], ["up.weight", "down.weight", "head.bias"]),
        ("*.weight", ["head.*"], ["embed", "norm", "up", "down", "conv", "experts"]),
    ],
    ids=str,
)
def test_patterns(targets: Any, head: Any, expected: list[str]) -> None:
    found = run(Zoo(), targets=targets, head=head)
    full = [name if "." in name else f"{name}.weight" for name in expected]
    assert list(found) == full + (["head.weight", "head.bias"] if targets == "*.weight" else [])
    in_head = [name for name in found if name.startswith("head") and head]
    assert all(found[name].numel == Zoo().get_parameter(name).numel() for name in in_head)
    assert all(found[name].granularity == "row" for name in in_head)


def test_the_head_does_not_compete() -> None:
    """A target that is in the head too trains densely: it has no part in the curve, and its gradient is not taken."""
    model, taken = Zoo(), []
    model.head.weight.register_hook(taken.append)
    others = ["embed.weight", "norm.weight", "up.weight", "down.weight", "conv.weight", "experts.weight"]
    found = run(model, targets="*.weight", head="head.*")
    assert found.report == run(model, targets=others, head=()).report
    assert found.report["curve"] != run(model, targets="*.weight", head=()).report["curve"]
    assert len(taken) == 1  # by the last run, in which it is a target
    with pytest.raises(ValueError, match="pass targets"):
        run(model, targets="head.*", head="head.*")


def with_nan(name: str) -> Zoo:
    """A model whose gradient is NaN in one tensor alone."""
    model = Zoo()
    model.get_parameter(name).register_hook(lambda grad: grad.fill_(float("nan")))
    return model


@pytest.mark.parametrize("num_batches", [1, 2])
def test_nan_in_a_gradient_is_named(num_batches: int) -> None:
    model = with_nan("down.weight")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'down\.weight'.*NaN"):
        sift(
            model,
            [ids(4, 7)] * 2,
            targets=["up.weight", "down.weight"],
            head=(),
            loss=zoo_loss,
            progress=False,
            num_batches=num_batches,
        )
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "density 0": ({"density": 0}, r"density must lie in \(0, 1\], got 0"),
    "density 1.5": ({"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
    "density NaN": ({"density": float("nan")}, r"density must lie in \(0, 1\]"),
    "no batches asked for": ({"num_batches": 0}, "num_batches must be at least 1, got 0"),
    "too few batches": ({"num_batches": 2}, "num_batches is 2, but batches has only 1"),
    "targets": ({"targets": ["up.weight", "nowhere.*"]}, r"targets: no parameter matches 'nowhere\.\*'"),
    "head": ({"head": "nowhere"}, "head: no parameter matches 'nowhere'"),
    "no default targets": ({"targets": None}, "pass targets"),
    "no gradient": ({"targets": "*", "loss": lambda m, x: m.head.bias.sum()}, r"without a gradient: .*embed\.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    options, words = REFUSED[case]
    model = Zoo()
    with pytest.raises(ValueError, match=words):
        run(model, **options)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_model_without_a_loss() -> None:
    data = batch("bert")
    del data["labels"]
    with pytest.raises(ValueError, match="labels"):
        sift(transformer("bert"), [data], progress=False)


def exact(grads: list[Tensor], share: float) -> float:
    """The norm that the largest `share` of each tensor carries; a fraction of an entry counts as that fraction."""
    energies = [grad.double().square().flatten().sort(descending=True).values for grad in grads]
    carried = 0.0
    for energy in energies:
        wanted = share * len(energy)
        whole = int(wanted)
        carried += float(energy[:whole].sum()) + (wanted - whole) * (float(energy[whole]) if whole < len(energy) else 0)
    return (carried / sum(float(energy.sum()) for energy in energies)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_curve(dtype: torch.dtype) -> None:
    """Within the resolution of its buckets: magnitudes 1/128 apart are not told apart."""
    heavy = torch.randn(300, 200).pow(5)  # a few entries carry nearly everything
    grads = [heavy.to(dtype), torch.randn(50, 70).to(dtype), torch.zeros(9).to(dtype), 1e-3 * torch.randn(20).to(dtype)]
    curve = GradientCurve()
    for grad in grads:
        curve.add(grad)
    shares = [1e-4, 1e-3, 0.01, 0.05, 0.3, 0.9, 1.0]
    for share, carried in curve.points(shares):
        assert carried == pytest.approx(exact(grads, share), rel=1 / 128)
    assert curve.points([0.01])[0][1] > 0.4  # not a straight line
    assert curve.points([1.0]) == [(1.0, pytest.approx(1.0))]


def test_resolution_of_the_curve() -> None:
    """Magnitudes 5 % apart are told apart: the larger half carries more than half of the energy."""
    curve = GradientCurve()
    curve.add(torch.tensor([1.0, -1.05] * 500))
    assert curve.points([0.5])[0][1] == pytest.approx((1.05**2 / (1 + 1.05**2)) ** 0.5, rel=1e-3)


def test_curve_of_a_model() -> None:
    model = transformer("llama")
    curve = sift(model, [batch("llama")], 0.05, progress=False).report["curve"]
    shares, carried = zip(*curve, strict=True)
    assert list(shares) == sorted(shares)
    assert shares[0] <= 1e-4
    assert shares[-1] == 1.0
    assert list(carried) == sorted(carried)
    assert carried[-1] == pytest.approx(1.0)
    model.zero_grad()
    model(**batch("llama")).loss.backward()
    grads = [model.get_parameter(name).grad for name in default_targets(model)]
    for share, part in curve:
        assert part == pytest.approx(exact(grads, share), rel=1 / 128)
        assert part >= share**0.5 * (1 - 1 / 128)  # no order of entries carries less


def test_curve_of_nothing() -> None:
    curve = GradientCurve()
    curve.add(torch.zeros(3))
    assert curve.points([0.5, 1.0]) == [(0.5, 0.0), (1.0, 0.0)]


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    run(Zoo(), progress=True, targets=["up.weight", "down.weight"])
    assert "0/2" in capsys.readouterr().err
    run(Zoo(), progress=False)
    assert capsys.readouterr().err == ""
