"""Layers whose weight or bias is also used outside their module's forward: seen before anything is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_same, snapshot
from gated_models import measure
from models import batch, ids, mamba, transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsekernels as sk

MIXER = "backbone.layers.0.mixer"


def train(gates: sk.methods.gates.Gates, steps: int, forward: Any = None) -> None:
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    for i in range(steps):
        tokens = ids(3, 7, seed=i % 4)
        loss = gates.model(input_ids=tokens, labels=tokens).loss if forward is None else forward(i)
        (loss + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()


def test_mamba_is_compressed_but_for_what_its_mixer_reads() -> None:
    model = mamba(width=32, state=8)
    before = snapshot(model)
    gates = sk.methods.gates.attach(model, 0.2, 20, lora_rank=2)
    train(gates, 20)
    tokens = ids(3, 7)
    expected = model.eval()(input_ids=tokens).logits
    share = gates.removed()
    assert share >= 0.2
    gates.compress()
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
    mixers = [layer.mixer for layer in model.backbone.layers]
    for i, mixer in enumerate(mixers):
        assert type(mixer.dt_proj) is nn.Linear
        assert torch.equal(mixer.dt_proj.weight, before[f"backbone.layers.{i}.mixer.dt_proj.weight"])
    left = sum(p.numel() for m in mixers for part in (m.in_proj, m.x_proj, m.out_proj) for p in part.parameters())
    parts = ("in_proj.weight", "x_proj.weight", "out_proj.weight")
    whole = sum(x.numel() for name, x in before.items() if name.endswith(parts))
    assert share == pytest.approx(1 - left / whole)


@pytest.mark.parametrize("targets", [[f"{MIXER}.dt_proj.weight"], ["*.mixer.*_proj.weight"]])
def test_a_target_that_its_parent_reads_is_refused_by_name(targets: list[str]) -> None:
    """In the first step, before anything is cut; and it is the same again after it."""
    model = mamba(width=32, state=8)
    before = snapshot(model)
    gates = sk.methods.gates.attach(model, 0.2, 20, targets=targets)
    state = copy.deepcopy(gates.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"targets: '{MIXER}\.dt_proj' is also used outside"):
            train(gates, 1)
        for key, value in gates.state_dict().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key])), key
    assert {name for name, x in gates.restore().state_dict().items() if not torch.equal(x, before[name])} == set()


class Reading(nn.Module):
    """Blocks that are called, one of which the parent uses in some other way besides."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "checkpointed":
            x = x + checkpoint(lambda x: F.linear(x, self.blocks[1].weight), x, use_reentrant=False)
        if self.way == "transposed":
            x = x + x @ self.blocks[1].weight.T
        if self.way == "bias":
            x = x + self.blocks[1].bias
        if self.way == "dtype":  # as T5 does: that is no use
            assert isinstance(self.blocks[1].weight, Tensor)
            x = x.to(self.blocks[1].weight.dtype)
        if self.way == "detached":
            x = x + self.blocks[1].weight.detach().mean() * 0
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


@pytest.mark.parametrize(
    ("way", "used"),
    [("checkpointed", True), ("transposed", True), ("bias", True), ("dtype", False), ("detached", False)],
)
def test_used_by_its_parent_as_well(way: str, used: bool) -> None:
    torch.manual_seed(0)
    model = Reading(way)
    weight = model.blocks[1].weight.clone()
    gates = sk.methods.gates.attach(model, 0.3, 20, lora_rank=2)
    x = torch.randn(9, 32)
    train(gates, 20, lambda i: model(x).square().mean())
    assert gates.removed() >= 0.3
    expected = model.eval()(x)
    gates.compress()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (type(model.blocks[1]) is nn.Linear) == used
    assert not used or torch.equal(model.blocks[1].weight, weight)


def test_reading_a_weight_gives_the_parameter_after_the_first_step() -> None:
    model = transformer("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    weight, bias = layer.weight, layer.bias
    gates = sk.methods.gates.attach(model, 0.3, 20)
    assert layer.weight.dtype == weight.dtype
    with torch.no_grad():
        assert layer.weight is weight
    train(gates, 1)
    assert layer.weight is weight
    assert layer.bias is bias
    gates.restore()
    assert layer.weight is weight


def test_what_is_left_out_stays_so_on_resuming() -> None:
    model = mamba(width=32, state=8)
    gates = sk.methods.gates.attach(model, 0.2, 20)
    train(gates, 3)
    state = copy.deepcopy((model.state_dict(), gates.state_dict()))
    assert gates.state_dict()["left_out"] == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    other = mamba(width=32, state=8)
    again = sk.methods.gates.attach(other, 0.2, 20)
    other.load_state_dict(state[0])
    again.load_state_dict(state[1])
    assert again.removed() == gates.removed()
    torch.manual_seed(1)
    train(gates, 1)
    torch.manual_seed(1)
    train(again, 1)
    assert_same(other, snapshot(model))
    bert = sk.methods.gates.attach(transformer("bert"), 0.2, 20)
    before = copy.deepcopy(bert.state_dict())
    with pytest.raises(ValueError, match="leaves out layers"):
        bert.load_state_dict({**before, "steps": 3, "left_out": ["nowhere"]})
    assert bert.steps == 0


def test_a_model_all_of_whose_layers_are_used_elsewhere() -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.2, 20)

    def regularised(i: int) -> Tensor:
        return model(**batch("bert")).loss + sum(layer.weight.norm() for layer in layers)

    layers = [model.get_submodule(name) for name in gates._layers]
    with pytest.raises(ValueError, match="also used outside its module's forward"):
        train(gates, 1, regularised)
    assert gates.steps == 0
    measure(gates)
    gates.freeze()


def test_a_structure_with_a_layer_that_is_left_out_is_not_taken_as_one() -> None:
    model = transformer("llama")
    gates = sk.methods.gates.attach(model, 0.2, 20, granularity="head+mlp")
    planner = gates._planner
    total = planner.total
    down = "model.layers.0.mlp.down_proj"
    planner.leave_out([down])
    assert planner.total == total - model.get_submodule(down)._parameters["weight"].numel()
    assert down in planner.uncut
    closed = torch.zeros(32, dtype=torch.bool)
    cuts = planner.plan({}, {down: closed})
    assert down not in cuts.modules
    assert cuts.removed == 0
