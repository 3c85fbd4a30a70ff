"""LASER: files, and what must leave the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import assert_same, best, snapshot
from models import Shared, Zoo, batch, transformer, wide_bert
from torch import nn

import sparsekernels as sk
from sparsekernels.methods import laser
from sparsekernels.methods.laser import Reduction, changes
from sparsekernels.structure.matrices import matrices


def test_save_and_load(tmp_path: Path) -> None:
    model = transformer("gpt2").to(torch.bfloat16)
    labels = list(matrices(model))
    plan = [Reduction(labels[0], 0.3, predicted=1.5), Reduction(labels[4], 0.2, 3, True), Reduction(labels[6], 0.0)]
    before = snapshot(model)
    with laser.reduce(model, plan) as reduced:
        reduced.save(tmp_path / "plan.safetensors")
        expected = snapshot(model)
    for factored in (True, False):
        with laser.load(model, tmp_path / "plan.safetensors", factored=factored) as loaded:
            assert loaded.plan == plan
            assert loaded.plan[0].predicted == 1.5
            if factored:
                assert_same(model, expected)
        assert_same(model, before)
    with pytest.raises(ValueError, match=r"nothing matches .*c_attn"):
        laser.load(transformer("bert"), tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match="holds reductions, not a delta"):
        sk.Delta.load(tmp_path / "plan.safetensors")
    with pytest.raises(FileNotFoundError):
        laser.load(model, tmp_path / "none")
    (tmp_path / "half").write_bytes((tmp_path / "plan.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        laser.load(model, tmp_path / "half")
    assert_same(model, before)


@pytest.mark.parametrize("broken", ["ranks", "rows", "swapped", "missing"])
def test_files_that_contradict_themselves_are_refused(broken: str, tmp_path: Path) -> None:
    from sparsekernels.common.files import load_tensors, save_tensors

    model = Zoo()
    with laser.reduce(model, [Reduction("experts.weight[0]", 0.5, 3), Reduction("up.weight", 0.5)]) as reduced:
        reduced.save(tmp_path / "file")
    before = snapshot(model)
    tensors, metadata = load_tensors(tmp_path / "file", "reductions")
    if broken == "ranks":
        tensors["1.0.down"] = tensors["1.0.down"][:-1]
    elif broken == "rows":
        tensors["0.1.rows"] = tensors["0.2.rows"]
    elif broken == "swapped":
        tensors["0.0.rows"], tensors["0.1.rows"] = tensors["0.1.rows"], tensors["0.0.rows"]
    else:
        del tensors["1.0.up"]
    save_tensors(tmp_path / "file", tensors, metadata)
    with pytest.raises(ValueError, match="is damaged"):
        laser.load(model, tmp_path / "file")
    assert_same(model, before)


def test_load_refuses_another_shape(tmp_path: Path) -> None:
    with laser.reduce(nn.Sequential(nn.Linear(8, 6)), [Reduction("0.weight", 0.5)]) as reduced:
        reduced.save(tmp_path / "plan")
    with pytest.raises(ValueError, match=r"holds \[6, 8\] for '0.weight', which is \[8, 8\]"):
        laser.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "plan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Reduction("up.weight", 1.5)], r"rho must lie in \[0, 1\], got 1.5 for 'up.weight'"),
        (lambda: [Reduction("up.weight", 0.5, 0)], "blocks must be at least 1"),
        (lambda: [Reduction("up.weight", 0.5, 1, True)], "blocks must be at least 2 to cluster"),
        (lambda: [Reduction("up.weight", 0.5, 33)], "blocks: 'up.weight' has 32 rows"),
        (lambda: [Reduction("none", 0.5)], "nothing matches 'none'"),
        (lambda: [Reduction("up.weight", 0.5), Reduction("up.weight", 0.2)], "reduces 'up.weight' twice"),
        (
            lambda: [Reduction("experts.weight", 0.5)],
            r"is not the label of a matrix; it matches 'experts.weight\[0\]'",
        ),
    ],
)
def test_bad_plans_change_nothing(make, message: str) -> None:
    model = Zoo()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        laser.reduce(model, [Reduction("down.weight", 0.5), *make()])
    assert_same(model, before)


def test_broken_weights_are_named_and_nothing_changes() -> None:
    model = Zoo()
    with torch.no_grad():
        model.up.weight[3, 3] = float("inf")
    before = snapshot(model)
    plan = [Reduction("down.weight", 0.5), Reduction("up.weight", 0.5)]
    with pytest.raises(ValueError, match=r"'up.weight' has NaN or infinity"):
        laser.reduce(model, plan)
    assert_same(model, before)
    with torch.no_grad():
        model.up.weight[3, 3] = 0
    laser.reduce(model, plan).revert()


def test_a_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Zoo()
    before = snapshot(model)
    product = changes.product

    def failing(matrix, mine):
        if matrix.parameter == "embed.weight":
            raise MemoryError
        return product(matrix, mine)

    monkeypatch.setattr(changes, "product", failing)
    with pytest.raises(MemoryError):
        laser.reduce(model, [Reduction(f"{name}.weight", 0.2) for name in ("up", "conv", "embed")])
    assert_same(model, before)
    monkeypatch.setattr(changes, "product", lambda matrix, mine: product(matrix, mine) if matrix.expert == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        laser.reduce(model, [Reduction(f"experts.weight[{i}]", 0.2) for i in range(2)])
    assert_same(model, before)


def test_train_only_models_are_refused() -> None:
    model = Zoo()
    with sk.train_only(model, sk.Selection({"head.bias": sk.Index(torch.tensor([0]), (5,))})):
        with pytest.raises(ValueError, match="trains a selection"):
            laser.reduce(model, [Reduction("up.weight", 0.5)])
        with pytest.raises(ValueError, match="trains a selection"):
            laser.search(model, lambda m: 1 / 0, names=["up.weight"], progress=False)  # refused before it is called


def test_tied_weights_are_named_by_their_label() -> None:
    with pytest.raises(ValueError, match=r"'b.weight' is not the label of a matrix; it matches 'a.weight'"):
        laser.reduce(Shared(), [Reduction("b.weight", 0.5)])


def test_autocast_around_it_changes_nothing() -> None:
    """Decomposed and multiplied in fp32, whatever is around."""
    model, plan = wide_bert(), []
    for name in ("intermediate.dense", "output.dense"):
        plan += [Reduction(f"bert.encoder.layer.{i}.{name}.weight", 0.1, 1 + 2 * i, bool(i)) for i in range(2)]
    with laser.reduce(model, plan, factored=False):
        expected = snapshot(model)
    with torch.autocast("cpu", torch.bfloat16), laser.reduce(model, plan, factored=False):
        assert_same(model, expected)


def test_decompositions_of_a_model_that_moved_are_made_anew() -> None:
    model, batches = transformer("bert"), [batch("bert")]
    ranking = laser.rank(model, batches, progress=False)
    model.double()
    again = laser.rank(model, batches, decompositions=ranking.decompositions, progress=False)
    assert again.loss == pytest.approx(ranking.loss)
    plan = again.best()[:1]
    label = plan[0].matrix
    weight = model.get_parameter(label).detach().clone()
    with laser.reduce(model, plan, factored=False, decompositions=ranking.decompositions):
        expected = best(weight, int(plan[0].rho * min(weight.shape)))
        torch.testing.assert_close(model.get_parameter(label).detach(), expected, rtol=0, atol=1e-12)
