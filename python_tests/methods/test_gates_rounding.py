"""What gates leave has good sizes: multiples of 8, in every dimension of a layer, at the share that was asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import sparsekernels as sk
from sparsekernels.methods.gates.parts import Vector
from sparsekernels.methods.gates.rounding import Dimensions, _multiple
from sparsekernels.nn.pruned import PrunedLinear
from sparsekernels.structure.architectures import Mlp, OutputSlice

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 50}


def make(kind: str) -> nn.Module:
    torch.manual_seed(2)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, num_attention_heads=4))
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=32, vocab_size=50)
        return transformers.GPT2LMHeadModel(config)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if kind == "llama" else 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **heads))


def trained(model: nn.Module, target: float, granularity: str, steps: int = 20) -> sk.methods.gates.Gates:
    gates = sk.methods.gates.attach(model.train(), target, 20, granularity=granularity)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    for i in range(steps):
        tokens = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(i % 4))
        (model(input_ids=tokens, labels=tokens).loss + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
    return gates


def sizes(model: nn.Module) -> list[int]:
    """Rows and columns of all weights in blocks that are stored."""
    found: list[int] = []
    for name, module in model.named_modules():
        if any(part.isdigit() for part in name.split(".")) and isinstance(
            getattr(module, "weight", None), nn.Parameter
        ):
            weight: Any = module.weight
            found += list(weight.shape) if weight.dim() == 2 else []
    return found


@pytest.mark.parametrize(("kind", "granularity"), [
    ("bert", "row+column"), ("gpt2", "row+column"), ("llama", "row+column"),
    ("bert", "head+mlp"), ("grouped", "head+mlp"), ("gpt2", "mlp"),
])  # fmt: skip
def test_sizes_are_multiples(kind: str, granularity: str) -> None:
    model = make(kind)
    target = {"mlp": 0.3}.get(granularity, 0.4)
    gates = trained(model, target, granularity)
    gates.compress()
    found = sizes(model)
    assert any(size not in (128, 256, 384, 512, 64) for size in found)
    assert [size for size in found if size % 8] == []
    assert (
        target <= model.cuts.removed / model.cuts.total < target + 0.03
    )  # eight neurons or a head of so small a model are 1 to 2 %
    assert granularity != "row+column" or any(isinstance(module, PrunedLinear) for module in model.modules())


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "grouped"])
def test_what_the_planner_leaves_of_any_mask(kind: str, share: float) -> None:
    """A head is dead as a whole, and one but for a few dimensions; the dead one does not come back."""
    gates = sk.methods.gates.attach(make(kind), 0.2, 20)
    planner = gates._planner
    generator = torch.Generator().manual_seed(3)
    is_open = torch.rand(len(gates._importance.elements), generator=generator) >= share
    ways = {(v.layer, v.side): slice(v.start, v.start + v.count) for v in gates._vectors}
    output = next(layer for layer, side in ways if layer.endswith(("attention.output.dense", "attn.c_proj", "o_proj")))
    columns = is_open[ways[output, "columns"]]
    columns[:64], columns[64:67] = False, False  # two heads, or the two of queries in a group
    order = torch.rand(len(is_open), generator=generator)
    rounded = gates._dimensions.rounding(order)
    stays = rounded(is_open)
    assert (stays | is_open).equal(stays)
    cuts = planner.plan(*gates._masks(stays)).modules
    before = planner.plan(*gates._masks(is_open)).modules
    assert any(len(left) % 8 for each in before.values() for left in (each.rows, each.columns) if left is not None)
    for name, cut in cuts.items():
        for left, used, size in ((cut.outputs, cut.rows, cut.shape[0]), (cut.inputs, cut.columns, cut.shape[1])):
            count = len(used) if used is not None else len(left) if left is not None else size
            assert count % _multiple(size) == 0, (name, count)
    assert cuts[output].inputs is not None
    assert cuts[output].inputs[0] >= 64
    assert rounded(stays).equal(stays)


def test_heads_and_single_gates_are_told_apart() -> None:
    """Of 48 heads 44 are left, which is no multiple of what 48 rows would have to be."""
    dimensions = Dimensions([Vector("o", "columns", 0, 48, 32), Vector("a", "rows", 48, 64, 1)], [], [])
    is_open = torch.ones(112, dtype=torch.bool)
    is_open[[0, 1, 2, 50]] = False
    stays = dimensions.rounding(torch.arange(112.0))(is_open)
    assert stays[:48].equal(is_open[:48])
    assert bool(stays[48:].all())


def test_as_many_open_as_are_missing() -> None:
    """Of neurons with a gate on either side; those last in order, by the gate that comes first."""
    vectors = [
        Vector("up", "rows", 0, 128, 1),
        Vector("down", "columns", 128, 128, 1),
        Vector("down", "rows", 256, 50, 1),
    ]
    dimensions = Dimensions(vectors, [], [Mlp("mlp", (OutputSlice("up"),), "down", 128)])
    is_open = torch.ones(306, dtype=torch.bool)
    is_open[:3] = False  # three neurons lack a row, three a column, and one of them both
    is_open[128 + 2 : 128 + 5] = False
    is_open[256:261] = False  # 45 of 50 rows are left, 46 is even
    order = torch.arange(306.0).flip(0)
    order[[0, 128]] = torch.tensor([1000.0, 0.0])  # the dearest row and the cheapest column, of one neuron
    stays = dimensions.rounding(order)(is_open)
    assert (stays | is_open).equal(stays)
    neurons = stays[:128] & stays[128:256]
    assert int(neurons.sum()) == 128  # 123 are left: the next multiple of 8 is all
    assert int(stays[256:].sum()) == 46
    assert bool(stays[256])  # the dearest of the five
    is_open[8:14] = False  # 117: three of eleven open again
    neurons = (stays := dimensions.rounding(order)(is_open))[:128] & stays[128:256]
    assert int(neurons.sum()) == 120
    assert neurons[:14].nonzero().flatten().tolist() == [1, 2, 3, 5, 6, 7]


def test_nothing_opens_where_sizes_are_good() -> None:
    dimensions = Dimensions([Vector("a", "rows", 0, 160, 1)], [], [])
    is_open = torch.ones(160, dtype=torch.bool)
    is_open[[1, 5, 9, 13, 17, 21, 25, 29]] = False
    assert dimensions.rounding(torch.arange(160.0))(is_open).equal(is_open)
    assert not dimensions.rounding(torch.arange(160.0))(torch.zeros_like(is_open)).any()


def test_training_keeps_open_what_rounding_would_open_again() -> None:
    """Gates below the threshold that will stay are not closed, and the threshold is that of the rounded share."""
    gates = trained(make("bert"), 0.3, "row+column", steps=15)
    assert not gates.frozen
    closing = gates._weights > 0
    scores = gates._importance.values()
    stays = gates._dimensions.rounding(scores)(~closing)
    assert stays.equal(~closing)
    assert bool((scores[~closing] < gates.threshold).any())
    wanted = gates.schedule.wanted(14)
    assert wanted <= gates._removed(stays) < wanted + 0.02


def test_parts_of_a_fused_layer_are_told_apart() -> None:
    """Rows 0 to 99 are a neuron's, the others stand by themselves."""
    mlp = Mlp("mlp", (OutputSlice("fused", slice(0, 100)),), "down", 100)
    dimensions = Dimensions([Vector("fused", "rows", 0, 160, 1)], [], [mlp])
    assert [each.gates.shape for each in dimensions.all] == [(1, 100), (1, 60)]
    assert np.concatenate([each.gates.flatten() for each in dimensions.all]).tolist() == list(range(160))


@pytest.mark.parametrize(("width", "multiple"), [(7, 1), (16, 1), (32, 2), (100, 4), (128, 8), (11008, 8)])
def test_multiple_is_a_sixteenth_at_most(width: int, multiple: int) -> None:
    assert _multiple(width) == multiple
