"""One name for a weight, whatever wraps the model: PEFT, torch.compile, DataParallel, DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from models import Zoo, batch, transformer
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import sparsekernels as sk
from sparsekernels import Delta, Index, Selection
from sparsekernels.common.names import own_names, plain_names

QUERY, CLASSIFIER = "bert.encoder.layer.1.attention.self.query.weight", "classifier.weight"
NAMES = [QUERY, "bert.encoder.layer.0.attention.self.value.bias", "bert.embeddings.LayerNorm.bias", CLASSIFIER]


def lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], r=2)
    return peft.get_peft_model(model, config)  # type: ignore[return-value]


def ia3(model: nn.Module) -> nn.Module:
    config = peft.IA3Config(target_modules=["query", "value"], feedforward_modules=[])
    return peft.get_peft_model(model, config)  # type: ignore[return-value]


def prompt_tuning(model: nn.Module) -> nn.Module:
    config = peft.PromptTuningConfig(
        num_virtual_tokens=2, task_type="SEQ_CLS", num_layers=2, token_dim=16, num_attention_heads=2
    )
    return peft.get_peft_model(model, config)  # type: ignore[return-value]


def distributed(model: nn.Module) -> nn.Module:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return DistributedDataParallel(model)


@pytest.fixture(autouse=True)
def _process_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "lora": lora,
    "ia3": ia3,
    "prompt tuning": prompt_tuning,
    "injected": lambda model: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query", "value"]), model),
    "compile": torch.compile,
    "data parallel": DataParallel,
    "distributed": distributed,
    "all": lambda model: torch.compile(distributed(lora(model))),
}


def plain() -> nn.Module:
    return transformer("bert")


def train(model: nn.Module, selection: Selection) -> Delta:
    """By hand, so that no wrapper has a say in the result."""
    tuned = sk.train_only(model, selection)
    with torch.no_grad():
        for values in tuned.parameters():
            values.add_(torch.rand_like(values))
    return tuned.delta()


def wanted() -> Selection:
    return Selection.random(plain(), 0.2, names=NAMES)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.compatibility(
    "PEFT", "a delta trained inside PEFT, DataParallel, DDP or torch.compile, applied to the plain model", "works"
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_delta_trained_inside_a_wrapper_fits_the_plain_model(wrapper: str, tmp_path: Path) -> None:
    model = WRAPPERS[wrapper](plain())
    own = {plain: name for name, plain in plain_names(model).items()}
    selection = Selection({own[name]: index for name, index in wanted().items()})
    assert all(name != own[name] for name in NAMES) or wrapper in ("ia3", "injected")
    train(model, selection).save(tmp_path / "d")
    delta = Delta.load(tmp_path / "d")
    assert dict(delta.selection) == dict(wanted())
    fresh = plain()
    applied = delta.apply(fresh)
    trained, now, before = state(model), state(fresh), state(plain())
    for name in NAMES:
        assert not torch.equal(now[name], before[name])
        assert torch.equal(now[name], trained[own[name]])
    applied.revert()
    assert equal(state(fresh), before)


@pytest.mark.compatibility("PEFT", "a delta of the plain model, applied inside a wrapper", "works")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_delta_of_the_plain_model_fits_inside_a_wrapper(wrapper: str) -> None:
    bare = plain()
    delta = train(bare, wanted())
    model = WRAPPERS[wrapper](plain())
    before, own = state(model), {plain: name for name, plain in plain_names(model).items()}
    applied = delta.apply(model)
    now, trained = state(model), state(bare)
    for name in NAMES:
        assert torch.equal(now[own[name]], trained[name])
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {own[name] for name in NAMES}
    with pytest.raises(ValueError, match="another base"):
        delta.apply(model)
    applied.revert()
    assert equal(state(model), before)


def test_predictions_follow_the_delta_into_peft() -> None:
    """The classifier that PEFT saves is a copy, and it is the copy that the forward reads."""
    bare, model = plain().eval(), lora(plain()).eval()
    delta = train(bare, wanted())
    before = model(**batch("bert")).logits
    with delta.apply(model):
        assert torch.equal(model(**batch("bert")).logits, bare(**batch("bert")).logits)
    assert torch.equal(model(**batch("bert")).logits, before)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_selection_of_the_plain_model_serves_inside_a_wrapper(wrapper: str) -> None:
    model, bare = WRAPPERS[wrapper](plain()), plain()
    delta = train(model, wanted())
    assert dict(delta.selection) == dict(wanted())
    delta.apply(bare)
    own = {plain: name for name, plain in plain_names(model).items()}
    for name in NAMES:
        assert torch.equal(state(model)[own[name]], state(bare)[name])


def test_fisher_of_a_plain_selection_inside_peft() -> None:
    model = lora(plain())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    selection = Selection({QUERY: wanted()[QUERY]})
    own = own_names(model, [QUERY])[QUERY]
    found = sk.fisher_diagonal(model, [batch("bert")], selection=selection, progress=False)
    same = sk.fisher_diagonal(model, [batch("bert")], selection=Selection({own: selection[QUERY]}), progress=False)
    assert list(found) == [own]
    assert torch.equal(found[own], same[own])


def test_wrapped_after_it_was_train_only() -> None:
    model = plain()
    tuned = sk.train_only(model, wanted())
    lora(model)
    assert dict(tuned.delta().selection) == dict(wanted())


def test_what_peft_adds_keeps_its_name() -> None:
    model = lora(plain())
    name = f"base_model.model.{QUERY.removesuffix('.weight')}.lora_A.default.weight"
    delta = train(model, Selection.random(model, 0.5, names=[name]))
    assert list(delta.selection) == [name]
    delta.apply(distributed(lora(plain())))  # A starts from the same seed
    with pytest.raises(ValueError, match=r"lacks: base_model.*lora_A"):
        delta.apply(plain())


def test_several_copies_of_one_module_are_ambiguous() -> None:
    model = lora(plain())
    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], r=2)
    model.add_adapter("second", config)  # type: ignore[operator]
    delta = train(plain(), wanted())
    before = state(model)
    with pytest.raises(ValueError, match=r"'classifier.weight' may be any of .*default.weight, .*second.weight"):
        delta.apply(model)
    assert equal(state(model), before)
    own = "base_model.model.classifier.modules_to_save.second.weight"
    assert list(train(model, Selection({own: wanted()[CLASSIFIER]})).selection) == [own]


def test_attributes_of_a_model_that_are_called_like_those_of_wrappers() -> None:
    inner = nn.Module()
    inner.model, inner.base_layer, inner.modules_to_save = Zoo(), nn.Linear(2, 2), nn.ModuleDict({"x": nn.Linear(2, 2)})
    outer = nn.Module()
    outer.module, outer.base_model = nn.Linear(3, 3), inner
    assert all(name == plain for name, plain in plain_names(outer).items())
    assert list(plain_names(outer)) == [name for name, _ in outer.named_parameters(remove_duplicate=False)]


def test_unknown_names_are_refused_inside_a_wrapper_too() -> None:
    with pytest.raises(ValueError, match=r"lacks: nowhere\.weight"):
        Selection({"nowhere.weight": Index.full((2, 2))}).check(lora(plain()))
