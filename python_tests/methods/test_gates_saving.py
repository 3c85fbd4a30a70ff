"""A compressed model in a folder: the same outputs after loading, and what cannot be loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from comparing import assert_same, snapshot
from gated_models import measure
from models import batch, transformer
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
    gates.freeze()
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
    assert names == ["config.json", "model.safetensors"]
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
    with pytest.raises(ValueError, match="already compressed"):
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
    with pytest.raises(ValueError, match="holds no configuration: pass load"):
        sk.methods.gates.load(tmp_path)
    loaded = sk.methods.gates.load(tmp_path, Plain().bfloat16())
    assert torch.equal(loaded(x), small(x))
    assert loaded.blocks[1].bias is None


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        sk.methods.gates.load(tmp_path / "nowhere")
    small = compressed(transformer("bert"))
    for module in small.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
    small.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()

    def refused(model: nn.Module, message: str) -> None:
        before, classes = snapshot(model), [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            sk.methods.gates.load(tmp_path, model)
        assert_same(model, before)
        assert [type(module) for module in model.modules()] == classes
        assert not hasattr(model, "cuts")

    refused(transformer("llama"), "no module")
    other = transformer("bert")
    other.classifier = nn.Linear(16, 5)
    refused(other, r"'classifier.weight' is \[3, 16\]")
    other = transformer("bert")
    other.classifier = nn.Linear(16, 3, bias=False)
    refused(other, r"should not contain 'classifier.bias'")
    other = transformer("bert")
    other.classifier.register_buffer("more", torch.zeros(3))
    refused(other, r"lacks 'classifier.more'")
    other = transformer("bert")
    other.classifier.weight = nn.Parameter(torch.zeros(3, 16, dtype=torch.int64), requires_grad=False)
    refused(other, "is torch.float32 in")
    other = transformer("bert")
    norms = [m for m in other.modules() if isinstance(m, nn.LayerNorm)]
    norms[1].weight = norms[0].weight
    refused(other, "are one tensor in the model, two in")
    path.write_bytes(whole[: len(whole) // 2])
    refused(transformer("bert"), "damaged")
    at = whole.index(b"weight") + len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused(transformer("bert"), "checksum does not match")
    sk.Selection.random({"a": (3, 4)}, 0.5).save(path)
    refused(transformer("bert"), "not a compressed model")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model"):
        sk.methods.gates.load(tmp_path, transformer("bert"))
    (tmp_path / "model.safetensors").write_bytes(whole)
    with torch.device("meta"):
        hollow = transformer("bert")
    with pytest.raises(ValueError, match="meta device"):
        sk.methods.gates.load(tmp_path, hollow)


def test_bf16_is_loaded_into_fp32(tmp_path: Path) -> None:
    """As torch's load_state_dict does."""
    small = compressed(transformer("bert").bfloat16())
    small.save_pretrained(tmp_path)
    loaded = sk.methods.gates.load(tmp_path, transformer("bert"))
    assert_same(loaded.bfloat16(), snapshot(small))
    assert next(sk.methods.gates.load(tmp_path).parameters()).dtype == torch.bfloat16


def test_what_others_see_in_the_folder(tmp_path: Path) -> None:
    """Files beside the model stay, and config.json is what transformers reads."""
    (tmp_path / "tokenizer.json").write_text("mine")
    small = compressed(transformer("llama"))
    small.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLM"]
    ours, theirs = config.to_dict(), small.config.to_dict()
    assert {key for key in theirs if ours[key] != theirs[key]} <= {"architectures", "dtype", "_name_or_path"}


def test_as_the_trainer_saves(tmp_path: Path) -> None:
    small = compressed(transformer("bert"))
    small.save_pretrained(tmp_path / "none", state_dict=small.state_dict(), is_main_process=False)
    assert not (tmp_path / "none").exists()
    zeros = {name: torch.zeros_like(x) if x.is_floating_point() else x for name, x in small.state_dict().items()}
    small.save_pretrained(tmp_path, state_dict=zeros, is_main_process=True)
    assert_same(sk.methods.gates.load(tmp_path), zeros)


def test_arguments_of_save_pretrained_of_transformers(tmp_path: Path) -> None:
    """accelerate's recipes pass them; nothing is uploaded, so that is refused before anything is written."""
    small = compressed(transformer("bert"))
    with pytest.raises(ValueError, match="push_to_hub=True is not supported"):
        small.save_pretrained(tmp_path / "none", push_to_hub=True)
    assert not (tmp_path / "none").exists()
    small.save_pretrained(
        save_directory=tmp_path, save_function=torch.save, safe_serialization=True, max_shard_size="5GB"
    )
    assert_same(sk.methods.gates.load(tmp_path), small.state_dict())


def test_a_failed_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compressed(transformer("bert"))
    small.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sparsekernels.methods.gates.saving.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        small.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
