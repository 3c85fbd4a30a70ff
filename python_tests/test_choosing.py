"""Rows, columns and blocks chosen at random, by scores and by masks; files of before there were any."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.deltas import trained, zoo
from models import ids, transformer
from safetensors.torch import save_file
from samples.case import boxes
from torch import nn

import sparsekernels as sk
from sparsekernels import Delta, Index, Selection
from sparsekernels.choosing import best_units, sharing_inputs
from sparsekernels.training.fingerprint import fingerprint

GRAINS = {
    "rows": {"granularity": "row"},
    "columns": {"granularity": "column"},
    "blocks": {"granularity": "block", "block": (4, 3)},
}
SHAPES = {"a": torch.Size((8, 6)), "b": torch.Size((5, 7)), "c": torch.Size((2, 4, 6)), "v": torch.Size((9,))}


def by_hand(scores: torch.Tensor, index: Index) -> list[float]:
    """The sum of squares of every unit."""
    every = index.with_positions(torch.arange(index.num_positions))
    if index.granularity == "row":
        return [float(row.square().sum()) for row in scores.reshape(-1, scores.shape[-1] if scores.dim() > 1 else 1)]
    matrices = scores.reshape(-1, *scores.shape[-2:])
    return [float(matrices[at][rows, columns].square().sum()) for at, rows, columns in boxes(every)]


@pytest.mark.parametrize("units", GRAINS)
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 1.0])
def test_random_has_the_share_asked_for(units: str, density: float) -> None:
    found = Selection.random(SHAPES, density, seed=3, **GRAINS[units])
    assert list(found) == list(SHAPES)
    assert found == Selection.random(SHAPES, density, seed=3, **GRAINS[units])
    assert density == 1.0 or found != Selection.random(SHAPES, density, seed=4, **GRAINS[units])
    for name, index in found.items():
        assert index.granularity == ("row" if name == "v" else GRAINS[units]["granularity"])
        wanted = max(1, int(density * SHAPES[name].numel()))
        fewer = index.with_positions(index.positions[:-1])
        assert index.numel >= wanted
        if not any(size % of for size, of in zip(SHAPES[name][-2:], index.tile, strict=False)):
            assert fewer.numel < wanted, "the fewest units"


@pytest.mark.parametrize("units", GRAINS)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_topk_takes_the_units_with_most_for_their_cost(units: str, per_tensor: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = Selection.topk(scores, density=0.3, per_tensor=per_tensor, **GRAINS[units])
    one = Selection.random(SHAPES, 1.0, **GRAINS[units])
    ranked = []
    for name, index in one.items():
        for at, score in enumerate(by_hand(scores[name], index)):
            size = index.with_positions(torch.tensor([at])).numel
            ranked.append((score / size, name, at, size))
    for names in [[name] for name in SHAPES] if per_tensor else [list(SHAPES)]:
        budget, expected = int(0.3 * sum(SHAPES[name].numel() for name in names)), {name: [] for name in names}
        for _, name, at, size in sorted(r for r in ranked if r[1] in names)[::-1]:
            if budget <= 0:
                break
            expected[name].append(at)
            budget -= size
        for name in names:
            assert sorted(expected[name]) == (found[name].positions.tolist() if name in found else [])


def test_ties_go_to_the_earlier_tensor_and_the_lower_position() -> None:
    scores, sizes = [torch.ones(4), torch.ones(4)], [torch.full((4,), 2), torch.full((4,), 2)]
    assert [p.tolist() for p in best_units(scores, sizes, 9)] == [[0, 1, 2, 3], [0]]
    assert [p.tolist() for p in best_units(scores, sizes, 2)] == [[0], []]
    assert [p.tolist() for p in best_units(scores, sizes, 16)] == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_weights_that_read_one_input() -> None:
    model = transformer("llama")
    shapes = {name: p.shape for name, p in model.named_parameters() if p.dim() == 2}
    groups = sharing_inputs(shapes)
    assert sorted(name for group in groups for name in group) == sorted(shapes)
    layer = "model.layers.0."
    assert [f"{layer}self_attn.{each}_proj.weight" for each in "qkv"] in groups
    assert [f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"] in groups
    assert [f"{layer}self_attn.o_proj.weight"] in groups
    found = Selection.random(shapes, 0.2, granularity="column")
    apart = Selection.random(shapes, 0.2, granularity="column", share_inputs=False)
    for names in groups:
        same = {tuple(found[name].positions.tolist()) for name in names}
        assert len(same) == 1
        assert len(names) == 1 or len({tuple(apart[name].positions.tolist()) for name in names}) > 1
    assert sharing_inputs({"q_proj.weight": (4, 6), "k_proj.weight": (4, 8)}) == [["q_proj.weight"], ["k_proj.weight"]]


def test_topk_with_shared_inputs_sums_the_scores() -> None:
    scores = {"q_proj.weight": torch.eye(3), "k_proj.weight": 3 * torch.eye(3)[[2, 0]]}  # k: columns 2 and 0
    found = Selection.topk(scores, density=0.3, per_tensor=True, granularity="column", share_inputs=True)
    assert {name: index.positions.tolist() for name, index in found.items()} == {name: [0] for name in scores}
    with pytest.raises(ValueError, match='share_inputs is for granularity="column"'):
        Selection.topk(scores, k=1, granularity="row", share_inputs=True)


@pytest.mark.parametrize("units", GRAINS)
def test_masks_of_whole_units(units: str) -> None:
    for name, index in Selection.random(SHAPES, 0.4, **GRAINS[units]).items():
        masks = {name: index.mask(), "none": torch.zeros(3, 3, dtype=torch.bool)}
        assert dict(Selection.from_masks(masks, **GRAINS[units])) == {name: index}
        broken = index.mask()
        if name != "v":
            broken.view(-1)[int(index.to_elements().positions[0])] = False
            with pytest.raises(ValueError, match=rf"masks\['{name}'\]: mask is true in only a part of {units[:-1]}"):
                Selection.from_masks({name: broken}, **GRAINS[units])


BAD = {
    "another granularity": (lambda: Index(torch.tensor([0]), (4, 4), "diagonal"), 'must be "element", "row"'),
    "a block without a shape": (lambda: Index(torch.tensor([0]), (4, 4), "block"), "block is the shape of a unit"),
    "a shape without blocks": (lambda: Index(torch.tensor([0]), (4, 4), "row", (2, 2)), "block is the shape of a unit"),
    "an empty block": (lambda: Index(torch.tensor([0]), (4, 4), "block", (0, 2)), "two positive integers"),
    "a block of one number": (lambda: Index(torch.tensor([0]), (4, 4), "block", (2,)), "two positive integers"),
    "columns of a vector": (lambda: Index(torch.tensor([0]), (4,), "column"), 'has no columns; use granularity="row"'),
    "blocks of a vector": (lambda: Index(torch.tensor([0]), (4,), "block", (2, 1)), 'no blocks; use granularity="row"'),
    "a column too many": (lambda: Index(torch.tensor([1, 4]), (9, 4), "column"), r"\[0, 4\), got column 4"),
    "a block too many": (lambda: Index(torch.tensor([6]), (5, 4), "block", (2, 2)), r"\[0, 6\), got block 6"),
    "a column of a fourth expert": (
        lambda: Index(torch.tensor([12]), (3, 5, 4), "column"),
        r"\[0, 12\), got column 12",
    ),
    "unsorted blocks": (
        lambda: Index(torch.tensor([3, 1]), (5, 4), "block", (2, 2)),
        "block 1 at entry 1 is not sorted",
    ),
    "random of a bad block": (
        lambda: Selection.random(SHAPES, 0.1, granularity="block", block=(2, -1)),
        "two positive integers",
    ),
    "topk of NaN": (
        lambda: Selection.topk({"w": torch.full((2, 2), math.nan)}, k=1, granularity="column"),
        r"scores\['w'\] holds NaN",
    ),
    "random with a block of elements": (
        lambda: Selection.random(SHAPES, 0.1, block=(2, 2)),
        "block is the shape of a unit",
    ),
    "topk with a block of elements": (
        lambda: Selection.topk({"w": torch.ones(2, 2)}, k=1, block=(2, 2)),
        "block is the shape of a unit",
    ),
    "a block that is a number": (lambda: Index(torch.tensor([0]), (4, 4), "block", 3), "two positive integers, got 3"),
    "no scores": (lambda: Selection.topk({}, k=1, granularity="row"), "at least one tensor"),
    "topk out of range": (lambda: Selection.topk({"w": torch.ones(2, 2)}, k=5, granularity="row"), r"\[1, 4\], got 5"),
    "random out of range": (lambda: Selection.random(SHAPES, 1.5, granularity="row"), r"\(0, 1\], got 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_block_that_is_a_row_a_column_or_an_element_is_one() -> None:
    for block, granularity in (((1, 9), "row"), ((9, 1), "column"), ((1, 1), "element"), ((9, 9), "block")):
        index = Index(torch.tensor([0]), (5, 4), "block", block)
        assert index.granularity == granularity
        assert index == Index(torch.tensor([0]), (5, 4), granularity, (5, 4) if granularity == "block" else None)


def test_files_of_before_there_were_columns(tmp_path: Path) -> None:
    """They say `rows`; a row of a 3-D weight was a slice of its first dimension."""
    path, positions = tmp_path / "old", torch.tensor([0, 2], dtype=torch.int32)
    kinds = {"m": {"shape": [3, 4], "rows": True}, "e": {"shape": [3, 4], "rows": False}}
    kinds["x"] = {"shape": [3, 2, 4], "rows": True}
    metadata = {"sparsekernels": "selection", "tensors": json.dumps(kinds)}
    save_file({name: positions.clone() for name in kinds}, path, metadata)
    found = Selection.load(path)
    assert found["m"] == Index(positions, (3, 4), "row")
    assert found["e"] == Index(positions, (3, 4))
    assert found["x"] == Index(torch.tensor([0, 1, 4, 5]), (3, 2, 4), "row")


def test_a_delta_of_before_there_were_columns(tmp_path: Path) -> None:
    selection = Selection({"experts.weight": Index(torch.arange(16, 32), (3, 16, 16), "row")})  # the second expert
    delta, _ = trained(selection)
    (change,) = delta.changes.values()
    base = fingerprint(zoo().experts.weight[1:2])  # of a slice in its shape, as it was made then
    kind = {"experts.weight": {"shape": [3, 16, 16], "rows": True, "base": base}}
    tensors = {"experts.weight.indices": torch.tensor([1], dtype=torch.int32)}
    tensors["experts.weight.values"] = change.values.reshape(1, 16, 16).contiguous()
    save_file(tensors, tmp_path / "old", {"sparsekernels": "delta", "tensors": json.dumps(kind)})
    model = zoo()
    Delta.load(tmp_path / "old").apply(model)
    assert torch.equal(model.experts.weight[1], change.values)


class Tower(nn.Module):
    """Blocks for the default targets of SIFT, with a loss for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 12)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)) for _ in range(2)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return x.square().sum((1, 2))


