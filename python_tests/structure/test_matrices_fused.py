"""Fused projections: every part is what the class itself splits off its projection's output, proved on real classes.

Sequences have length one, where rotary embeddings turn nothing: then the query of each head must be exactly what the
matrix called [q] makes of the input, and likewise for keys and values.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekernels.structure.matrices import matrices

HEADS, HEAD, WIDTH = 3, 4, 12
SMALL = {"num_attention_heads": HEADS, "num_hidden_layers": 2, "vocab_size": 11}


def captured(module, *arguments, **named):
    """Query, key and value that reach the attention function of transformers, each [B, heads * head_dim]."""
    held = []

    def attend(module, query, key, value, *_, **__):
        held[:] = [t.transpose(1, 2).flatten(1) for t in (query, key, value)]
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["captured"] = attend
    module.config._attn_implementation = "captured"
    try:
        module(*arguments, **named)
    finally:
        del ALL_ATTENTION_FUNCTIONS["captured"]
    return dict(zip("qkv", held, strict=True))


def gpt2():
    config = transformers.GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=2, vocab_size=11)
    model = transformers.GPT2Model(config)
    return model, "h.1.attn.c_attn.weight", lambda x: captured(model.h[1].attn, x)


def gpt_neox():
    model = transformers.GPTNeoXModel(
        transformers.GPTNeoXConfig(hidden_size=WIDTH, intermediate_size=24, rotary_pct=0.5, **SMALL)
    )

    def split(x):
        turn = model.rotary_emb(x, torch.zeros(len(x), 1, dtype=torch.long))
        return captured(model.layers[1].attention, x, None, position_embeddings=turn)

    return model, "layers.1.attention.query_key_value.weight", split


def bloom():
    model = transformers.BloomModel(transformers.BloomConfig(hidden_size=WIDTH, n_head=HEADS, n_layer=2, vocab_size=11))

    def split(x):
        attention, held = model.h[1].self_attention, []
        own = attention._reshape
        attention._reshape = lambda fused: held.append(own(fused)) or held[-1]
        alibi = torch.zeros(len(x) * HEADS, 1, 1)
        attention(x, torch.zeros_like(x), alibi, torch.zeros(len(x), 1, 1, 1))
        del attention._reshape
        return dict(zip("qkv", (t.transpose(1, 2).flatten(1) for t in held[0]), strict=True))

    return model, "h.1.self_attention.query_key_value.weight", split


def phi3(**more):
    config = transformers.Phi3Config(
        hidden_size=WIDTH, intermediate_size=20, num_key_value_heads=1, pad_token_id=0, **SMALL, **more
    )
    model = transformers.Phi3Model(config)

    def split(x):
        turn = model.rotary_emb(x, torch.zeros(len(x), 1, dtype=torch.long))
        return captured(model.layers[1].self_attn, x, turn, None)

    return model, "layers.1.self_attn.qkv_proj.weight", split


def phi3_wide_heads():
    return phi3(head_dim=6)


class Ones(nn.Module):
    """An activation that notes what it gets, and lets the other factor pass."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, gate):
        self.held.update(gate=gate[:, 0])
        return torch.ones_like(gate)


def phi3_mlp():
    model, *_ = phi3()
    mlp = model.layers[1].mlp

    def split(x):
        held = {}
        mlp.activation_fn = Ones(held)
        with_up = mlp.down_proj.register_forward_pre_hook(lambda _, args: held.update(up=args[0][:, 0]))
        mlp(x)
        with_up.remove()
        return held

    return model, "layers.1.mlp.gate_up_proj.weight", split


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))


def multihead():
    model = Blocks()

    def split(x):
        held = []
        own = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda q, k, v, *_: held.extend(t.flatten(1) for t in (q, k, v)) or q
        try:
            model.blocks[1](x, x, x, need_weights=False)
        finally:
            F.scaled_dot_product_attention = own
        return dict(zip("qkv", held, strict=True))

    return model, "blocks.1.in_proj_weight", split


FUSED = [gpt2, gpt_neox, bloom, phi3, phi3_wide_heads, phi3_mlp, multihead]


