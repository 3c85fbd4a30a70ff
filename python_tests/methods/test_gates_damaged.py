"""Compressed models damaged, and saved over while a kill comes: one that is whole, or an error that changes nothing."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_same, snapshot
from gated_models import BERT, Saver, measure, outputs
from killing import kills
from models import transformer
from mutating import MUTATIONS, mutate
from processes import uses_processes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.common.files import load_tensors
from sparsekernels.methods.gates.saving import KIND, checksum

NAME = "model.safetensors"
Change = Callable[[dict[str, Tensor], Any], None]


def compressed(kind: str, granularity: str, seed: int = 0) -> nn.Module:
    """Gates of whole units and single ones closed at random, without training."""
    model = transformer(kind)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)))
    gates = sk.methods.gates.attach(model, 0.3, 10, granularity=granularity)
    measure(gates, seed)
    gates.freeze()
    return gates.compress()


def structure(model: nn.Module) -> list[tuple[str, str, str]]:
    return [(name, type(module).__name__, repr(module)) for name, module in model.named_modules()]


def load_or_refuse(folder: Path, model: nn.Module, original: nn.Module, about: str) -> nn.Module | None:
    """The loaded model; None if it is refused as it should be, and what it was to go into is as the original is."""
    try:
        return sk.methods.gates.load(folder, model)
    except (ValueError, FileNotFoundError):
        assert_same(model, original.state_dict())
        assert structure(model) == structure(original), about
        assert set(vars(model)) == set(vars(original)), about
        return None
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} for {about}") from error


def sign(path: Path) -> bool:
    """Give a damaged file the checksum of what it holds now, as far as it can be read."""
    try:
        tensors, metadata = load_tensors(path, KIND)
        metadata["checksum"] = checksum(tensors, metadata["plan"])
        save_file({name: x.clone() for name, x in tensors.items()}, path, metadata)
    except (ValueError, KeyError, TypeError, RuntimeError):
        return False
    return True


@functools.cache
def files(kind: str, granularity: str) -> dict[str, bytes]:
    """Those of a compressed model, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        compressed(kind, granularity).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def save(kind: str, granularity: str, folder: Path) -> None:
    for name, content in files(kind, granularity).items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("signed", [False, True], ids=["as it is", "signed"])
@pytest.mark.parametrize(("kind", "granularity"), [("bert", "row+column"), ("llama", "head+mlp")])
def test_mutated_models_are_refused_or_whole(kind: str, granularity: str, signed: bool, tmp_path: Path) -> None:
    """Those with a checksum that fits the damage meet every other check."""
    small = compressed(kind, granularity)
    small.save_pretrained(tmp_path)
    whole, path = (tmp_path / NAME).read_bytes(), tmp_path / NAME
    original, expected, refused, count = transformer(kind), snapshot(small), 0, 0
    model = copy.deepcopy(original)
    for number in range(MUTATIONS):
        seed = f"{kind} {signed} {number}"
        path.write_bytes(mutate(whole, seed))
        if signed and not sign(path):
            continue
        count += 1
        loaded = load_or_refuse(tmp_path, model, original, f"mutate(whole, {seed!r})")
        refused += loaded is None
        if loaded is not None:
            model = copy.deepcopy(original)
            outputs(loaded, kind)
            assert signed or snapshot(loaded).keys() == expected.keys()
            assert signed or all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    print(f"{kind}: {refused} of {count} refused")
    assert refused or signed  # of a few that are signed, all may be whole


