"""Which gates close, and when: what was measured decides, and nothing else; ties are spread over layers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from comparing import assert_same, snapshot
from models import batch, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.methods.gates.schedule import Importance, Schedule, closing_order, threshold


def from_pretrained() -> nn.Module:
    """A small Llama in eval mode, as `from_pretrained` returns it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def one_step(model: nn.Module, gates: sk.methods.gates.Gates, optimizer: torch.optim.Optimizer, i: int = 0) -> None:
    (model(**batch("llama", seed=i % 4)).loss + gates.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    gates.step()


def test_the_readme_on_a_model_in_eval_mode_raises() -> None:
    model = from_pretrained()
    gates = sk.methods.gates.attach(model, pruning_ratio=0.3, total_steps=10, granularity="head+mlp", lora_rank=4)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    state = copy.deepcopy(gates.state_dict())
    with pytest.raises(RuntimeError, match=r"call model\.train\(\) before the forward"):
        one_step(model, gates, optimizer)
    assert gates.steps == 0
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(state[key])) for key, x in gates.state_dict().items())
    model.train()
    for i in range(10):
        one_step(model, gates, optimizer, i)
    assert gates.removed() >= 0.3


@pytest.mark.parametrize("way", ["eval mode", "no backward"])
def test_a_step_that_measures_nothing_raises_in_the_middle_too(way: str) -> None:
    """After an evaluation that nobody ended with train()."""
    model = from_pretrained().train()
    gates = sk.methods.gates.attach(model, 0.3, 40, granularity="head+mlp")
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    for i in range(8):
        one_step(model, gates, optimizer, i)
    before = snapshot(model), copy.deepcopy(gates.state_dict())
    if way == "eval mode":
        model.eval()
        model(**batch("llama")).loss.backward()
    with pytest.raises(RuntimeError, match="no gradient reached any gate"):
        gates.step()
    assert_same(model, before[0])
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(before[1][k])) for k, x in gates.state_dict().items())


def test_settling_without_any_importance_raises() -> None:
    model = from_pretrained()
    gates = sk.methods.gates.attach(model, 0.3, 20)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"call model\.train\(\)"):
        gates.freeze()
    assert_same(model, before)
    assert not gates.frozen


class Skipping(nn.Module):
    """Three blocks, of which training runs the others only."""

    def __init__(self, skipped: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.skipped = skipped

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i != self.skipped:
                x = x + block(x).tanh()
        return x


def train(model: nn.Module, gates: sk.methods.gates.Gates, steps: int) -> None:
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        (model(torch.randn(9, 32, generator=generator)).square().mean() + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()


def test_a_layer_that_was_never_measured_is_not_cut() -> None:
    torch.manual_seed(0)
    model = Skipping(1)
    whole = model.blocks[1].weight.clone()
    gates = sk.methods.gates.attach(model, 0.4, 20)
    train(model, gates, 20)
    assert gates.removed() >= 0.4
    gates.compress()
    assert torch.equal(model.blocks[1].weight, whole)
    assert all(type(model.blocks[i]) is sk.PrunedLinear for i in (0, 2))


def test_a_share_out_of_reach_without_unmeasured_layers_raises() -> None:
    """Early in the training, and the gates are as they were."""
    torch.manual_seed(0)
    model = Skipping(1)
    gates = sk.methods.gates.attach(model, 0.9, 20)
    with pytest.raises(RuntimeError, match=r"1 layers, 'blocks\.1' among them"):
        train(model, gates, 20)
    assert gates.steps < 10
    assert gates.removed() == 0


def test_dead_neurons_go_first() -> None:
    """What was measured and never had a gradient costs nothing."""
    importance = Importance(torch.ones(3))
    importance.add(torch.tensor([1.0, 0.0, torch.nan]))
    importance.add(torch.tensor([1.0, 0.0, torch.inf]))
    assert importance.values().tolist() == [1.0, 0.0, torch.inf]
    importance.add(torch.tensor([1.0, 0.0, 3.0]))
    torch.testing.assert_close(importance.values(), torch.tensor([1.0, 0.0, 9.0]))


def test_ties_take_turns() -> None:
    layers = torch.tensor([0] * 4 + [1] * 2 + [2] * 4)
    order = closing_order(torch.zeros(10), layers)
    assert order.tolist() == [0, 6, 4, 1, 7, 2, 8, 5, 3, 9]
    for closed in range(11):
        shares = [(layers[order[:closed]] == i).sum().item() / n for i, n in enumerate((4, 2, 4))]
        assert max(shares) - min(shares) <= 0.5
    scores = torch.tensor([3.0, 1, 1, 1, 1, 2, torch.inf, 1, 0, 1])
    assert closing_order(scores, layers).tolist() == [8, 1, 7, 2, 4, 9, 3, 5, 0, 6]
    first = torch.zeros(10, dtype=torch.bool)
    first[[0, 6]] = True
    assert closing_order(scores, layers, first).tolist() == [0, 8, 1, 7, 2, 4, 9, 3, 5, 6]


def test_a_tie_closes_as_many_as_are_asked_for() -> None:
    scores = torch.ones(8)
    order = closing_order(scores, torch.arange(2).repeat_interleave(4))
    found, stays = threshold(scores, order, lambda stays: 1 - float(stays.float().mean()), 0.5)
    assert found == 1.0
    assert stays.tolist() == [False, False, True, True] * 2


@pytest.mark.parametrize("granularity", ["row+column", "head+mlp"])
def test_equal_importance_empties_no_layer(granularity: str) -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.3, 20, granularity=granularity)
    importance = gates._importance
    importance.squares, importance.seen = importance.elements.clone(), torch.ones_like(importance.elements)
    gates.freeze()
    assert 0.3 <= gates.removed() < 0.45
    for layer, sides in gates.open_gates().items():
        for values in sides.values():
            assert 0 < (values > 0).sum() < len(values), layer


def test_the_schedule_is_cubic() -> None:
    """1 - (1 - t)^3 of the target, t going from 0 at 10 % of the steps to 1 at 50 % (Zhu and Gupta)."""
    schedule = Schedule(100, 0.4)
    for step, share in ((10, 0.0), (20, 37 / 64), (30, 7 / 8), (40, 63 / 64), (50, 1.0)):
        assert schedule.wanted(step) == pytest.approx(0.4 * share, abs=1e-12)
