"""Index and Selection: validation, set algebra against Python sets, ways to make, save and read one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers.drawing import indices
from hypothesis import given
from hypothesis import strategies as st
from models import Zoo
from samples.case import put
from torch import Tensor

from sparsekernels import Index, Selection

SHAPE = (6, 5)


def positions(*entries: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(entries, dtype=dtype)


def elements_of(index: Index) -> set[int]:
    """By plain indexing, apart from the package."""
    dense = put(torch.zeros(index.shape), index, torch.ones(index.compact_shape))
    found = dense.reshape(-1).nonzero().reshape(-1).tolist()
    assert index.to_elements().positions.tolist() == found
    assert torch.equal(index.mask(), dense.bool())
    assert index.numel == len(found)
    return set(found)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([0, 30], ("[0, 30)", "30")),
        ([-1, 3], ("[0, 30)", "-1")),
        ([3, 3], ("3", "entry 1", "duplicated")),
        ([1, 4, 4, 9], ("4", "entry 2", "duplicated")),
        ([5, 2], ("2", "entry 1", "not sorted")),
        ([1, 2, 9, 8], ("8", "entry 3", "not sorted")),
        ([2**31 - 1], ("[0, 30)", str(2**31 - 1))),
        ([2_000_000_000, -2_000_000_000], ("not sorted",)),  # their difference wraps around in int32
    ],
)
def test_bad_positions_are_named(entries: list[int], words: tuple[str, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="positions") as caught:
        Index(positions(*entries, dtype=dtype), SHAPE)
    for word in words:
        assert word in str(caught.value)


def test_positions_that_wrap_around_in_int64() -> None:
    with pytest.raises(ValueError, match="not sorted"):
        Index(positions(2**63 - 1, -(2**63)), SHAPE)


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match=r"\[0, 6\), got row 6"):
        Index(positions(2, 6), SHAPE, granularity="row")
    with pytest.raises(ValueError, match=r"of shape \(\) has no rows"):
        Index(positions(0), (), granularity="row")


@pytest.mark.parametrize(
    "bad", [torch.zeros(2), torch.ones(2, dtype=torch.bool), [0, 1], torch.zeros(2, dtype=torch.int16)]
)
def test_positions_of_another_kind(bad: object) -> None:
    with pytest.raises(TypeError, match="int32 or int64"):
        Index(bad, SHAPE)  # type: ignore[arg-type]


def test_positions_of_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"one dimension, got shape \[1, 2\]"):
        Index(positions(0, 1)[None], SHAPE)


def test_facts_of_an_index() -> None:
    rows = Index(positions(1, 4), (6, 5, 2), granularity="row")
    assert (len(rows), rows.numel, rows.elements_per_position, rows.compact_shape) == (2, 4, 2, (2, 2))
    assert elements_of(rows) == {2, 3, 8, 9}
    elements = Index(positions(1, 4), (6, 5, 2))
    assert (len(elements), elements.numel, elements.elements_per_position, elements.compact_shape) == (2, 2, 1, (2,))
    assert elements.to_elements() is elements
    assert Index.full(SHAPE).granularity == "row"
    assert Index.full(SHAPE).numel == 30
    assert Index.full(()).numel == 1
    assert "2 rows of [6, 5, 2]" in repr(rows)


def test_positions_are_int32_where_every_offset_fits() -> None:
    assert Index(positions(0, 3), SHAPE).positions.dtype == torch.int32
    assert Index(positions(0, 2**31 - 2), (2**31 - 1,)).positions.dtype == torch.int32
    assert Index(positions(0, 2**31), (2**31 + 1,)).positions.tolist() == [0, 2**31]
    assert Index(positions(0, 3), (4, 2**33), granularity="row").positions.dtype == torch.int32
    far = Index(positions(0, 2**33), (2**40,))
    assert far.positions.dtype == torch.int64
    assert far.positions.tolist() == [0, 2**33]


def test_index_does_not_follow_its_source() -> None:
    """An Index never changes, so it holds positions of its own, or the caller could make it invalid."""
    source = positions(1, 2, dtype=torch.int32)
    index = Index(source, SHAPE)
    source[0] = 99
    assert index.positions.tolist() == [1, 2]


def test_equality() -> None:
    assert Index(positions(1, 2), SHAPE) == Index(positions(1, 2, dtype=torch.int32), SHAPE)
    for other in (
        Index(positions(1, 3), SHAPE),
        Index(positions(1, 2), SHAPE, granularity="row"),
        Index(positions(1, 2), (30,)),
    ):
        assert Index(positions(1, 2), SHAPE) != other
    assert Index(positions(1, 2), SHAPE) != "index"


def test_from_mask() -> None:
    mask = torch.rand(SHAPE) < 0.4
    assert torch.equal(Index.from_mask(mask).positions.long(), mask.flatten().nonzero().flatten())
    assert Index.from_mask(mask.T.contiguous().T) == Index.from_mask(mask)  # strides do not matter
    with pytest.raises(TypeError, match="bool"):
        Index.from_mask(mask.long())
    found = Selection.from_masks({"a": mask, "none": torch.zeros(3, dtype=torch.bool)})
    assert list(found) == ["a"]


selections = st.dictionaries(st.sampled_from("abc"), indices(SHAPE)).map(Selection)


def as_set(selection: Selection) -> set[tuple[str, int]]:
    return {(name, element) for name, index in selection.items() for element in elements_of(index)}


@given(selections, selections)
def test_set_algebra(a: Selection, b: Selection) -> None:
    for ours, theirs in (
        (a | b, as_set(a) | as_set(b)),
        (a & b, as_set(a) & as_set(b)),
        (a - b, as_set(a) - as_set(b)),
    ):
        assert as_set(ours) == theirs
        assert ours.numel == len(theirs)
        for name, index in ours.items():
            assert (
                Index(index.positions, index.shape, index.granularity, index.block) == index
            )  # sorted, unique and inside, still
            assert index.positions.dtype == torch.int32
            if name in a and name in b:
                assert len(index), "a parameter whose set becomes empty is left out"
                assert index.granularity == (a[name].granularity if a[name].same_units(b[name]) else "element")


@given(selections)
def test_laws(a: Selection) -> None:
    nothing = Selection({})
    assert (
        as_set(a | nothing) == as_set(nothing | a) == as_set(a - nothing) == as_set(a & a) == as_set(a | a) == as_set(a)
    )
    assert len(a - a) == len(a & nothing) == len(nothing - a) == 0


def test_algebra_of_other_shapes() -> None:
    a, b = Selection({"w": Index.full((2, 3))}), Selection({"w": Index.full((3, 2))})
    for combine in (Selection.__or__, Selection.__and__, Selection.__sub__):
        with pytest.raises(ValueError, match=r"'w' has shape \[2, 3\] on the left, \[3, 2\] on the right"):
            combine(a, b)


def test_selection_is_a_mapping_of_indices() -> None:
    selection = Selection({"w": Index.full(SHAPE), "v": Index(positions(1), (4,))})
    assert list(selection) == ["w", "v"]
    assert len(selection) == 2
    assert selection.numel == 31
    assert dict(selection)["v"] == Index(positions(1), (4,))
    assert "w" in selection.summary()
    assert "31" in selection.summary()
    with pytest.raises(TypeError, match=r"selection\['w'\] must be an Index, got Tensor"):
        Selection({"w": positions(1)})  # type: ignore[dict-item]


@given(selections)
def test_copies(a: Selection) -> None:
    for again in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a), a.to("cpu")):
        assert dict(again) == dict(a)


def test_index_survives_torch_save_with_weights_only(tmp_path: Path) -> None:
    index = Index(positions(1, 2), SHAPE, granularity="row")
    torch.save({"indices": [index]}, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["indices"] == [index]


def mixed() -> Selection:
    far = Index(positions(5, 2**32), (2**33,))
    return Selection(
        {"a.weight": Index(positions(1, 7), SHAPE), "b": Index.full((3,)), "far": far, "none": Index(positions(), (2,))}
    )


def test_save_and_load(tmp_path: Path) -> None:
    mixed().save(tmp_path / "s.safetensors")
    again = Selection.load(tmp_path / "s.safetensors")
    assert dict(again) == dict(mixed())
    assert list(again) == list(mixed())
    assert again["far"].positions.dtype == torch.int64


def test_save_one_index_under_two_names(tmp_path: Path) -> None:
    """The same rows of every layer: one Index, used many times."""
    shared = Index(positions(1, 2), SHAPE)
    Selection({"a": shared, "b": shared}).save(tmp_path / "s")
    assert Selection.load(tmp_path / "s")["b"] == shared


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError, match="no file"):
        Selection.load(path)
    mixed().save(path)
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or truncated"):
            Selection.load(path)


def test_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    mixed().save(path)
    whole = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sparsekernels.common.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Selection({"a": Index.full((2,))}).save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_does_not_fit_the_model() -> None:
    model = Zoo()
    with pytest.raises(ValueError, match=r"lacks: nowhere\.weight"):
        Selection({"nowhere.weight": Index.full((2, 2))}).check(model)
    with pytest.raises(
        ValueError, match=r"'up\.weight'\] was made for shape \[16, 32\], the model's parameter has \[32, 16\]"
    ):
        Selection({"up.weight": Index.full((16, 32))}).check(model)


def test_param_groups() -> None:
    model = Zoo()
    selection = Selection({"up.weight": Index(positions(3), (32, 16)), "norm.bias": Index.full((16,))})
    (group,) = selection.param_groups(model)
    assert [id(p) for p in group["params"]] == [id(model.up.weight), id(model.norm.bias)]
    assert group["indices"] == [selection["up.weight"], selection["norm.bias"]]