@pytest.mark.parametrize("make", FUSED)
def test_a_part_is_what_the_module_splits_off(make):
    torch.manual_seed(0)
    model, name, split = make()
    model.train()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        if parameter.dim() == 1:
            nn.init.zeros_(parameter)
    weight = parameters[name]
    parts = {label.removeprefix(name)[1:-1]: m for label, m in matrices(model, name).items()}
    x = torch.randn(5, 1, WIDTH)
    with torch.no_grad():
        before = split(x)
        assert list(parts) == list(before)
        for part, matrix in parts.items():
            assert matrix.label == f"{name}[{part}]"
            torch.testing.assert_close(F.linear(x[:, 0], matrix.read(weight)), before[part])
            original = matrix.read(weight).clone()
            matrix.write_(weight, torch.randn(matrix.shape))
            after = split(x)
            for other in parts:
                assert torch.equal(after[other], before[other]) == (other != part)
            torch.testing.assert_close(F.linear(x[:, 0], matrix.read(weight)), after[part])
            matrix.write_(weight, original)
    assert sum(m.shape[0] for m in parts.values()) * WIDTH == weight.numel()


def test_cross_attention_of_gpt2_is_whole():
    config = transformers.GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=1, vocab_size=11, add_cross_attention=True)
    found = matrices(transformers.GPT2Model(config))
    assert found["h.0.crossattention.c_attn.weight"].shape == (2 * WIDTH, WIDTH)
    assert found["h.0.crossattention.c_attn.weight"].rows is None
    assert found["h.0.attn.c_attn.weight[q]"].shape == (WIDTH, WIDTH)


def test_other_widths_of_keys_and_values_are_matrices_of_their_own():
    found = matrices(nn.Sequential(nn.MultiheadAttention(8, 2, kdim=5, vdim=3)))
    assert [(m.kind, m.shape) for m in found.values()] == [
        ("q_proj_weight", (8, 8)), ("k_proj_weight", (8, 5)), ("v_proj_weight", (8, 3)), ("out_proj", (8, 8)),
    ]  # fmt: skip


def test_a_subclass_of_torch_attention_is_split():
    class Mine(nn.MultiheadAttention):
        pass

    class Other(nn.MultiheadAttention):
        def forward(self, x):
            return x

    found = matrices(nn.Sequential(Mine(8, 2), Other(8, 2)))
    assert "0.in_proj_weight[k]" in found
    assert "1.in_proj_weight" in found


def test_a_class_of_the_same_name_with_another_layout_is_whole():
    class MultiheadAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_dim = 4
            self.in_proj_weight = nn.Parameter(torch.zeros(12, 4))

    class GPT2Attention(nn.Module):
        def __init__(self, **known):
            super().__init__()
            self.c_attn = nn.Linear(4, 13)
            self.__dict__.update(known)

    same = nn.Sequential(MultiheadAttention(), GPT2Attention(split_size=4), GPT2Attention())
    assert list(matrices(same)) == ["0.in_proj_weight", "1.c_attn.weight", "2.c_attn.weight"]


def test_other_fused_projections_are_whole():
    config = transformers.FalconConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, vocab_size=11)
    assert "h.0.self_attention.query_key_value.weight" in matrices(transformers.FalconModel(config))


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=20, num_key_value_heads=3, num_local_experts=4, **SMALL
    )
    return transformers.MixtralModel(config)


def test_experts_are_one_matrix_each():
    torch.manual_seed(0)
    model = mixtral()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        nn.init.normal_(parameter)
    experts = model.layers[1].mlp.experts
    found = {label: m for label, m in matrices(model).items() if m.expert is not None and m.layer == 1}
    assert list(found) == [
        f"layers.1.mlp.experts.{name}[{e}]" for name in ("gate_up_proj", "down_proj") for e in range(4)
    ]
    x = torch.randn(4, WIDTH)
    to_each = torch.arange(4)[:, None]  # token e goes to expert e
    with torch.no_grad():
        before = experts(x, to_each, torch.ones(4, 1))
        for label, matrix in found.items():
            assert matrix.kind == label.partition(".1.")[2].partition("[")[0]
            weight = parameters[matrix.parameter]
            assert matrix.shape == weight.shape[1:]
            original = matrix.read(weight).clone()
            matrix.write_(weight, torch.randn(matrix.shape))
            changed = (experts(x, to_each, torch.ones(4, 1)) != before).any(1)
            assert changed.tolist() == [e == matrix.expert for e in range(4)]
            matrix.write_(weight, original)
    assert list(matrices(model, "layers.*.mlp.experts.down_proj[2]")) == [
        f"layers.{i}.mlp.experts.down_proj[2]" for i in range(2)
    ]
