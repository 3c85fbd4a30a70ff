"""What becomes of the modules of a model that is cut, which ones are left alone, and what is refused."""

import copy
import io

import pytest
import torch
from models import family, ids, transformer
from projections import linears, outputs, size
from test_cutting import DOWN, LAYER, OUT, SELF, UP, close, close_structures, closed, cut_copy, masks, zeroed
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsekernels.nn.pruned import PrunedLinear
from sparsekernels.structure.pruning_plan import Planner, cut


def test_heads_and_neurons_leave_plain_linears():
    model = family("bert")
    small, cuts = cut_copy(model, {f"{SELF}.value": closed(16, *range(4, 12)), UP: closed(24, 0, 23)}, {})
    inner = {f"{SELF}.{part}": (8, 16) for part in ("query", "key", "value")}
    for name, shape in {**inner, OUT: (16, 8), UP: (22, 16), DOWN: (16, 22)}.items():
        module = small.get_submodule(name)
        assert type(module) is nn.Linear
        assert (module.out_features, module.in_features) == module.weight.shape == shape
    attention = small.get_submodule(SELF)
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 8, 4)
    assert cuts.modules[UP].outputs.tolist() == list(range(1, 23))
    assert cuts.modules[UP].rows is None
    assert cuts.modules[OUT].inputs.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert cuts.attributes == {SELF: {"num_attention_heads": 2, "all_head_size": 8}}
    assert torch.equal(small.get_submodule(DOWN).weight, model.get_submodule(DOWN).weight[:, 1:23])


def test_attributes_follow():
    block = "transformer.h.0"
    small, _ = cut_copy(family("gpt2"), {}, {f"{block}.attn.c_proj": closed(16, *range(4))})
    attention = small.get_submodule(f"{block}.attn")
    assert (attention.num_heads, attention.split_size, attention.embed_dim) == (3, 12, 16)
    assert (attention.c_attn.nf, attention.c_attn.nx) == tuple(attention.c_attn.weight.shape[::-1]) == (36, 16)
    assert (attention.c_proj.nf, attention.c_proj.nx) == (16, 12)
    assert type(attention.c_attn) is type(attention.c_proj) is Conv1D
    assert attention.c_attn.weight.is_contiguous()
    small, _ = cut_copy(family("llama"), {"model.layers.1.mlp.up_proj": closed(24, 5)}, {})
    assert [layer.mlp.intermediate_size for layer in small.model.layers] == [24, 23]


def test_a_shared_configuration_is_not_changed():
    model = family("phi3", torch.float64)
    rows = {"model.layers.0.self_attn.qkv_proj": closed(32, *range(24, 28))}  # values of the first of two groups
    small, _ = cut_copy(model, rows, {})
    first, second = (layer.self_attn for layer in small.model.layers)
    assert (first.config.num_attention_heads, first.config.num_key_value_heads, first.num_key_value_heads) == (2, 1, 1)
    assert (second.config.num_attention_heads, small.config.num_attention_heads) == (4, 4)
    assert second.config is small.config
    small.config.sliding_window = 3  # what changes for all is seen by it too
    assert first.config.sliding_window == 3
    small.config.sliding_window = None
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    expected = outputs(zeroed(model, rows, {}))
    for again in (copy.deepcopy(small), torch.load(buffer, weights_only=False)):
        assert close(outputs(again), expected, 1e-12)
        assert again.model.layers[0].self_attn.config._config is again.config


def test_a_cut_model_can_be_cut_again():
    model = family("bert", torch.float64)
    once, _ = cut_copy(model, {f"{SELF}.value": closed(16, *range(4)), UP: closed(24, 3)}, {})
    twice, _ = cut_copy(once, {f"{SELF}.value": closed(12, *range(4)), UP: closed(23, 3)}, {})  # 4 to 8, and 4
    assert twice.get_submodule(SELF).num_attention_heads == 2
    expected = zeroed(model, {f"{SELF}.value": closed(16, *range(8)), UP: closed(24, 3, 4)}, {})
    assert close(outputs(twice), outputs(expected), 1e-12)


def test_what_computes_nothing_reads_nothing_and_the_other_way_round():
    block = "model.layers.0.self_attn"
    small, cuts = cut_copy(family("qwen3"), {f"{block}.v_proj": closed(12, *range(12))}, {})
    for part in "qkvo":
        module = small.get_submodule(f"{block}.{part}_proj")
        assert [len(module.rows), len(module.columns), module.weight.numel()] == [0, 0, 0]
    assert cuts.modules[f"{block}.o_proj"].inputs.tolist() == list(range(12))


