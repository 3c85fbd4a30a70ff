"""The matrices inside of parameters: which there are, what they are called, and that writing one changes no other."""

import pytest
import torch
import transformers
from models import TRANSFORMERS, Zoo, transformer
from torch import nn

import sparsekernels as sk
from sparsekernels.nn.low_rank import Block
from sparsekernels.structure.matrices import matrices


def bits(tensor):
    """A copy that compares equal only bit for bit, NaN and minus zero included."""
    return tensor.detach().clone().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def several():
    """A model with matrices of every form: (label, parameter) of each."""
    model = nn.Sequential(transformer("gpt2"), nn.MultiheadAttention(8, 2), Zoo(), neox_layer())
    parameters = dict(model.named_parameters())
    return [(matrix, parameters[matrix.parameter]) for matrix in matrices(model, "*").values()]


def neox_layer():
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    return transformers.GPTNeoXModel(transformers.GPTNeoXConfig(vocab_size=11, **small)).layers


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_matrices_of_a_parameter_cover_it_once(kind):
    model = transformer(kind)
    found = matrices(model, "*")
    parameters = dict(model.named_parameters())
    counts = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for matrix in found.values():
        count = counts[matrix.parameter]
        matrix.write_(count, matrix.read(count) + 1)
    for name, count in counts.items():
        assert torch.equal(count, torch.full_like(count, parameters[name].dim() == 2)), name
    assert list(found) == [m.label for m in found.values()]
    assert list(dict.fromkeys(m.parameter for m in found.values())) == [
        n for n, p in parameters.items() if p.dim() == 2
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_replaces_the_matrix_and_keeps_every_other_bit(dtype):
    for matrix, parameter in several():
        weight = nn.Parameter(parameter.detach().to(dtype))
        with torch.no_grad():
            weight.view(-1)[::3] = -0.0
            weight.view(-1)[1::5] = torch.nan
        before, version = bits(weight), weight._version
        old = matrix.read(weight).clone()
        value = torch.randn(matrix.shape, dtype=torch.float64, requires_grad=True)
        matrix.write_(weight, value)
        assert weight._version > version
        assert weight.requires_grad
        assert weight.grad_fn is None
        assert torch.equal(matrix.read(weight), value.detach().to(dtype))
        assert not torch.equal(bits(weight), before)
        matrix.write_(weight, old)
        assert torch.equal(bits(weight), before), matrix.label


def test_read_is_a_view_but_for_scattered_rows():
    forms = set()
    for matrix, weight in several():
        form = "scattered" if isinstance(matrix.rows, torch.Tensor) else type(matrix.rows).__name__
        forms.add((form, matrix.transposed, matrix.expert is not None))
        found = matrix.read(weight)
        assert found.shape == matrix.shape
        assert not found.requires_grad
        viewed = found.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert viewed == (form != "scattered"), matrix.label
    none, part, scattered = "NoneType", "slice", "scattered"
    assert forms == {
        (none, False, False), (none, True, False), (part, False, False), (part, True, False), (none, False, True),
        (scattered, False, False),
    }  # fmt: skip


def test_read_and_write_refuse_what_does_not_fit():
    for matrix, weight in several():
        rows, columns = matrix.shape
        for wrong in (torch.zeros(rows, columns + 1), torch.zeros(1, columns), torch.zeros(()), torch.zeros(columns)):
            with pytest.raises(ValueError, match=r"value: .* is \["):
                matrix.write_(weight, wrong)
        wider = list(weight.shape)
        wider[-2 if matrix.transposed else -1] += 1
        for wrong in (weight[None], weight[0], torch.zeros(wider)):
            with pytest.raises(ValueError, match=r"weight: .* does not contain "):
                matrix.read(wrong)


def test_default_is_the_projections_inside_blocks():
    found = matrices(transformer("gpt2"))
    assert list(found)[:6] == [
        "transformer.h.0.attn.c_attn.weight[q]",
        "transformer.h.0.attn.c_attn.weight[k]",
        "transformer.h.0.attn.c_attn.weight[v]",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]
    assert [(m.layer, m.kind) for m in found.values()][5:7] == [(0, "mlp.c_proj"), (1, "attn.c_attn[q]")]
    assert found["transformer.h.0.mlp.c_fc.weight"].shape == (64, 16)
    assert len(found) == 12
    assert {m.kind for m in matrices(transformer("llama")).values() if m.layer == 1} == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    assert matrices(Zoo()) == {}


def test_what_is_no_matrix_is_left_out():
    odd = nn.Module()
    odd.one = nn.Conv1d(4, 4, 3)
    odd.two = nn.Conv2d(4, 4, 3)
    odd.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)  # bias_k is [1, 1, 4]
    odd.low = sk.LowRankLinear([Block(torch.zeros(2, 4), torch.zeros(4, 2))])
    odd.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    odd.vector = nn.Linear(4, 1)
    model = nn.Sequential(odd)
    attention = [f"0.attention.in_proj_weight[{part}]" for part in "qkv"] + ["0.attention.out_proj.weight"]
    assert list(matrices(model)) == attention
    assert set(matrices(model, "*")) - set(attention) == {
        "0.attention.bias_k[0]", "0.attention.bias_v[0]", "0.vector.weight",
    }  # fmt: skip
    for name in ("one.weight", "two.weight", "low.down", "low.up0", "codes", "vector.bias"):
        with pytest.raises(ValueError, match=rf"names: '0\.{name}' matches no matrix; .* is torch\.\w+ \["):
            matrices(model, ["0.attention.*", f"0.{name}"])


