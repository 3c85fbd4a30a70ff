"""Models under PEFT: methods look at the weights of the model, not at the adapters beside them."""

from __future__ import annotations

from typing import Any

import pytest
from models import batch, transformer
from torch import nn

import sparsekernels as sk
from sparsekernels.common.names import base_parameters, default_head, default_targets
from sparsekernels.methods import fish, ird, sift

peft = pytest.importorskip("peft")

QUIET = {"progress": False}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], lora_bias=False),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def ids(model: nn.Module, names: list[str]) -> list[int]:
    return [id(model.get_parameter(name)) for name in names]


def untied() -> nn.Module:
    model = transformer("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_parameters_of_the_model_itself(kind: str) -> None:
    model = untied()
    whole, targets = [id(p) for p in model.parameters()], ids(model, default_targets(model))
    adapted = peft.get_peft_model(model, ADAPTERS[kind]())
    assert sum(p.requires_grad for p in adapted.parameters()) > 0
    assert ids(adapted, base_parameters(adapted)) == whole
    assert ids(adapted, default_targets(adapted)) == targets
    assert not any(adapted.get_parameter(name).requires_grad for name in base_parameters(adapted))


@pytest.mark.compatibility("PEFT", "`sift`, `fish` and `ird` on a model with adapters", "works")
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("method", [sift, fish, ird])
def test_selections_are_of_the_model(method: Any, kind: str) -> None:
    """And they train: every selected weight gets a gradient, through the adapter around it."""
    adapted = peft.get_peft_model(untied(), ADAPTERS[kind]())
    flags = [p.requires_grad for p in adapted.parameters()]
    found = method(adapted, [batch("llama")], 0.05, **QUIET)
    assert [p.requires_grad for p in adapted.parameters()] == flags
    assert set(found) <= set(base_parameters(adapted))
    if method is not sift:
        assert found.numel == int(0.05 * sum(p.numel() for p in untied().parameters()))
    with sk.train_only(adapted, found) as tuned:
        adapted(**batch("llama")).loss.backward()
        assert all(p.grad is not None for p in tuned.parameters())


def test_the_fisher_diagonal_is_of_the_model_unless_adapters_are_named() -> None:
    adapted = peft.get_peft_model(untied(), ADAPTERS["lora"]())
    found = sk.fisher_diagonal(adapted, [batch("llama")], **QUIET)
    assert list(found) == base_parameters(adapted)
    named = sk.fisher_diagonal(adapted, [batch("llama")], names="*q_proj.lora_*", **QUIET)
    assert len(named) == 4
    assert any(x.any() for x in named.values())


def test_a_copy_of_the_head_is_the_head_while_it_is_in_use() -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(transformer("bert"), config)
    adapted.add_adapter("other", config)
    copy = [f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")]
    assert default_head(adapted)[2:] == copy
    found = sift(adapted, [batch("bert")], 0.05, **QUIET)
    assert set(copy) <= set(found)
    assert not any("lora" in name or "original_module" in name or ".other." in name for name in found)
    with sk.train_only(adapted, found) as tuned:
        adapted(**batch("bert")).loss.backward()
        assert all(p.grad is not None for p in tuned.parameters())
    with adapted.disable_adapter():
        assert default_head(adapted)[2:] == [
            name.replace("modules_to_save.default", "original_module") for name in copy
        ]


def test_adapters_of_transformers_own() -> None:
    """`add_adapter` puts them in without a model of PEFT around."""
    model = untied()
    whole = [id(p) for p in model.parameters()]
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert ids(model, base_parameters(model)) == whole
    assert len(list(model.parameters())) > len(whole)