def test_what_stays_as_it_was():
    model = family("bert", torch.float64)
    model.get_submodule(UP).weight.requires_grad_(False)
    model.get_submodule(f"{SELF}.key").requires_grad_(False).train()
    rows = {UP: closed(24, 3), f"{SELF}.key": closed(16, 3)}
    planner, small = Planner(model, linears(model)), copy.deepcopy(model)
    before = dict(small.named_modules())
    cut(small, planner.plan(rows, {}))
    after = dict(small.named_modules())
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == {f"{SELF}.key", f"{SELF}.query"}
    assert before[UP] is after[UP]
    other = f"{LAYER}.output.dense".replace("0", "1")
    assert all(p is q for p, q in zip(before[other].parameters(), small.get_submodule(other).parameters(), strict=True))
    assert not after[UP].weight.requires_grad
    assert after[UP].bias.requires_grad
    key, query = after[f"{SELF}.key"], after[f"{SELF}.query"]
    assert isinstance(key, PrunedLinear)
    assert not key.weight.requires_grad
    assert not key.bias.requires_grad
    assert query.weight.requires_grad
    assert (key.training, query.training) == (True, False)
    assert key.weight.dtype == torch.float64
    small, _ = cut_copy(family("qwen3"), {"model.layers.0.self_attn.q_proj": closed(24, 3)}, {})
    assert small.model.layers[0].self_attn.q_proj.bias is None


def test_all_open_changes_nothing():
    model = family("gpt2")
    before = dict(model.named_parameters())
    cuts = Planner(model, linears(model)).plan({}, {})
    cut(model, cuts)
    assert cuts.removed == 0
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_weights_may_be_handed_in(kind):
    model = family(kind, torch.float64)
    rows, columns = masks(model, 0.8)
    close_structures(model, rows, columns)
    folded = copy.deepcopy(model)
    for name in linears(model):
        for p in folded.get_submodule(name).parameters():
            p.data.mul_(1.5)
    cuts, asked = Planner(model, linears(model)).plan(rows, columns), []

    def weight_of(name):
        asked.append(name)
        module = model.get_submodule(name)
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        return 1.5 * weight, (1.5 * module.bias).float().double()

    small = copy.deepcopy(model)
    cut(small, cuts, weight_of)
    assert sorted(asked) == sorted(linears(model))
    assert close(outputs(small), outputs(zeroed(folded, rows, columns)), 1e-6)
    small = copy.deepcopy(model)
    cut(small, Planner(model, linears(model)).plan({}, {}), lambda name: tuple(t.float() for t in weight_of(name)))
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert close(outputs(small), outputs(folded), 1e-5)


def hooked(model):
    model.get_submodule(f"{SELF}.value").register_forward_hook(lambda *_: None)


def patched(model):
    module = model.get_submodule(f"{SELF}.value")
    module.forward = module.forward


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.get_submodule(f"{SELF}.value"))


def shared(model):
    model.get_submodule(SELF).value = model.get_submodule(SELF.replace("0", "1")).value


def tied(model):
    model.get_submodule(f"{SELF}.value").bias = model.get_submodule(f"{SELF}.key").bias


def extended(model):
    model.get_submodule(f"{SELF}.value").scale = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize("spoil", [hooked, patched, parametrized, shared, tied, extended])
def test_what_cannot_be_cut_is_left_as_it_is(spoil):
    model = family("bert", torch.float64)
    spoil(model)
    planner = Planner(model, [*linears(model), f"{SELF}.value"])  # parametrized, it is of another class
    assert f"{SELF}.value" in planner.uncut
    cuts = planner.plan({f"{SELF}.value": closed(16, *range(8))}, {OUT: closed(16, 0)})
    assert cuts.removed == 16  # no structure holds the column to the row
    distinct = {id(p): p.numel() for n in planner.names for p in model.get_submodule(n).parameters()}
    assert cuts.total == planner.total == sum(distinct.values())
    expected = outputs(zeroed(model, {}, {OUT: closed(16, 0)}))
    cut(model, cuts)
    assert close(outputs(model), expected, 1e-12)


def test_tied_heads_count_once_and_stay():
    model = transformer("llama").eval()
    planner = Planner(model, [*linears(model), "lm_head"])
    cuts = planner.plan({"lm_head": closed(61, 0)}, {})
    assert planner.uncut == ["lm_head"]
    assert (cuts.removed, "lm_head" in cuts.modules) == (0, False)
    assert cuts.total == sum(model.get_submodule(name).weight.numel() for name in planner.names)


