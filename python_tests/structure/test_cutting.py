"""Cut models against those whose rows and columns are zeroed, and what each rule saves."""

import copy

import pytest
import torch
from models import FAMILIES, family, ids, t5
from projections import linears, outputs, size
from torch import nn

from sparsekernels.nn.pruned import PrunedLinear
from sparsekernels.structure.architectures import structures
from sparsekernels.structure.pruning_plan import Planner, cut

MODELS = {**{kind: lambda dtype, kind=kind: family(kind, dtype) for kind in FAMILIES}, "t5": t5}
DENSITIES = {"most open": 0.95, "half open": 0.5, "few open": 0.1, "all closed": 0.0, "all open": 1.0}


def masks(model, density, seed=0):
    """Open rows and columns of every projection, at random."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: size(model.get_submodule(name)) for name in linears(model)}
    return tuple(
        {name: torch.rand(mn[side], generator=generator) < density for name, mn in sizes.items()} for side in (0, 1)
    )


def close_structures(model, rows, columns):
    """Close the second head of every attention by values or outputs, and every neuron of the first MLP."""
    attentions, mlps = structures(model)
    for i, a in enumerate(attentions):
        if i % 2:
            columns[a.output].view(a.groups, -1)[1] = False
        else:
            at = torch.arange(len(rows[a.value.module]))[slice(None) if a.value.rows is None else a.value.rows]
            rows[a.value.module][at.view(a.groups, -1)[1]] = False
    for mlp in mlps[:1]:
        rows[mlp.inputs[0].module][slice(None) if mlp.inputs[0].rows is None else mlp.inputs[0].rows] = False


def zeroed(model, rows, columns):
    """A copy with rows, their biases and columns zeroed."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in linears(model):
            module = model.get_submodule(name)
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            if name in rows:
                weight[~rows[name]] = 0
                if module.bias is not None:
                    module.bias[~rows[name]] = 0
            if name in columns:
                weight[:, ~columns[name]] = 0
    return model


def cut_copy(model, rows, columns, names=None):
    """A copy, cut; and what was planned, which must be what it stores less."""
    names = linears(model) if names is None else names
    planner = Planner(model, names)
    cuts = planner.plan(rows, columns)
    assert cuts.removed == planner.count(rows, columns)
    small = copy.deepcopy(model)
    cut(small, cuts)
    assert cuts.total == sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    assert cuts.removed == stored(model) - stored(small)
    return small, cuts


def stored(model):
    return sum(p.numel() for p in model.parameters())