@pytest.mark.parametrize("units", GRAINS)
def test_sift_selects_units_by_their_gradient(units: str) -> None:
    torch.manual_seed(0)
    model, batch = Tower(), ids(4, 5)
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and "blocks" in name]
    found = sk.methods.sift(
        model, [batch], 0.2, loss=lambda m, tokens: m(tokens).sum(), head=(), progress=False, **GRAINS[units]
    )
    grads = torch.autograd.grad(model(batch).sum(), [model.get_parameter(name) for name in names])
    expected = Selection.topk(dict(zip(names, grads, strict=True)), density=0.2, per_tensor=True, **GRAINS[units])
    assert dict(found) == dict(expected)


@pytest.mark.parametrize("units", GRAINS)
@pytest.mark.parametrize("limit", [100, 1 << 30])
def test_fish_selects_units_by_their_fisher_information(units: str, limit: int) -> None:
    torch.manual_seed(0)
    model, batch = Tower(), {"tokens": ids(4, 5)}
    loss = lambda m, batch: m(batch["tokens"])  # noqa: E731
    found = sk.methods.fish(model, [batch], 0.1, loss=loss, progress=False, max_fisher_bytes=limit, **GRAINS[units])
    fisher = sk.fisher_diagonal(model, [batch], loss=loss, progress=False)
    roots = {name: total.double().sqrt() for name, total in fisher.items()}
    k = int(0.1 * sum(p.numel() for p in model.parameters()))
    assert dict(found) == dict(Selection.topk(roots, k, **GRAINS[units]))
    assert 0 < found.report["carried"] <= 1