def test_modules_whose_weights_others_read_are_left():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    planner = Planner(model, names)
    assert planner.uncut == names
    x = torch.randn(2, 3, 8)
    expected = model(x)
    cut(model, planner.plan({name: torch.zeros(size(model.get_submodule(name))[0]) > 0 for name in names}, {}))
    assert torch.equal(model(x), expected)
    assert Planner(nn.Linear(3, 4), [""]).uncut == [""]  # nothing holds it that could hold another


def test_a_structure_needs_all_its_modules():
    model = family("bert", torch.float64)
    names = [name for name in linears(model) if not name.endswith("key")]
    _, cuts = cut_copy(model, {f"{SELF}.value": closed(16, *range(4))}, {}, names)
    assert cuts.removed == 4 * 17
    assert set(cuts.modules) == set(names)


def test_masks_may_lie_anywhere():
    model = family("bert")
    planner = Planner(model, linears(model))
    rows, columns = masks(model, 0.7)
    expected = planner.plan(rows, columns)
    again = masks(model, 0.7)
    assert all(torch.equal(mask, again[0][name]) for name, mask in rows.items())  # not written in
    assert all(torch.equal(mask, again[1][name]) for name, mask in columns.items())
    if torch.cuda.is_available():
        on_gpu = [{name: mask.cuda() for name, mask in side.items()} for side in (rows, columns)]
        assert planner.count(*on_gpu) == expected.removed
    wide = {name: torch.stack([mask, mask], 1)[:, 0] for name, mask in rows.items()}  # not contiguous
    assert planner.count(wide, columns) == expected.removed


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        ([UP, "layers.9"], {}, "names: the model has no module 'layers.9'"),
        (["embeddings.word_embeddings"], {}, "is a Embedding; expected a Linear or Conv1D"),
        ([UP], {DOWN: closed(16)}, r"open_rows: '.*' is not one of the planner's 1 modules"),
        ([UP], {UP: closed(23)}, r"open_rows\['.*'\] must be bool of shape \[24\], got torch.bool of \[23\]"),
        ([UP], {UP: torch.ones(24)}, "got torch.float32"),
    ],
)
def test_errors_of_the_planner(names, rows, message):
    with pytest.raises(ValueError, match=message):
        Planner(family("bert"), names).plan(rows, {})


@pytest.mark.parametrize(
    ("spoil", "values", "message"),
    [
        (lambda m: setattr(m.encoder.layer[1].output, "dense", nn.Linear(24, 15)), {}, r"was \[16, 24\] .* \[15, 24\]"),
        (lambda m: setattr(m.encoder.layer[1].output, "dense", nn.Identity()), {}, "is a Identity; expected a Linear"),
        (lambda m: delattr(m.encoder.layer[1].output, "dense"), {}, "the model has no module"),
        (lambda m: None, {"weight": torch.ones(16, 23)}, r"must return a weight \[16, 24\] and a bias, got \[16, 23\]"),
        (lambda m: None, {"bias": None}, r"and a bias, got \[16, 24\] and none"),
        (lambda m: None, {"bias": torch.ones(15)}, r"must return a bias \[16\], got \[15\]"),
    ],
)  # fmt: skip
def test_errors_of_cut_change_nothing(spoil, values, message):
    model = family("bert")
    planner = Planner(model, linears(model))
    cuts = planner.plan(*masks(model, 0.5))
    spoil(model)
    before = dict(model.named_parameters()), dict(model.named_modules())

    def weight_of(name):
        module = model.get_submodule(name)
        own = {"weight": module.weight, "bias": module.bias}
        return tuple((own | values if name == f"{LAYER}.output.dense".replace("0", "1") else own).values())

    with pytest.raises(ValueError, match=message):
        cut(model, cuts, weight_of)
    assert all(p is before[0][name] for name, p in model.named_parameters())
    assert all(m is before[1][name] for name, m in model.named_modules())
    assert model.get_submodule(SELF).num_attention_heads == 4


def test_a_cut_model_trains():
    model = family("gpt2", torch.float64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    rows, columns = masks(model, 0.7)
    small, _ = cut_copy(model, rows, columns)
    tokens = ids(2, 5)
    loss, expected = (m(tokens, labels=tokens).loss for m in (small, zeroed(model, rows, columns)))
    loss.backward()
    assert abs(loss - expected) < 1e-12
    assert all(p.grad is not None for p in small.parameters())
