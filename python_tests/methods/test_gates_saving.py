"""A compressed model in a folder: the same outputs after loading, and what cannot be loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from gating import measure
from models import batch, transformer
from reduced_models import assert_same, snapshot
from torch import Tensor, nn

import sparsekernels as sk


def compressed(model: nn.Module, granularity: str = "row+column") -> nn.Module:
    """Without training, gates spread at random."""
    torch.manual_seed(0)
    gates = sk.methods.gates.attach(model, 0.3, 10, granularity=granularity)
    with torch.no_grad():
        for logits in gates._logits():
            logits.uniform_(-1.0, 0.6)
    measure(gates)
    gates.settle()
    return gates.compress()


@torch.no_grad()
def outputs(model: nn.Module, kind: str) -> Tensor:
    return model.eval()(**batch(kind)).logits


@pytest.mark.parametrize("granularity", ["row+column", "head+mlp"])
@pytest.mark.parametrize("kind", ["bert", "bert-mlm", "gpt2", "llama"])
def test_round_trip(tmp_path: Path, kind: str, granularity: str) -> None:
    small = compressed(transformer(kind), granularity)
    expected = outputs(small, kind)
    small.save_pretrained(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert {"config.json", "cuts.safetensors", "model.safetensors"} <= set(names)
    assert not any(name.startswith(".") for name in names)
    loaded = sk.methods.gates.load(tmp_path / "model")
    assert torch.equal(outputs(loaded, kind), expected)
    assert loaded.cuts.removed == small.cuts.removed
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(sk.methods.gates.load(tmp_path / "again"), kind), expected)
    assert_same(loaded, snapshot(small))
    into = transformer(kind)
    assert sk.methods.gates.load(tmp_path / "model", into) is into
    assert torch.equal(outputs(into, kind), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_compress_returns_is_the_model(kind: str, way: str, tmp_path: Path) -> None:
    """It can be called, copied, pickled and saved, and each copy saves itself."""
    model = transformer(kind)
    small = compressed(model)
    assert small is model
    assert 0.3 <= small.cuts.removed / small.cuts.total < 0.4
    expected = outputs(small, kind)
    other = copy.deepcopy(small) if way == "deepcopy" else pickle.loads(pickle.dumps(small))
    with torch.no_grad():
        next(small.parameters()).add_(1)
    other.save_pretrained(tmp_path)
    assert torch.equal(outputs(sk.methods.gates.load(tmp_path), kind), expected)
    assert not torch.equal(outputs(small, kind), expected)
    with pytest.raises(ValueError, match="compressed already"):
        sk.methods.gates.attach(other, 0.3, 10)


class Plain(nn.Module):
    """No transformers model: no config."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    small = compressed(Plain().bfloat16())
    x = torch.randn(3, 12).bfloat16()
    small.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        sk.methods.gates.load(tmp_path)
    loaded = sk.methods.gates.load(tmp_path, Plain().bfloat16())
    assert torch.equal(loaded(x), small(x))
    assert loaded.blocks[1].bias is None


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        sk.methods.gates.load(tmp_path / "nowhere")
    compressed(transformer("bert")).save_pretrained(tmp_path)
    other = transformer("llama")
    before = snapshot(other)
    with pytest.raises(ValueError, match="no module"):
        sk.methods.gates.load(tmp_path, other)
    assert_same(other, before)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    model = transformer("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match="damaged"):
        sk.methods.gates.load(tmp_path, model)
    assert_same(model, before)
    second = compressed(transformer("bert"))
    second.save_pretrained(tmp_path / "second")
    weights.write_bytes((tmp_path / "second" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="two saves"):
        sk.methods.gates.load(tmp_path, model)
    other = transformer("bert")
    other.classifier = nn.Linear(16, 5)
    before_other = snapshot(other)
    with pytest.raises(ValueError, match=r"'classifier.weight' is"):
        sk.methods.gates.load(tmp_path / "second", other)
    assert_same(other, before_other)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model"):
        sk.methods.gates.load(tmp_path, model)
    assert_same(model, before)
    (tmp_path / "cuts.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="not a cuts"):
        sk.methods.gates.load(tmp_path)


def test_a_failed_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compressed(transformer("bert"))
    small.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sparsekernels.methods.gates.saving.save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        small.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
