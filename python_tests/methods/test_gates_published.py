"""The penalty of FineGates' code in place of ours."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import batch, ids, mamba, transformer

import sparsekernels as sk

PUBLISHED: dict[str, Any] = {"kind": "finegates", "published_penalty": 50.0}


def test_it_is_that_of_their_code() -> None:
    torch.manual_seed(0)
    gates = sk.methods.gates.attach(transformer("bert"), 0.4, 20, **PUBLISHED)
    logits = gates._logits()
    mean = torch.cat([each.detach() for each in logits])
    assert float(mean.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(mean.std()) == pytest.approx(0.1, abs=0.02)
    found = gates.penalty()
    layers = []  # one loss a layer, of the mean of its rows and of its columns; then the mean over layers
    for layer in gates._layers.values():
        sides = [
            (0.5 - 0.5 * torch.erf((-0.5 - torch.tanh(side)) / (0.5 * math.sqrt(2)))).mean()
            for side in (layer.rows, layer.columns)
        ]
        layers.append((torch.stack(sides) - 0.6).abs().mean())
    wanted = 50 * torch.stack(layers).mean()
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found, logits), torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_their_noise_is_its_default() -> None:
    assert sk.methods.gates.attach(transformer("bert"), 0.4, 20, **PUBLISHED)._gating.noise == 0.1
    assert sk.methods.gates.attach(transformer("bert"), 0.4, 20, noise=0.3, **PUBLISHED)._gating.noise == 0.3


def test_layers_that_are_left_out_do_not_count() -> None:
    model = mamba(width=32, state=8)
    gates = sk.methods.gates.attach(model, 0.2, 20, **PUBLISHED)
    tokens = ids(3, 7)
    (model(input_ids=tokens, labels=tokens).loss + gates.penalty()).backward()
    gates.step()
    assert gates._left_out
    model.zero_grad()
    gates.penalty().backward()
    for name, layer in gates._layers.items():
        counted = layer.rows.grad is not None and bool(layer.rows.grad.any())
        assert counted == (name not in gates._left_out), name


def test_gates_close_as_it_drives_them_and_what_is_shut_is_cut() -> None:
    def run(seed: int) -> tuple[list[float], torch.nn.Module, torch.Tensor]:
        torch.manual_seed(seed)
        model = transformer("bert")
        gates = sk.methods.gates.attach(model, 0.4, 30, **PUBLISHED)
        optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3, gate_lr=0.1))
        removed = []
        for i in range(30):
            assert not gates.frozen
            (model.train()(**batch("bert", seed=i % 4)).loss + gates.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            gates.step()
            removed.append(gates.removed())
        assert gates.frozen
        assert float(gates.penalty()) == 0
        before = model.eval()(**batch("bert")).logits.detach()
        shut = sum(int((side == 0).sum()) for sides in gates.open_gates().values() for side in sides.values())
        assert shut > 0
        return removed, gates.compress(), before

    removed, model, before = run(0)
    assert removed[0] == 0
    assert removed[-1] > 0.2
    assert model.cuts.removed / model.cuts.total == pytest.approx(removed[-1], abs=1e-9)
    torch.testing.assert_close(model(**batch("bert")).logits, before, rtol=1e-5, atol=1e-5)
    assert run(0)[0] == removed


@pytest.mark.parametrize("steps", [0, 10])
def test_a_model_that_stays_whole_is_told_of(steps: int) -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.4, 10, **PUBLISHED)
    for _ in range(steps):
        (model.train()(**batch("bert")).loss + gates.penalty()).backward()
        gates.step()
    assert gates.frozen == (steps == 10)
    with pytest.warns(RuntimeWarning, match=rf"after {steps} of 10 steps: 0.0% will be removed; published_penalty has"):
        gates.compress()


def test_its_state_is_resumed_and_that_of_another_penalty_refused() -> None:
    def made(**penalty: Any) -> tuple[torch.nn.Module, sk.methods.gates.Gates]:
        torch.manual_seed(0)
        model = transformer("bert")
        return model, sk.methods.gates.attach(model, 0.4, 20, kind="finegates", **penalty)

    def train(model: torch.nn.Module, gates: sk.methods.gates.Gates, steps: range) -> None:
        for i in steps:
            torch.manual_seed(i)
            (model.train()(**batch("bert", seed=i)).loss + gates.penalty()).backward()
            with torch.no_grad():
                for p in gates.parameters():
                    p.sub_(p.grad, alpha=0.02)  # type: ignore[arg-type]
                    p.grad = None
            gates.step()

    model, gates = made(published_penalty=50.0)
    train(model, gates, range(12))
    saved, state = copy.deepcopy(model.state_dict()), gates.state_dict()
    train(model, gates, range(12, 20))
    other, resumed = made(published_penalty=50.0)
    other.load_state_dict(saved)
    resumed.load_state_dict(state)
    train(other, resumed, range(12, 20))
    assert resumed.frozen
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"state is of published_penalty=50.0, and these gates have 25.0"):
        made(published_penalty=25.0)[1].load_state_dict(state)
    for mine, theirs in (({}, state), ({"published_penalty": 50.0}, made()[1].state_dict())):
        with pytest.raises(ValueError, match="state is not a state_dict"):
            made(**mine)[1].load_state_dict(theirs)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "stg"}, r'published_penalty is for kind="finegates" and granularity="row\+column"'),
        ({"granularity": "mlp"}, r"got 'finegates' and 'mlp'"),
        ({"published_penalty": 0.0}, r"published_penalty must be above 0 and finite, got 0.0"),
        ({"published_penalty": math.inf}, r"published_penalty must be above 0 and finite, got inf"),
        ({"published_penalty": math.nan}, r"published_penalty must be above 0 and finite"),
    ],
)
def test_it_is_refused_where_it_is_not_theirs(more: dict[str, object], message: str) -> None:
    model = transformer("bert")
    with pytest.raises(ValueError, match=message):
        sk.methods.gates.attach(model, 0.4, 20, **{**PUBLISHED, **more})
    assert not [name for name, _ in model.named_parameters() if "gates" in name]