@pytest.mark.parametrize("units", GRAINS)
def test_ird_that_keeps_all_samples_selects_what_fish_does(units: str) -> None:
    """Each iteration ranks what the one before kept, by the same samples: the best of the best are the best."""
    torch.manual_seed(0)
    model, samples = Tower(), [{"tokens": ids(8, 5)}]
    options = {"loss": lambda m, batch: m(batch["tokens"]), "progress": False, **GRAINS[units]}
    found = sk.methods.ird(model, samples, 0.05, sample_factor=1.0, **options)
    assert len(found.report["history"]) > 3
    assert dict(found) == dict(sk.methods.fish(model, samples, 0.05, **options))


@pytest.mark.parametrize("units", GRAINS)
def test_ird_ends_with_units_of_the_budget(units: str) -> None:
    torch.manual_seed(0)
    model = Tower()
    loss = lambda m, batch: m(batch["tokens"])  # noqa: E731
    found = sk.methods.ird(model, [{"tokens": ids(8, 5)}], 0.05, loss=loss, progress=False, **GRAINS[units])
    k = int(0.05 * sum(p.numel() for p in model.parameters()))
    assert k <= found.numel <= k + 61 * 12
    assert {index.granularity for index in found.values()} <= {GRAINS[units]["granularity"], "row"}
    assert all(index.positions.dtype == torch.int32 for index in found.values())
    numbers = [step["parameters"] for step in found.report["history"]]
    assert numbers == sorted(numbers, reverse=True)