def close(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("whole", [False, True], ids=["", "and structures"])
@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_cut_model_computes_what_the_zeroed_one_does(kind, density, whole):
    dtypes = [(torch.float64, 1e-12)]
    if density == DENSITIES["half open"]:  # no rule of cutting asks for the dtype: once is enough for each model
        dtypes.append((torch.float32, 1e-5))
    for dtype, tolerance in dtypes:
        model = MODELS[kind](dtype)
        rows, columns = masks(model, density)
        if whole:
            close_structures(model, rows, columns)
        small, _ = cut_copy(model, rows, columns)
        with torch.no_grad():
            assert close(outputs(small), outputs(zeroed(model, rows, columns)), tolerance)


@pytest.mark.parametrize("side", ["q", "k", "v", "o"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_one_side_alone(kind, side):
    """Rules between two modules, where nothing else is closed that could hide them."""
    model = family(kind, torch.float64)
    rows, columns = {}, {}
    for i, a in enumerate(structures(model)[0]):
        torch.manual_seed(i)
        if side == "o":
            columns[a.output] = torch.rand(a.groups * a.query_rows) < 0.3
        else:
            part = {"q": a.query, "k": a.key, "v": a.value}[side]
            mask = torch.ones(size(model.get_submodule(part.module))[0], dtype=torch.bool)
            at = torch.arange(len(mask))[slice(None) if part.rows is None else part.rows]
            mask[at[torch.rand(len(at)) < 0.7]] = False
            rows[part.module] = mask
    small, _ = cut_copy(model, rows, columns)
    with torch.no_grad():
        assert close(outputs(small), outputs(zeroed(model, rows, columns)), 1e-12)


def test_a_plain_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)).double()
    rows, columns = {"0": torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()}, {"2": torch.tensor([1, 1, 0, 0, 1, 1, 1]).bool()}
    planner = Planner(model, ["0", "2"])
    cuts = planner.plan(rows, columns)
    assert (cuts.total, cuts.removed) == (42 + 21, 2 * 6 + 2 * 3)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for p in (expected[0].weight, expected[0].bias):
            p[~rows["0"]] = 0
        expected[2].weight[:, ~columns["2"]] = 0
    cut(model, cuts)
    assert isinstance(model[0], PrunedLinear)
    assert model[0].columns is None
    assert model[0].rows.tolist() == [0, 2, 3, 5, 6]
    assert model[2].columns.tolist() == [0, 1, 4, 5, 6]
    assert model[2].rows is None
    x = torch.randn(4, 5, dtype=torch.float64)
    assert close(model(x), expected(x), 1e-14)


def closed(count, *positions):
    mask = torch.ones(count, dtype=torch.bool)
    mask[list(positions)] = False
    return mask


SELF, OUT, LAYER = "encoder.layer.0.attention.self", "encoder.layer.0.attention.output.dense", "encoder.layer.0"
UP, DOWN = f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
LLAMA = "model.layers.0"
ROW = 16 + 1  # of BERT, with its bias; a column of the output is 16


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "removed"),
    [
        pytest.param("bert", {f"{SELF}.value": (3,)}, {}, ROW + 16, id="value row: column of the output"),
        pytest.param("bert", {}, {OUT: (3,)}, ROW + 16, id="column of the output: value row"),
        pytest.param("bert", {f"{SELF}.query": (3,)}, {}, 2 * ROW, id="query row: key row"),
        pytest.param("bert", {f"{SELF}.key": (3,)}, {}, 2 * ROW, id="key row: query row"),
        pytest.param("bert", {f"{SELF}.value": range(4, 8)}, {}, 4 * (3 * ROW + 16), id="head, by values"),
        pytest.param("bert", {}, {OUT: range(4, 8)}, 4 * (3 * ROW + 16), id="head, by the output"),
        pytest.param("bert", {f"{SELF}.value": (4, 5)}, {OUT: (6, 7)}, 4 * (3 * ROW + 16), id="head, by both"),
        pytest.param("bert", {f"{SELF}.value": range(16)}, {}, 16 * (3 * ROW + 16), id="every head"),
        pytest.param("bert", {OUT: range(16)}, {}, 16 * (3 * ROW + 16) + 16, id="every head, by rows of the output"),
        pytest.param("bert", {f"{SELF}.key": range(4)}, {}, 8 * ROW, id="keys of a head: uniform attention"),
        pytest.param("bert", {UP: (0, 9)}, {}, 2 * (ROW + 16), id="up: down"),
        pytest.param("bert", {}, {DOWN: (0, 9)}, 2 * (ROW + 16), id="down: up"),
        pytest.param("bert", {UP: (0, 1)}, {DOWN: (1, 2)}, 3 * (ROW + 16), id="up and down"),
        pytest.param("bert", {UP: range(24)}, {}, 24 * (ROW + 16), id="every neuron"),
        pytest.param("bert", {DOWN: range(16)}, {}, 24 * (ROW + 16) + 16, id="every neuron, by rows of down"),
        pytest.param("bert", {}, {f"{SELF}.key": (1, 2)}, 32, id="columns of a key"),
        pytest.param("llama", {f"{LLAMA}.self_attn.q_proj": (3,)}, {}, ROW, id="rotary: query row alone"),
        pytest.param("llama", {f"{LLAMA}.self_attn.v_proj": (5,)}, {}, ROW + 2 * 16, id="grouped: value row"),
        pytest.param("llama", {}, {f"{LLAMA}.self_attn.o_proj": (9,)}, 16, id="grouped: one column of two"),
        pytest.param("llama", {}, {f"{LLAMA}.self_attn.o_proj": (9, 13)}, ROW + 2 * 16, id="grouped: both columns"),
        pytest.param("llama", {f"{LLAMA}.self_attn.v_proj": range(4)}, {}, 8 * ROW + 2 * 4 * ROW + 8 * 16, id="group"),
        pytest.param("llama", {f"{LLAMA}.mlp.gate_proj": (3,)}, {}, 3 * 16, id="gate: up and down"),
        pytest.param("llama", {f"{LLAMA}.mlp.up_proj": (3,)}, {}, 3 * 16, id="up: gate and down"),
        pytest.param("llama", {}, {f"{LLAMA}.mlp.up_proj": range(16)}, 3 * 24 * 16, id="no column, no bias: no row"),
    ],
)  # fmt: skip
def test_each_rule_saves_what_it_should(kind, rows, columns, removed):
    model = family(kind, torch.float64)
    rows = {name: closed(size(model.get_submodule(name))[0], *at) for name, at in rows.items()}
    columns = {name: closed(size(model.get_submodule(name))[1], *at) for name, at in columns.items()}
    small, cuts = cut_copy(model, rows, columns)
    assert cuts.removed == removed
    with torch.no_grad():
        assert close(outputs(small), outputs(zeroed(model, rows, columns)), 1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "phi3", "gpt-neox", "opt", "gemma3"])
