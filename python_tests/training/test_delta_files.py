"""Files of deltas: whatever is wrong with one is said, and a save that fails leaves the old one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltas import State, mixed, trained, zoo
from safetensors import safe_open
from safetensors.torch import save_file

from sparsekernels import Delta, Selection


def saved(folder: Path) -> Path:
    trained(mixed(zoo()))[0].save(folder / "d")
    return folder / "d"


def test_truncated(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or truncated"):
            Delta.load(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        Delta.load(tmp_path / "d")


def test_another_kind(tmp_path: Path) -> None:
    mixed(zoo()).save(tmp_path / "s")
    with pytest.raises(ValueError, match="holds selection, not a delta"):
        Delta.load(tmp_path / "s")
    with pytest.raises(ValueError, match="holds delta, not a selection"):
        Selection.load(saved(tmp_path))
    save_file({"w": torch.ones(2)}, tmp_path / "w")
    with pytest.raises(ValueError, match="not a delta"):
        Delta.load(tmp_path / "w")
    torch.save({"w": torch.ones(2)}, tmp_path / "p")
    with pytest.raises(ValueError, match="damaged"):
        Delta.load(tmp_path / "p")


@pytest.mark.parametrize("what", ["positions", "values", "missing", "metadata"])
def test_damaged_inside(what: str, tmp_path: Path) -> None:
    with safe_open(str(saved(tmp_path)), framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if what == "positions":
        tensors["up.weight.indices"] = tensors["up.weight.indices"].flip(0).contiguous()
    elif what == "values":
        tensors["up.weight.values"] = tensors["up.weight.values"][:-1].contiguous()
    elif what == "missing":
        del tensors["up.weight.values"]
    else:
        del metadata["tensors"]
    save_file(tensors, tmp_path / "d", metadata)
    with pytest.raises(ValueError, match=r"damaged|positions"):
        Delta.load(tmp_path / "d")


def test_a_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()

    def half(tensors: State, name: str, *_: object) -> None:
        Path(name).write_bytes(whole[:50])
        raise OSError("disk full")

    monkeypatch.setattr("sparsekernels.common.files.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        Delta({}).save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
