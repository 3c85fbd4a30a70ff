"""Which weights belong together, family by family; and what is left out because it is not certain."""

import pytest
import torch
import transformers
from models import FAMILIES, GROUPED, SIZES, family, random, t5
from torch import nn

import sparsekernels as sk
from sparsekernels.structure.architectures import structures

GROUPS = dict.fromkeys(FAMILIES, (4, 4, 4))
GROUPS.update(dict.fromkeys(("llama", "mistral", "qwen2", "phi3"), (2, 8, 4)))
GROUPS.update(dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3"), (2, 12, 6)))
PLAIN = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "gpt2", "opt")
# What one group, and one neuron, adds to the attributes of the modules around them.
ATTRIBUTES = {
    **{
        kind: {"num_attention_heads": 1, "all_head_size": 4}
        for kind in ("bert", "roberta", "xlm-roberta", "electra", "camembert")
    },
    "distilbert": {"n_heads": 1},
    "gpt2": {"num_heads": 1, "split_size": 4},
    "opt": {"num_heads": 1},
    "phi3": {"num_key_value_heads": 1, "config.num_attention_heads": 2, "config.num_key_value_heads": 1},
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_block_is_found(kind):
    attentions, mlps = structures(family(kind))
    assert [(a.groups, a.query_rows, a.kv_rows) for a in attentions] == [GROUPS[kind]] * 2
    assert [a.rotary for a in attentions] == [kind not in PLAIN] * 2
    assert [dict(a.attributes) for a in attentions] == [ATTRIBUTES.get(kind, {})] * 2
    assert [(m.neurons, len(m.inputs)) for m in mlps] == [(24, 2 if kind in GATED else 1)] * 2
    named = {"intermediate_size": 1} if kind in GATED and kind != "phi3" else {}
    assert [dict(m.attributes) for m in mlps] == [named] * 2


def test_names_are_those_of_the_model():
    (first, second), mlps = structures(family("bert"))
    assert first.name == "encoder.layer.0.attention.self"
    assert [p.module for p in (second.query, second.key, second.value)] == [
        f"encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")
    ]
    assert second.output == "encoder.layer.1.attention.output.dense"
    assert mlps[0].name == "encoder.layer.0"
    assert (mlps[0].inputs[0].module, mlps[0].output) == (
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
    )
    block = family("llama").model.layers[0]
    assert structures(block.self_attn)[0][0].output == "o_proj"  # a block by itself has names too
    assert structures(block.mlp)[1][0].inputs[1].module == "up_proj"


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gpt-neox"])
def test_fused_rows_are_those_that_the_matrices_have(kind):
    model = family(kind)
    found = sk.matrices(model)
    for a in structures(model)[0]:
        for part, title in ((a.query, "q"), (a.key, "k"), (a.value, "v")):
            rows = torch.arange(100)[part.rows]
            assert torch.equal(rows, torch.arange(100)[found[f"{part.module}.weight[{title}]"].rows])


def test_no_weight_is_read():
    with torch.device("meta"):
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **GROUPED))
    assert [len(found) for found in structures(model)] == [2, 2]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixing(nn.Module):
    def forward(self, x):
        return x * x.abs().amax()


class LlamaMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    """Another one of that name."""


def spoiled(module, attribute, value):
    """A model of whose first block something is not as it was."""

    def model():
        model = family("llama")
        owner = model.model.layers[0].get_submodule(module)
        setattr(owner, attribute, value(model.config) if isinstance(value, type) else value)
        return model

    return model


def part_of_a_head():
    model = spoiled("self_attn", "q_proj", nn.Linear(16, 12))()
    model.model.layers[0].self_attn.o_proj = nn.Linear(12, 16)
    return model


def mobilebert():
    narrow = {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8}
    return random(transformers.MobileBertModel, {**SIZES, **narrow, "num_hidden_layers": 1})


UNCERTAIN = {
    "plain": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), 0, 0),
    "t5": (t5, 0, 0),
    "mobilebert": (mobilebert, 0, 0),
    "gpt2, cross attention": (lambda: family("gpt2", add_cross_attention=True), 2, 2),
    "bert, cross attention": (lambda: family("bert", is_decoder=True, add_cross_attention=True), 2, 2),
    "activation 0.5 at 0": (lambda: family("bert", hidden_act="sigmoid"), 2, 0),
    "activation 0 at 0": (lambda: family("bert", hidden_act="relu2"), 2, 2),
    "activation with weights": (spoiled("mlp", "act_fn", nn.PReLU(24)), 2, 1),
    "activation across neurons": (spoiled("mlp", "act_fn", Mixing()), 2, 1),
    "activation of rows of 24": (spoiled("mlp", "act_fn", nn.LayerNorm(24, elementwise_affine=False)), 2, 1),
    "another forward": (spoiled("mlp", "up_proj", Scaled(16, 24)), 2, 1),
    "another attribute": (spoiled("mlp", "intermediate_size", 25), 2, 1),
    "another class of that name": (spoiled("", "mlp", LlamaMLP), 2, 1),
    "no linear": (spoiled("self_attn", "q_proj", nn.Identity()), 1, 2),
    "another size": (spoiled("self_attn", "o_proj", nn.Linear(12, 16)), 1, 2),
    "another width": (spoiled("self_attn", "head_dim", 3), 1, 2),
    "part of a head": (part_of_a_head, 1, 2),
    "another version": (spoiled("self_attn", "o_proj", None), 1, 2),
}


@pytest.mark.parametrize(("model", "attentions", "mlps"), UNCERTAIN.values(), ids=UNCERTAIN)
def test_what_is_not_certain_is_left_out(model, attentions, mlps):
    assert [len(found) for found in structures(model())] == [attentions, mlps]
