"""The penalty of FineGates' code in place of ours."""

from __future__ import annotations

import math

import pytest
import torch
from models import batch, transformer

import sparsekernels as sk

OURS = {"kind": "finegates", "published_penalty": 50.0}


def test_it_is_that_of_their_code() -> None:
    torch.manual_seed(0)
    gates = sk.methods.gates.attach(transformer("bert"), 0.4, 20, **OURS)
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


def test_gates_close_as_it_drives_them_and_what_is_shut_is_cut() -> None:
    def run(seed: int) -> tuple[list[float], torch.nn.Module, torch.Tensor]:
        torch.manual_seed(seed)
        model = transformer("bert")
        gates = sk.methods.gates.attach(model, 0.4, 30, **OURS)
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


def test_it_ends_with_a_warning_where_it_has_not() -> None:
    model = transformer("bert")
    gates = sk.methods.gates.attach(model, 0.4, 20, **OURS)
    with pytest.warns(RuntimeWarning, match="the penalty has not ended"):
        gates.compress()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "stg"}, r'published_penalty is for kind="finegates" and granularity="row\+column"'),
        ({"granularity": "mlp"}, r"got 'finegates' and 'mlp'"),
        ({"published_penalty": 0.0}, r"published_penalty must be above 0, got 0.0"),
        ({"published_penalty": float("nan")}, r"published_penalty must be above 0"),
    ],
)
def test_it_is_refused_where_it_is_not_theirs(more: dict[str, object], message: str) -> None:
    model = transformer("bert")
    with pytest.raises(ValueError, match=message):
        sk.methods.gates.attach(model, 0.4, 20, **{**OURS, **more})  # type: ignore[arg-type]
    assert not [name for name, _ in model.named_parameters() if "gates" in name]
