"""Damaged files: whatever is in one, a loader refuses it with a ValueError or gives something whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_same, snapshot
from deltas import mixed, trained, zoo
from models import Zoo
from mutating import MUTATIONS, mutate
from safetensors.torch import save_file
from torch import nn

from sparsekernels import Delta, Index, Selection
from sparsekernels.common.files import load_tensors
from sparsekernels.methods import laser
from sparsekernels.methods.laser import Reduction


@dataclass
class Kind:
    """A kind of file: how one is written, and how one is loaded and used on a model."""

    write: Callable[[Path], None]
    use: Callable[[Path, nn.Module], None]


def reductions(path: Path) -> None:
    plan = [Reduction("experts.weight[0]", 0.5, 3), Reduction("up.weight", 0.25, predicted=0.5)]
    with laser.reduce(zoo(), [*plan, Reduction("down.weight", 0.25, 4, True)]) as reduced:
        reduced.save(path)


def use_selection(path: Path, model: nn.Module) -> None:
    selection = Selection.load(path)
    for index in selection.values():
        assert Index(index.positions, index.shape, index.granularity, index.block) == index
    selection.save(path.with_name("again"))
    assert dict(Selection.load(path.with_name("again"))) == dict(selection)
    selection.check(model)


def use_delta(path: Path, model: nn.Module) -> None:
    delta = Delta.load(path)
    for change in delta.changes.values():
        assert change.values.shape == change.index.compact_shape
    delta.save(path.with_name("again"))
    assert dict(Delta.load(path.with_name("again")).selection) == dict(delta.selection)
    delta.apply(model).revert()


def use_reductions(path: Path, model: nn.Module) -> None:
    for factored in (True, False):
        with laser.load(model, path, factored=factored) as reduced:
            assert all(p.isfinite().all() for p in model.parameters())
            reduced.save(path.with_name("again"))
        laser.load(model, path.with_name("again"), factored=factored).revert()


KINDS = {
    "selection": Kind(lambda path: mixed(zoo()).save(path), use_selection),
    "delta": Kind(lambda path: trained(mixed(zoo()))[0].save(path), use_delta),
    "reductions": Kind(reductions, use_reductions),
}
KEYS = {"selection": "tensors", "delta": "tensors", "reductions": "reductions"}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_refused_or_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    KINDS[kind].write(path)
    whole = path.read_bytes()
    model, before, refused = zoo(), snapshot(zoo()), 0
    KINDS[kind].use(path, model)
    for number in range(MUTATIONS):
        seed = f"{kind} {number}"
        path.write_bytes(mutate(whole, seed))
        try:
            KINDS[kind].use(path, model)
        except ValueError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for mutate(whole, {seed!r})") from error
        assert_same(model, before)
    print(f"{kind}: {refused} of {MUTATIONS} refused")
    assert 0 < refused < MUTATIONS  # both happen, or the mutations are too hard or too soft


def rewritten(kind: str, path: Path, change: Callable[[Any, dict[str, torch.Tensor]], Any]) -> None:
    """A file of the kind with its description, and its tensors, changed."""
    KINDS[kind].write(path)
    tensors, metadata = load_tensors(path, kind)
    changed = change(json.loads(metadata[KEYS[kind]]), tensors)
    metadata[KEYS[kind]] = changed if isinstance(changed, str) else json.dumps(changed)
    save_file({name: x.clone() for name, x in tensors.items()}, path, metadata)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 5_000 + "]" * 5_000, "9" * 5_000, "", "1"])
def test_metadata_that_is_no_description(text: str, kind: str, tmp_path: Path) -> None:
    rewritten(kind, tmp_path / "f", lambda *_: text)
    with pytest.raises(ValueError, match=r"f is damaged: .*metadata"):
        KINDS[kind].use(tmp_path / "f", zoo())


def put(where: list[Any], value: Any) -> Callable[[Any, Any], Any]:
    def change(described: Any, _: Any) -> Any:
        holder = described
        for key in where[:-1]:
            holder = holder[key]
        holder[where[-1]] = value
        return described

    return change


def drop(name: str) -> Callable[[Any, Any], Any]:
    return lambda described, tensors: (tensors.pop(name), described)[1]


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], Any]:
    return lambda described, tensors: (tensors.update({name: change(tensors.get(name))}), described)[1]


BROKEN: list[tuple[str, Callable[[Any, Any], Any], str]] = [
    ("selection", put(["up.weight", "shape"], [-32, -16]), "fewer than 2.63 elements"),
    ("selection", put(["up.weight", "shape"], [2**40, 2**40]), "fewer than 2.63 elements"),
    ("selection", put(["up.weight", "shape"], [2**70]), "damaged"),
    ("selection", put(["up.weight", "shape"], [True, 512]), "unexpected bool in its metadata"),
    ("selection", put(["up.weight", "shape"], "ab"), "unexpected str in its metadata"),
    ("selection", put(["up.weight", "granularity"], 1), "unexpected int in its metadata"),
    ("selection", put(["up.weight", "granularity"], "diagonal"), "granularity must be"),
    ("selection", put(["up.weight", "block"], [4, 4]), "block is the shape of a unit"),
    ("selection", put(["up.weight", "block"], ["a"]), "unexpected str in its metadata"),
    ("selection", put(["up.weight"], None), "unexpected NoneType in its metadata"),
    ("selection", put(["up.weight", "more"], 1), r"'more', 'shape'\] instead of \['block', 'gran"),
    ("selection", lambda described, _: json.dumps(described)[:-1] + ', "up.weight": {}}', "a name occurs twice"),
    ("selection", drop("up.weight"), "lacks 'up.weight'"),
    ("selection", tensor("other", lambda _: torch.zeros(1)), "should not contain 'other'"),
    ("selection", tensor("up.weight", lambda x: x.float()), "int32 or int64"),
    ("selection", tensor("up.weight", lambda x: x + 500), r"must lie in \[0, 512\)"),
    ("delta", put(["up.weight", "base"], ""), "'' for the fingerprint"),
    ("delta", put(["up.weight", "base"], "other"), "'other' for the fingerprint"),
    ("delta", tensor("up.weight.values", lambda x: x.int()), r"torch.int32 \[52\] for the values"),
    ("reductions", put([0, "pieces"], 0), r"tensors for \[0, 1, 4\] pieces"),
    ("reductions", put([0, "pieces"], 10**18), "pieces"),
    ("reductions", put([0, "pieces"], 2), "should not contain '0.2"),
    ("reductions", put([0, "rho"], "0.5"), "unexpected str in its metadata"),
    ("reductions", put([0, "rho"], float("nan")), "rho must lie"),
    ("reductions", put([0, "blocks"], True), "unexpected bool in its metadata"),
    ("reductions", put([0], 7), "unexpected int in its metadata"),
    ("reductions", tensor("1.0.up", lambda x: x[0]), "do not fit each other"),
    ("reductions", tensor("1.0.up", lambda x: x.double()), "do not fit each other"),
    ("reductions", tensor("1.0.up", lambda x: x * float("nan")), "NaN or infinity"),
    ("reductions", tensor("0.0.rows", lambda x: x.float()), "not a permutation"),
    ("reductions", tensor("1.0.rows", lambda _: torch.zeros(1, dtype=torch.int64)), "not a permutation"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BROKEN)
def test_broken_descriptions_are_refused(kind: str, change: Any, message: str, tmp_path: Path) -> None:
    rewritten(kind, tmp_path / "f", change)
    model, before = zoo(), snapshot(zoo())
    with pytest.raises(ValueError, match=message):
        KINDS[kind].use(tmp_path / "f", model)
    assert_same(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_no_file(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        KINDS[kind].use(tmp_path, Zoo())


def test_a_zero_beside_a_size_that_no_tensor_has(tmp_path: Path) -> None:
    """The file is valid by its format; torch refuses such a shape with a TypeError."""
    header = {
        "__metadata__": {"sparsekernels": "selection", "tensors": "{}"},
        "a": {"dtype": "I32", "shape": [0, 2**63], "data_offsets": [0, 0]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="damaged"):
        Selection.load(tmp_path / "f")