def test_random_blocks_are_uniform_where_some_are_cut() -> None:
    shape, seeds = {"w": (10, 40)}, 300
    counts = torch.zeros(10)
    for seed in range(seeds):
        index = Selection.random(shape, 0.1, seed=seed, granularity="block", block=(8, 8))["w"]
        counts[index.positions.long()] += 1
    whole, cut = counts[:5].mean() / seeds, counts[5:].mean() / seeds  # the second row of blocks has two rows
    assert abs(float(whole - cut)) < 0.05


def test_squares_of_tiny_and_of_huge_scores() -> None:
    for scale in (1e-30, 1e30):
        scores = {"w": torch.tensor([[1.0, 1.0], [1.0, 3.0]]) * scale}
        assert Selection.topk(scores, k=2, granularity="row")["w"].positions.tolist() == [1]


def test_tensors_without_elements() -> None:
    assert not Index.full((5, 0)).mask().any()
    found = Selection.topk({"empty": torch.ones(5, 0), "w": torch.ones(2, 2)}, k=2, granularity="row")
    assert list(found) == ["w"]


def test_names_of_cross_attention_and_of_peft() -> None:
    shapes = {f"layer.EncDecAttention.{each}.weight": (4, 4) for each in "qkv"}
    assert sharing_inputs(shapes) == [[name] for name in shapes]
    shapes = {f"base_model.attn.{each}_proj.base_layer.weight": (4, 4) for each in "qkv"}
    assert sharing_inputs(shapes) == [list(shapes)]
