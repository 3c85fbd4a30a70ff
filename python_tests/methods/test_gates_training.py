"""Gates from attach to compress: what trains, what closes, what is left, and the ways back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from comparing import assert_same, snapshot
from gated_models import measure, outputs
from models import batch, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.methods.gates.attaching import NOISES
from sparsekernels.methods.gates.parts import OPEN, SHUT
from sparsekernels.methods.gates.schedule import Importance, Schedule, threshold
from sparsekernels.nn.pruned import PrunedLinear

GRANULARITIES = ("row+column", "head", "mlp", "head+mlp")
TARGETS = {"row+column": 0.4, "head": 0.15, "mlp": 0.2, "head+mlp": 0.4}


def train(model: nn.Module, gates: sk.methods.gates.Gates, kind: str, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    model.train()
    removed = []
    for i in range(steps):
        (model(**batch(kind, seed=i % 4)).loss + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
        removed.append(gates.removed())
    return removed


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_trained_and_compressed(kind: str, granularity: str) -> None:
    model = transformer(kind)
    whole = sum(p.numel() for p in model.parameters())
    target = TARGETS[granularity]
    gates = sk.methods.gates.attach(model, target, 20, granularity=granularity, lora_rank=2)
    removed = train(model, gates, kind, 20)
    assert gates.frozen
    assert removed[3] == 0
    assert removed[-1] >= target  # a unit of these models is many percent of them
    before = outputs(model, kind)
    assert gates.compress() is model
    assert model.cuts.removed / model.cuts.total == pytest.approx(removed[-1], abs=1e-9)
    assert whole - sum(p.numel() for p in model.parameters()) == model.cuts.removed
    torch.testing.assert_close(outputs(model, kind), before, rtol=1e-5, atol=1e-5)
    classes = {type(module).__name__ for module in model.modules()}
    assert not any("Gate" in name for name in classes if name != "GatedMLP")
    compact = [module for module in model.modules() if isinstance(module, PrunedLinear)]
    # Whole heads and neurons leave plain layers; the one that stays where all are gone is not computed.
    assert granularity == "row+column" or all(module.weight.numel() == 0 for module in compact)
    if kind == "llama":
        assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Linear))
    with pytest.raises(RuntimeError, match="no longer has gates"):
        gates.step()


@pytest.mark.parametrize("gate_kind", ["stg", "finegates", "hard_concrete"])
def test_share_is_reached_within_a_point(gate_kind: str) -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 30, kind=gate_kind, granularity="row+column")
    train(model, gates, "bert", 30)
    assert abs(gates.removed() - 0.3) < 0.01


def test_gates_close_before_they_are_made_to() -> None:
    """By the penalty, following the schedule."""
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.4, 200)
    removed = train(model, gates, "bert", 155)
    assert not gates.frozen
    assert removed[19] == 0
    assert abs(removed[-1] - 0.4) < 0.05


def test_fractions_are_folded() -> None:
    model = transformer("gpt2")
    gates = sk.methods.gates.attach(model, 0.5, 10)
    with torch.no_grad():
        for p in gates.parameters():
            if p.dim() == 1 and p.numel() > 4:
                p.uniform_(-0.9, 0.9)
    before = outputs(model, "gpt2")
    share = gates.removed()
    assert 0.05 < share < 0.9
    with pytest.warns(RuntimeWarning, match="freeze") as caught:
        gates.compress()
    assert caught[0].filename == __file__
    assert model.cuts.removed / model.cuts.total == share
    torch.testing.assert_close(outputs(model, "gpt2"), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_restore(kind: str) -> None:
    model = transformer(kind)
    next(model.parameters()).requires_grad_(False)
    before, flags = snapshot(model), {name: p.requires_grad for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    with sk.methods.gates.attach(model, 0.3, 12, lora_rank=2) as gates:
        train(model, gates, kind, 12)
        assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items() if name in before)
    assert_same(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(module) for module in model.modules()] == classes


def test_what_trains() -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 10, lora_rank=2)
    names = {name for name, _ in gates.named_parameters()}
    assert {name.rpartition(".")[2] for name in names} == {"rows", "columns", "lora_A", "lora_B", "weight", "bias"}
    weights = {name for name in names if name.endswith("weight")}
    assert all("LayerNorm" in name or "classifier" in name or "pooler" in name for name in weights)
    assert "bert.embeddings.LayerNorm.weight" not in weights
    groups = gates.param_groups(lr=1e-3, head_lr=1e-2, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(names)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in gates.named_parameters()}
    layer = "bert.encoder.layer.0.attention.self.query"
    assert found[f"{layer}.gates.rows"] == (0.1, 0.0)
    assert found[f"{layer}.gates.lora_A"] == (5e-4, 0.1)
    assert found[f"{layer}.gates.lora_B"] == (4e-3, 0.1)
    assert found[f"{layer}.bias"] == (1e-3, 0.0)
    assert found["classifier.weight"] == (1e-2, 0.1)


@pytest.mark.compatibility("torch", "gradient checkpointing under `methods.gates`", "works")
def test_checkpointing_is_the_same_training() -> None:
    results = []
    for checkpointed in (False, True):
        model = transformer("bert")
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(4)
        gates = sk.methods.gates.attach(model, 0.3, 20, lora_rank=2)
        train(model, gates, "bert", 15)
        results.append(snapshot(model))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


def test_stop_and_go_on() -> None:
    def start() -> tuple[nn.Module, sk.methods.gates.Gates]:
        torch.manual_seed(4)
        model = transformer("bert")
        return model, sk.methods.gates.attach(model, 0.3, 20)

    model, gates = start()
    train(model, gates, "bert", 12)
    saved = copy.deepcopy((model.state_dict(), gates.state_dict()))
    torch.manual_seed(0)
    train(model, gates, "bert", 8)
    other, again = start()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.manual_seed(0)
    train(other, again, "bert", 8)
    assert again.frozen
    assert gates.frozen
    assert_same(other, snapshot(model))
    smaller = sk.methods.gates.attach(transformer("bert"), 0.3, 20, granularity="head")
    with pytest.raises(ValueError, match="gates"):
        smaller.load_state_dict(saved[1])


def test_a_failed_compress_leaves_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 10)
    measure(gates)
    gates.freeze()
    before, expected = snapshot(model), outputs(model, "bert")

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("sparsekernels.structure.prune._check_values", fail)
        with pytest.raises(MemoryError):
            gates.compress()
    assert_same(model, before)
    assert torch.equal(outputs(model, "bert"), expected)
    gates.compress()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 0}, "pruning_ratio must lie"),
        ({"pruning_ratio": 1.0}, "pruning_ratio must lie"),
        ({"total_steps": 3}, "total_steps must be"),
        ({"kind": "soft"}, "kind must be"),
        ({"noise": 0.0}, "noise must be"),
        ({"granularity": "column"}, "granularity must be"),
        ({"lora_rank": -1}, "lora_rank must be"),
        ({"targets": ["*LayerNorm.weight"]}, "not the weight of a plain Linear"),
        ({"targets": ["*nothing*"]}, "no parameter matches"),
        ({"granularity": "head", "pruning_ratio": 0.9}, "can remove"),
        ({"granularity": "head", "targets": ["*output.dense.weight"]}, "no head of a known structure"),
    ],
)
def test_errors_leave_the_model(options: dict, message: str) -> None:
    model = transformer("bert")
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        sk.methods.gates.attach(model, **{"pruning_ratio": 0.3, "total_steps": 20, **options})
    assert_same(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_gated_twice() -> None:
    model = transformer("bert")
    sk.methods.gates.attach(model, 0.3, 20)
    with pytest.raises(ValueError, match="already has gates"):
        sk.methods.gates.attach(model, 0.3, 20)


def test_schedule() -> None:
    schedule = Schedule(100, 0.4)
    wanted = [schedule.wanted(step) for step in range(101)]
    assert wanted[10] == 0
    assert wanted[50] == pytest.approx(0.4)
    assert wanted == sorted(wanted)
    assert wanted[100] == 0.4
    assert [schedule.freezes(step) for step in (79, 80)] == [False, True]


def test_importance_is_per_element_and_skips_closed_gates() -> None:
    importance = Importance(torch.tensor([1.0, 2.0, 1.0]))
    for gradient in (2.0, -2.0, 2.0):
        importance.add(torch.tensor([gradient, gradient, 0.0]))
    torch.testing.assert_close(importance.values(), torch.tensor([4.0, 2.0, 0.0]))
    importance.add(torch.tensor([0.0, float("inf"), 1.0]))
    torch.testing.assert_close(importance.values(), torch.tensor([4.0, 2.0, 1.0]))


def test_price_is_the_lowest_that_is_enough() -> None:
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3])

    def removed(stays: Tensor) -> float:
        return 1 - float(stays.float().mean())

    for share, price_, stays in ((0.0, 0.1, [1, 1, 1, 1]), (0.3, 0.5, [1, 0, 1, 0]), (1.0, float("inf"), [0, 0, 0, 0])):
        found, mask = threshold(scores, scores.argsort(), removed, share)
        assert found == pytest.approx(price_)
        assert mask.tolist() == [bool(x) for x in stays]


def test_penalty_pushes_towards_the_price() -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 20)
    assert float(gates.penalty()) == 0
    gates.threshold = 1.0
    gates._weights = torch.linspace(-1, 1, len(gates._weights))
    penalty = gates.penalty()
    penalty.backward()
    gradients = torch.cat([x.grad for x in gates._logits()])
    assert torch.equal(gradients.sign()[gradients != 0], gates._weights.sign()[gradients != 0])
    share, _ = sk.ops.gate_probabilities(gates._logits(), kind="stg", noise=0.5)
    w = gates._weights
    expected = (w.clamp_min(0) * share + (-w).clamp_min(0) * (1 - share)).sum()
    torch.testing.assert_close(penalty.detach(), expected.detach())


def test_no_warning_in_an_ordinary_run() -> None:
    model = transformer("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gates = sk.methods.gates.attach(model, 0.3, 12)
        train(model, gates, "bert", 12)
        gates.compress()


def test_all_that_gates_can_remove() -> None:
    """The threshold is infinite then; nothing becomes NaN."""
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.25, 30, granularity="head")
    reach = gates._removed(torch.zeros(len(gates._weights), dtype=torch.bool))
    gates.restore()
    gates = sk.methods.gates.attach(model, reach, 30, granularity="head")
    train(model, gates, "bert", 30)
    assert gates.removed() == reach
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    gates.compress()


def test_settling_keeps_the_order_of_importance() -> None:
    """However small the numbers are, and with more shut than asked for."""
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 30)
    importance = gates._importance
    generator = torch.Generator().manual_seed(0)
    scores = 1e-12 * torch.rand(len(importance.seen), generator=generator)
    importance.squares, importance.seen = scores * importance.elements, torch.ones_like(scores)
    with torch.no_grad():
        for logits in gates._logits():
            logits.fill_(-1.0)
    gates.freeze()
    stays = gates._open()
    assert 0.3 <= gates.removed() < 0.31
    assert scores[stays].min() >= scores[~stays].max()


def test_compressing_under_autocast_rounds_nothing() -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 12, lora_rank=2)
    train(model, gates, "bert", 12)
    before = outputs(model, "bert")
    with torch.autocast("cpu", torch.bfloat16):
        gates.compress()
    torch.testing.assert_close(outputs(model, "bert"), before, rtol=1e-5, atol=1e-5)


def test_compressed_once() -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 12, granularity="mlp")
    measure(gates)
    gates.freeze()
    gates.compress()
    with pytest.raises(ValueError, match="already compressed"):
        sk.methods.gates.attach(model, 0.3, 12)
    other = transformer("bert")
    other.cuts = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="`cuts` of its own"):
        sk.methods.gates.attach(other, 0.3, 12)


def test_after_restore_nothing_works() -> None:
    gates = sk.methods.gates.attach(transformer("bert"), 0.3, 12)
    state = gates.state_dict()
    gates.restore()
    for call in (gates.penalty, gates.step, gates.freeze, gates.removed, gates.open_gates, gates.compress):
        with pytest.raises(RuntimeError, match="no longer has gates"):
            call()
    with pytest.raises(RuntimeError, match="no longer has gates"):
        gates.load_state_dict(state)
    frozen = sk.methods.gates.attach(transformer("bert"), 0.3, 12)
    measure(frozen)
    frozen.freeze()
    with pytest.raises(ValueError, match="not frozen"):
        frozen.load_state_dict(state)


def test_settled_gates_stay_under_an_optimizer_with_momentum() -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 30)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    seen = []
    for i in range(30):
        (model(**batch("bert", seed=i)).loss + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
        if gates.frozen:
            seen.append(torch.cat(gates._logits()).detach().clone())
    assert all(torch.equal(seen[0], later) for later in seen)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_elements_are_what_closing_a_gate_alone_removes(kind: str, granularity: str) -> None:
    gates = sk.methods.gates.attach(transformer(kind), 0.1, 20, granularity=granularity)
    elements = gates._importance.elements
    for i in range(len(elements)):
        stays = torch.arange(len(elements)) != i
        assert gates._planner.count(*gates._masks(stays)) == elements[i], gates._vectors


@pytest.mark.parametrize("kind", ["stg", "hard_concrete"])
def test_noise_hardly_reaches_a_gate_at_rest(kind: Any) -> None:
    """A gate that rests at either end is moved in less than one draw of 500, and can still be told to leave."""
    noise, many = NOISES[kind], 200_000
    for logit, rest in ((OPEN[kind], 1.0), (SHUT[kind], 0.0)):
        logits = torch.full((many,), logit)
        values, _ = sk.ops.gate_values(logits, kind=kind, noise=noise, key=torch.tensor([3]))
        assert 0 < (values != rest).sum() < many / 500
        _, slopes = sk.ops.gate_probabilities([logits[:1]], kind=kind, noise=noise)
        assert slopes.item() > 1e-6  # AdamW divides by its size and 1e-8
