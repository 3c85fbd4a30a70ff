"""LASER: what adapt and search find, keep and count."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same, snapshot
from models import batch, transformer, wide_bert
from torch import Tensor, nn

from sparsekernels.methods import laser
from sparsekernels.structure.matrices import matrices


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
    reduced = laser.search(model, lambda m: minus_loss(m, batches), rhos=(0.03, 0.5), max_matrices=2, progress=False)
    assert model.training
    report = reduced.report
    assert [(r.matrix, r.rho) for r in report["candidates"]] == [
        (label, rho) for label in labels for rho in (0.5, 0.03)
    ]
    assert reduced.plan[0] == max(report["candidates"], key=lambda reduction: reduction.measured)
    assert report["evaluations"] > len(report["candidates"])
    model.eval()
    with torch.no_grad():
        assert report["after"] == pytest.approx(minus_loss(model, batches), abs=1e-5)
    assert report["after"] - report["before"] == pytest.approx(sum(r.measured for r in reduced.plan), abs=1e-6)
    reduced.revert()
    model.train()
    assert_same(model, before)


def test_adapt_that_tries_everything_finds_what_search_finds() -> None:
    model, batches = trained_bert()
    options = {"rhos": (0.5, 0.1, 0.03), "max_matrices": 1, "progress": False}
    found = laser.search(model, lambda m: minus_loss(m, batches), **options)
    found.revert()
    reduced = laser.adapt(model, batches, num_candidates=1000, **options)
    assert reduced.plan == found.plan
    assert reduced.plan[0].measured == pytest.approx(found.plan[0].measured, rel=1e-4)
    assert reduced.plan[0].predicted is not None


def test_adapt_composes_greedily() -> None:
    model, batches = trained_bert()
    before = snapshot(model)
    reduced = laser.adapt(model, batches, rhos=(0.5, 0.1, 0.03), num_candidates=4, max_matrices=3, progress=False)
    report = reduced.report
    assert len(reduced.plan) >= 2
    assert len({r.matrix for r in reduced.plan}) == len(reduced.plan)
    assert all(r.measured > 0 for r in reduced.plan)
    assert report["before"] == pytest.approx(sum(r.measured for r in reduced.plan) * -1 + report["after"], abs=1e-6)
    model.eval()
    with torch.no_grad():
        assert report["after"] == pytest.approx(minus_loss(model, batches), abs=1e-5)
    assert report["backwards"] == len(report["candidates"]) <= 3
    assert report["evaluations"] == 1 + sum(map(len, report["candidates"]))
    for i, tried in enumerate(report["candidates"][1:], 1):  # what is reduced already is not tried again
        assert not {r.matrix for r in tried} & {r.matrix for r in reduced.plan[:i]}
    model.train()
    reduced.revert()
    assert_same(model, before)


def test_rows_in_groups_are_tried_too() -> None:
    model, batches = trained_bert()
    options = {"rhos": (0.1,), "max_matrices": 1, "progress": False}
    reduced = laser.adapt(model, batches, blocks=(1, 2), clusters=(3,), num_candidates=1000, **options)
    assert reduced.report["backwards"] == 2
    (tried,) = reduced.report["candidates"]
    assert len(tried) == 3 * 12
    assert {(r.blocks, r.clustered) for r in tried} == {(1, False), (2, False), (3, True)}
    reduced.revert()
    reduced = laser.adapt(model, batches, blocks=(1, 2), clusters=(3,), num_candidates=4, **options)
    (tried,) = reduced.report["candidates"]
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
        assert reduced.parameters_saved == 0
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
            laser.adapt(model, batches, evaluate, num_candidates=4, progress=False)
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
            return laser.adapt(model, batches, lambda m: next(feed), num_candidates=4, max_matrices=1, progress=False)
        return laser.search(model, lambda m: next(feed), rhos=(0.5,), max_matrices=1, progress=False)

    reduced = run([0.0, float("-inf"), float("nan"), float("inf"), 1.0])
    tried = reduced.report["candidates"][0] if way == "adapt" else reduced.report["candidates"]
    assert [r.measured for r in tried[:4]] == [float("-inf")] * 3 + [1.0]
    assert reduced.plan == [tried[3]]
    reduced.revert()
    with pytest.raises(ValueError, match="evaluate must return a finite number for the model as it is, got nan"):
        run([float("nan")])
    assert_same(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates"),
        ({"max_matrices": 0}, "max_matrices"),
        ({"rhos": []}, "rhos must be"),
        ({"rhos": [2.0]}, "rhos must be"),
        ({"score": "best"}, "score must be"),
        ({"blocks": [0]}, "blocks must be"),
        ({"blocks": [1000]}, "no matrix has that many rows"),
        ({"blocks": []}, "no matrix has that many rows"),
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


SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "Mixtral": ({**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}, "ForCausalLM"),
    "Phi3": ({**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}, "ForCausalLM"),
    "GPTNeoX": (SMALL, "ForCausalLM"),
    "T5": (
        {
            "vocab_size": 61,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "ForSequenceClassification",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_many_kinds(kind: str) -> None:
    """Experts, fused projections, an encoder with a decoder: what adapt says it reached is what the model then has."""
    import transformers

    torch.manual_seed(0)
    options, task = MODELS[kind]
    config = getattr(transformers, f"{kind}Config")(**options, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, f"{kind}{task}")(config).eval()
    tokens = torch.randint(3, 61, (3, 7))
    labels = tokens
    if kind == "T5":
        tokens[:, -1] = 2
        labels = torch.tensor([0, 1, 1])
    batches = [{"input_ids": tokens, "labels": labels}]
    before = snapshot(model)
    reduced = laser.adapt(model, batches, rhos=(0.5, 0.1), num_candidates=6, progress=False)
    assert reduced.plan
    with torch.no_grad():
        assert reduced.report["after"] == pytest.approx(minus_loss(model, batches), abs=1e-5)
    assert len({reduction.matrix for reduction in reduced.report["ranking"]}) == len(matrices(reduced.revert()))
    assert_same(model, before)