def change(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    assert name in tensors
    tensors[name] = value


def first(tensors: dict[str, Tensor], side: str) -> str:
    return next(n for n, x in tensors.items() if n.startswith("sparsekernels.cut") and n.endswith(side) and len(x) > 1)


def swap(tensors: dict[str, Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


QUERY, KEY = (f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key"))
FORGED: dict[str, tuple[Change, str]] = {
    "unsorted": (lambda t, _: change(t, first(t, "rows"), t[first(t, "rows")].flip(0)), "must be sorted"),
    "twice": (lambda t, _: t[first(t, "rows")].__setitem__(1, t[first(t, "rows")][0]), "must be sorted"),
    "negative": (lambda t, _: t[first(t, "rows")].__setitem__(0, -1), "must be sorted"),
    "beyond": (lambda t, _: t[first(t, "rows")].__setitem__(-1, 2**40), "lie in"),
    "int32": (lambda t, _: change(t, first(t, "columns"), t[first(t, "columns")].int()), "must be int64"),
    "matrix": (lambda t, _: change(t, first(t, "columns"), t[first(t, "columns")][None]), "must be int64"),
    "one less": (lambda t, _: change(t, first(t, "rows"), t[first(t, "rows")][:-1]), "is .* the model needs"),
    "no rows": (lambda t, _: [t.pop(first(t, "rows"))], "KeyError"),
    "no rows, and not said": (lambda t, plan: forget(t, plan, "rows"), "is damaged|lacks|the model needs"),
    "one more": (lambda t, _: t.update({"sparsekernels.cut.99.rows": torch.arange(2)}), "should not contain"),
    "a weight more": (lambda t, _: t.update({"more": torch.zeros(2)}), "should not contain 'more'"),
    "a weight less": (lambda t, _: [t.pop(f"{QUERY}.weight")], "lacks"),
    "weights swapped": (lambda t, _: swap(t, f"{QUERY}.weight", "classifier.weight"), "the model needs"),
    "buffers swapped": (
        lambda t, _: [x.add_(1) for n, x in t.items() if n == f"{QUERY}.rows"],
        "not match the cuts",
    ),
    "integers": (lambda t, _: change(t, "classifier.weight", t["classifier.weight"].long()), "is torch.int64"),
    "another module": (lambda _, plan: rename(plan["modules"], QUERY, "nowhere"), "no module 'nowhere'"),
    "a norm": (lambda _, plan: rename(plan["modules"], QUERY, "bert.embeddings.LayerNorm"), "expected a Linear"),
    "another size": (lambda _, plan: plan["modules"][QUERY].update(shape=[32, 16]), "32, 16"),
    "three sizes": (lambda _, plan: plan["modules"][QUERY].update(shape=[16, 16, 16]), "too many values"),
    "huge": (lambda _, plan: plan["modules"][QUERY].update(shape=[10**40, 16]), "planned"),
    "an attribute": (lambda _, plan: plan["attributes"].update({QUERY: {"in_features": 99}}), "cannot become 99"),
    "a method": (lambda _, plan: plan["attributes"].update({QUERY: {"forward": 1}}), "cannot become 1"),
    "an attribute of nothing": (lambda _, plan: plan["attributes"].update({QUERY: {"a.b": 1}}), "cannot become 1"),
    "no module to change": (lambda _, plan: plan["attributes"].update({"nowhere": {"a": 1}}), "no module"),
    "more than all": (lambda _, plan: plan.update(removed=plan["total"] + 1), "parameters removed"),
    "shared with nothing": (lambda _, plan: plan["shared"].update({"x": "nowhere"}), "KeyError"),
    "no list": (lambda _, plan: plan.update(modules=[]), "metadata"),
    "true": (lambda _, plan: plan.update(total=True), "metadata"),
    "more said": (lambda _, plan: plan.update(version=2), "metadata"),
}


def forget(tensors: dict[str, Tensor], plan: Any, side: str) -> None:
    name = first(tensors, side)
    number = int(name.split(".")[2])
    list(plan["modules"].values())[number]["sides"].remove(side)
    del tensors[name]


def rename(entries: dict[str, Any], old: str, new: str) -> None:
    items = [(new if name == old else name, value) for name, value in entries.items()]
    entries.clear()
    entries.update(items)


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_file_is_refused(forged: str, tmp_path: Path) -> None:
    """With a checksum that fits."""
    save("bert", "row+column", tmp_path)
    tensors, metadata = load_tensors(tmp_path / NAME, KIND)
    plan = json.loads(metadata["plan"])
    alter, message = FORGED[forged]
    alter(tensors, plan)
    metadata["plan"] = json.dumps(plan)
    metadata["checksum"] = checksum(tensors, metadata["plan"])
    save_file(tensors, tmp_path / NAME, metadata)
    model = copy.deepcopy(BERT)
    with pytest.raises(ValueError, match=message):
        sk.methods.gates.load(tmp_path, model)
    assert_same(model, snapshot(BERT))
    assert structure(model) == structure(BERT)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5_000, "", "1"])
def test_metadata_that_is_no_plan(text: str, tmp_path: Path) -> None:
    save("bert", "mlp", tmp_path)
    tensors, metadata = load_tensors(tmp_path / NAME, KIND)
    save_file(tensors, tmp_path / NAME, {**metadata, "plan": text, "checksum": checksum(tensors, text)})
    assert load_or_refuse(tmp_path, copy.deepcopy(BERT), BERT, text[:9]) is None


@pytest.mark.parametrize("config", ["[" * 100_000, "{}", "1", '{"architectures": ["BertModel"], "model_type": "x"}'])
def test_a_configuration_that_makes_no_model(config: str, tmp_path: Path) -> None:
    save("bert", "mlp", tmp_path)
    tensors, metadata = load_tensors(tmp_path / NAME, KIND)
    plan = json.dumps({**json.loads(metadata["plan"]), "config": config})
    save_file(tensors, tmp_path / NAME, {**metadata, "plan": plan, "checksum": checksum(tensors, plan)})
    with pytest.raises(ValueError, match="makes no model"):
        sk.methods.gates.load(tmp_path)
    assert load_or_refuse(tmp_path, copy.deepcopy(BERT), BERT, config[:9]) is not None


def test_a_file_of_another_model(tmp_path: Path) -> None:
    for kind in ("bert", "llama"):
        compressed(kind, "mlp").save_pretrained(tmp_path / kind)
    (tmp_path / "llama" / NAME).replace(tmp_path / "bert" / NAME)
    assert load_or_refuse(tmp_path / "bert", copy.deepcopy(BERT), BERT, "swapped") is None
    assert type(sk.methods.gates.load(tmp_path / "bert")).__name__ == "LlamaForCausalLM"  # config.json is a copy only


@uses_processes
def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    folder, versions = tmp_path / "out", [tmp_path / "a", tmp_path / "b"]
    known = []
    for seed, path in enumerate(versions):
        small = compressed("bert", "head+mlp", seed)
        small.save_pretrained(path)
        known.append(snapshot(small))
    sk.methods.gates.load(versions[0]).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("mine")
    found, beside = [0, 0], 0
    for _ in kills(Saver, versions, folder, longest=0.3):
        state = sk.methods.gates.load(folder).state_dict()
        which = [all(torch.equal(x, state[name]) for name, x in version.items()) for version in known]
        assert sum(which) == 1, "neither the old model nor the new one"
        found[which.index(True)] += 1
        left = [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
        assert len(left) <= 2, "each save removes what the killed ones before it left"
        beside += len(left)
    print(f"{found} of the two models, {beside} left something beside it")
    assert beside  # or none was killed on the way
    sk.methods.gates.load(versions[1]).save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", NAME, "tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "mine"


def test_any_reader_gets_the_weights(tmp_path: Path) -> None:
    """Weights lie in it as torch has them: any reader of safetensors gets the model's own names."""
    small = compressed("llama", "mlp")
    small.save_pretrained(tmp_path)
    found = load_file(tmp_path / NAME)
    shared = small.state_dict().keys() - found.keys()
    assert shared == {"lm_head.weight"} or shared == {"model.embed_tokens.weight"}
    assert all(torch.equal(x, found[name]) for name, x in small.state_dict().items() if name not in shared)