def test_generating_with_a_cache(kind):
    model = family(kind, torch.float64)
    rows, columns = masks(model, 0.7)
    close_structures(model, rows, columns)
    small, _ = cut_copy(model, rows, columns)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    tokens = ids(2, 5)
    expected = zeroed(model, rows, columns).generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert expected.shape == (2, 11)
    assert torch.equal(small.generate(tokens, attention_mask=torch.ones_like(tokens), **options), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "phi3"])
def test_either_attention_and_one_set_afterwards(kind, implementation):
    model = family(kind, torch.float64)
    rows, columns = masks(model, 0.7)
    close_structures(model, rows, columns)
    small, _ = cut_copy(model, rows, columns)
    expected = zeroed(model, rows, columns)
    for each in (small, expected):
        each.set_attn_implementation(implementation)
    with torch.no_grad():
        assert close(outputs(small), outputs(expected), 1e-12)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_bfloat16_is_as_exact_as_the_zeroed_model(kind):
    model = family(kind, torch.bfloat16)
    rows, columns = masks(model, 0.7)
    close_structures(model, rows, columns)
    small, _ = cut_copy(model, rows, columns)
    expected = zeroed(model, rows, columns)
    with torch.no_grad():
        got, rounded = outputs(small), outputs(expected)
        exact = outputs(expected.double())
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= 2 * (rounded.double() - exact).abs().max()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_gradients_are_those_of_the_zeroed_model(kind):
    model = family(kind, torch.float64)
    rows, columns = masks(model, 0.6)
    close_structures(model, rows, columns)
    small, cuts = cut_copy(model, rows, columns)
    expected = zeroed(model, rows, columns)
    for each in (small, expected):
        outputs(each).square().sum().backward()
    for name, each in cuts.modules.items():
        module, dense = small.get_submodule(name), expected.get_submodule(name)
        got, wanted = (m.weight.grad.T if type(m).__name__ == "Conv1D" else m.weight.grad for m in (module, dense))
        for side, index in enumerate((each.outputs, each.inputs)):
            used = (each.rows, each.columns)[side]
            index = index if used is None else used
            wanted = wanted if index is None else wanted.index_select(side, index)
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)