def test_patterns():
    model = transformer("gpt2")
    one = ["transformer.h.1.attn.c_attn.weight[q]"]
    thirds = [f"transformer.h.1.attn.c_attn.weight[{part}]" for part in "qkv"]
    assert list(matrices(model, one)) == list(matrices(model, one[0])) == one
    assert list(matrices(model, "*.1.attn.c_attn.weight")) == thirds
    assert list(matrices(model, "*.1.attn.c_attn.weight[[][qk]]")) == thirds[:2]
    assert list(matrices(model, "*[q]")) == [one[0].replace("1", "0"), one[0]]
    assert list(matrices(model, "transformer.h.[1].attn.c_attn.*")) == thirds
    assert next(iter(matrices(model, iter(["*[v]", "*.wte.*"])))) == "transformer.wte.weight"
    assert list(matrices(model, "lm_head.weight")) == ["transformer.wte.weight"]  # tied
    assert list(matrices(model, [])) == []
    assert list(matrices(Zoo(), ["experts.weight[2]", "embed.*"])) == ["embed.weight", "experts.weight[2]"]
    assert len(matrices(Zoo(), "experts.weight")) == 3


def test_a_pattern_without_a_match_is_an_error_that_shows_a_label():
    with pytest.raises(ValueError, match=r"names: nothing matches 'x\*'; labels look like '.*c_attn\.weight\[q\]'"):
        matrices(transformer("gpt2"), ["*[q]", "x*"])
    with pytest.raises(ValueError, match=r"nothing matches 'x'; labels look like 'model\.embed_tokens\.weight'"):
        matrices(transformer("llama"), "x")
    with pytest.raises(ValueError, match="nothing matches 'x'; the model has no matrices"):
        matrices(nn.LayerNorm(3), "x")
    for name in ("model.norm.weight", "*norm*"):
        with pytest.raises(ValueError, match=r"matches no matrix; '.*norm.*' is torch\.float32 \[16\]"):
            matrices(transformer("llama"), name)


def test_kinds_name_the_stack_where_two_have_the_same_blocks():
    small = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 11}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    found = matrices(model)
    query = found["decoder.block.1.layer.0.SelfAttention.q.weight"]
    assert (query.layer, query.kind) == (1, "decoder.block.layer.0.SelfAttention.q")
    cross = found["decoder.block.1.layer.1.EncDecAttention.q.weight"]
    assert cross.kind == "decoder.block.layer.1.EncDecAttention.q"
    assert len({(m.layer, m.kind) for m in found.values()}) == len(found)


def test_kinds_of_short_names():
    model = nn.Sequential(nn.Linear(3, 2), nn.ParameterList([torch.zeros(2, 3)]))
    model.some = nn.ParameterList([torch.zeros(2, 3)])
    found = {m.label: (m.layer, m.kind) for m in matrices(model, "*").values()}
    assert found == {"0.weight": (0, "weight"), "1.0": (1, "0"), "some.0": (0, "some")}
    assert [(m.layer, m.kind) for m in matrices(nn.Linear(3, 2), "*").values()] == [(None, "weight")]
    assert [m.kind for m in matrices(transformer("gpt2"), "*wte*").values()] == ["transformer.wte"]


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = transformer("gpt2")
    assert list(matrices(model)) == list(matrices(transformer("gpt2")))
