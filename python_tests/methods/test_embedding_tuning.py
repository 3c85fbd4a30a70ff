"""What KS-Lottery tunes and transfers: what trains, what must not move, the way back, and the certificate."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import scipy.stats
import torch
from models import batch, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Delta, Index, Selection
from sparsekernels.methods import ks_lottery
from sparsekernels.methods.ks_lottery import certificate, embed_tune, partial_transfer, partial_tune, predictions

NAME = "model.embed_tokens.weight"


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = transformer("llama")
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model.to(dtype)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    found = [batch("llama", seed=seed) for seed in range(count)]
    for b in found:
        b["labels"][:, :2] = -100
    return found


def state(model: nn.Module) -> dict[str, Any]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def changed(before: dict[str, Any], model: nn.Module) -> set[str]:
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


def rows(*chosen: int, name: str = NAME) -> Selection:
    shape = llama().get_parameter(NAME).shape
    return Selection({name: Index(torch.tensor(chosen), shape, granularity="row")})


def test_embed_tuning_is_adamw_on_the_table() -> None:
    model, twin = llama(), llama()
    tuned = embed_tune(model, batches(), lr=1e-3, epochs=2, progress=False)
    for p in twin.parameters():
        p.requires_grad_(p is twin.get_parameter(NAME))
    optimizer = torch.optim.AdamW([twin.get_parameter(NAME)], lr=1e-3, weight_decay=0)
    for _ in range(2):
        for b in batches():
            twin(**b).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.get_parameter(NAME), twin.get_parameter(NAME))
    assert changed(state(llama()), model) == {NAME}
    seen = torch.cat([b["input_ids"].flatten() for b in batches()]).unique()
    moved = (tuned.slots[NAME].values != tuned.slots[NAME].originals).any(1).nonzero().flatten()
    assert torch.equal(moved, seen[torch.isin(seen, moved)])
    assert len(moved) > 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tune_select_transfer_and_tune_again(tied: bool, dtype: torch.dtype) -> None:
    """The method as a whole; each stage gives the model back bit for bit."""
    model = llama(tied, dtype)
    model.eval()
    model.model.layers[0].train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    before = state(model)
    tuned = embed_tune(model, batches(), lr=0.05, epochs=2, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert changed(before, model) == ({NAME, "lm_head.weight"} if tied else {NAME})
    pvalues = ks_lottery.select(tuned).report["pvalues"]
    ticket = ks_lottery.select(tuned, alpha=min(0.5, float(pvalues.median())))  # a tied table moves in every row
    assert 0 < ticket.numel < before[NAME].numel()
    moved = model.get_parameter(NAME).detach().clone()
    delta = partial_transfer(tuned, ticket)
    tuned.restore()
    assert not changed(before, model)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}

    index = ticket[NAME].positions.long()
    with delta.apply(model):
        expected = before[NAME].clone()
        expected[index] = moved[index]
        assert torch.equal(model.get_parameter(NAME), expected)
    assert not changed(before, model)

    again = partial_tune(model, ticket, batches(), epochs=1, progress=False)
    left = torch.ones(len(expected), dtype=torch.bool)
    left[index] = False
    table = model.get_parameter(NAME)
    assert torch.equal(table[left], before[NAME][left])
    assert not torch.equal(table[index], before[NAME][index])
    again.restore()
    assert not changed(before, model)


def test_a_transfer_is_a_file_that_knows_its_base(tmp_path: Any) -> None:
    model = llama()
    tuned = embed_tune(model, batches(), lr=0.05, epochs=1, progress=False)
    values = tuned.slots[NAME].values.detach()[[1, 4]].clone()
    partial_transfer(tuned, rows(1, 4)).save(tmp_path / "ticket.safetensors")
    delta = Delta.load(tmp_path / "ticket.safetensors")
    assert torch.equal(delta.changes[NAME].values, values)
    with pytest.raises(ValueError, match="trains a selection"):
        delta.apply(model)
    delta.apply(tuned.restore())
    other = llama()
    with torch.no_grad():
        other.get_parameter(NAME)[4, 0] += 1
    with pytest.raises(ValueError, match="another base"):
        delta.apply(other)


def test_the_loss_may_be_ones_own_and_gradients_clipped() -> None:
    norms: list[float] = []

    def loss(net: nn.Module, b: Any) -> Tensor:
        assert net.training
        return 100 * net(input_ids=b["input_ids"]).logits.square().mean()

    class Spy(sk.SparseAdamW):
        def step(self, closure: Any = None) -> Any:
            norms.append(float(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm()))
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["sparsekernels.methods.ks_lottery.tuning"], "SparseAdamW", Spy)
        embed_tune(llama().eval(), batches(), loss=loss, epochs=1, max_grad_norm=0.01, progress=False)
        assert len(norms) == 3
        assert max(norms) == pytest.approx(0.01, rel=1e-3)
        embed_tune(llama(), batches(1), loss=loss, epochs=1, progress=False)
        assert norms[-1] > 0.02


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(batches())


class Once:
    """Can be gone through once, though it is no iterator."""

    def __init__(self) -> None:
        self.left = iter(batches())

    def __iter__(self) -> Any:
        return self.left


def test_batches_may_have_no_length_and_are_asked_for_once_an_epoch() -> None:
    steps = 0

    def loss(net: nn.Module, b: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return net(**b).loss

    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    embed_tune(llama(), stream, loss=loss, epochs=2, progress=False)
    assert steps == 6
    generator = torch.Generator()
    orders = []
    for epochs in (1, 2):
        order: list[int] = []

        def record(net: nn.Module, b: Any, order: list[int] = order) -> Tensor:
            order.append(int(b["number"]))
            return net(input_ids=b["input_ids"], labels=b["input_ids"]).loss

        numbered = [{"input_ids": batch("llama")["input_ids"][0], "number": torch.tensor(i)} for i in range(6)]
        loader = torch.utils.data.DataLoader(numbered, shuffle=True, generator=generator.manual_seed(0))
        embed_tune(llama(), loader, loss=record, epochs=epochs, progress=False)
        orders.append(order[:6])
    assert orders[0] == orders[1]


def test_bad_input_leaves_the_model_as_it_was() -> None:
    model = llama().eval()
    before = state(model)
    given = batches()
    unlabelled = [{k: x for k, x in b.items() if k != "labels"} for b in batches()]
    calls = 0

    def nan_later(net: nn.Module, b: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return net(**b).loss * (float("nan") if calls == 3 else 1)

    for run, message in [
        (lambda: embed_tune(model, [], progress=False), "batches is empty"),
        (lambda: embed_tune(model, iter(given), progress=False), "batches is an iterator"),
        (lambda: embed_tune(model, Once(), progress=False), "batches is empty a second time"),
        (lambda: embed_tune(model, given, loss=lambda net, b: None, progress=False), "scalar tensor.*got NoneType"),
        (lambda: embed_tune(model, given, loss=lambda net, b: net(**b).logits, progress=False), "got shape"),
        (
            lambda: embed_tune(model, given, loss=lambda net, b: torch.ones(()), progress=False),
            "depends on the trained",
        ),
        (lambda: embed_tune(model, given, epochs=0, progress=False), "epochs must be at least 1, got 0"),
        (lambda: embed_tune(model, given, lr=-1.0, progress=False), "learning rate"),
        (lambda: embed_tune(model, given, max_grad_norm=0.0, progress=False), "max_grad_norm must be above 0"),
        (lambda: embed_tune(model, given, embedding="lm_head.bias", progress=False), "embedding: 'lm_head.bias'"),
        (lambda: embed_tune(model, unlabelled, progress=False), "loss: the model returned none"),
        (lambda: embed_tune(model, given, loss=nan_later, progress=False), "loss is nan at step 2"),
        (lambda: partial_tune(model, Selection({}), given, progress=False), "selection is empty"),
        (lambda: partial_tune(model, rows(1, name="model.norm.weight"), given, progress=False), "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            run()
        assert not changed(before, model)
        assert not any(m.training for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        assert not any("_values" in name for name, _ in model.named_parameters())

    tuned = embed_tune(model, given, epochs=1, progress=False)
    elements = Selection({NAME: Index(torch.tensor([1]), model.get_parameter(NAME).shape)})
    for selection, message in [
        (elements, "selection must be rows of"),
        (Selection({}), "rows of one table, got 0 tensors"),
        (rows(1) | Selection({"lm_head.weight": elements[NAME]}), "rows of one table, got 2 tensors"),
        (rows(1, name="lm_head.weight"), "does not train every row"),
    ]:
        with pytest.raises(ValueError, match=message):
            partial_transfer(tuned, selection)
    tuned.restore()
    with pytest.raises(RuntimeError, match="this SparseModel is closed"):
        partial_transfer(tuned, rows(1))


def test_from_the_first_line_to_the_last_at_the_usual_rate() -> None:
    """Where a step of 2e-5 makes no row significant."""
    model, given = llama(), batches()
    before = state(model)
    tuned = embed_tune(model, given, progress=False)
    with pytest.warns(RuntimeWarning, match=r"has p < 0\.05.*The ticket is the 2 rows"):
        ticket = ks_lottery.select(tuned)
    assert (len(ticket[NAME]), ticket.report["significant"]) == (2, 0)
    reference = predictions(model, given)
    delta = partial_transfer(tuned, ticket)
    tuned.restore()
    assert not changed(before, model)
    with delta.apply(model):
        assert changed(before, model) == {NAME}
        assert certificate(predictions(model, given), reference).count == len(reference)
    partial_tune(model, ticket, given, progress=False)
    assert changed(before, model) == {NAME}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bert-mlm"])
def test_predictions_are_those_of_labelled_positions(kind: str) -> None:
    model = transformer(kind)
    given = [batch(kind, seed=seed) for seed in range(2)]
    if kind != "bert":
        for b in given:
            b["labels"][:, :3] = -100
            b["labels"][1, 5] = -100
    found = predictions(model, given)
    assert model.training
    expected = []
    model.eval()
    for b in given:
        logits = model(**b).logits
        for row, labels in zip(logits, b["labels"], strict=True):
            if kind == "bert":
                expected.append(int(row.argmax()))
                continue
            for t, label in enumerate(labels.tolist()):
                if label != -100:
                    expected.append(int(row[t if kind == "bert-mlm" else t - 1].argmax()))
    assert found.tolist() == expected
    with pytest.raises(ValueError, match="no labels to predict"):
        predictions(model, [])


def test_predictions_leave_out_what_has_no_label_and_refuse_what_is_no_class() -> None:
    model = transformer("llama")
    given = [batch("llama", seed=seed) for seed in range(2)]
    whole = predictions(model, given)
    size = len(whole) // 2
    given[0]["labels"][0] = -100
    given[0]["labels"][2] = -100
    assert torch.equal(predictions(model, given), torch.cat([whole[size // 3 : size // 3 * 2], whole[size:]]))
    given[0]["labels"][:] = -100
    assert torch.equal(predictions(model, given), whole[size:])
    assert torch.equal(predictions(model, given, shift=True), whole[size:])
    assert len(predictions(model, given, shift=False)) > size

    model.loss_function = lambda **_: torch.ones(())
    with pytest.raises(ValueError, match="pass shift"):
        predictions(model, given)
    unlabelled = {k: x for k, x in given[1].items() if k != "labels"}
    for bad, message in [
        ([given[1], unlabelled], "batch 1 has no integer labels"),
        ([{**given[1], "labels": torch.ones(3, 7)}], "batch 0 has no integer labels"),
        ([(given[1],)], "batch 0 must be a mapping"),
        ([given[0]], "no labels to predict"),
        ([{**given[1], "labels": torch.ones(3, dtype=torch.long)}], "not classes for logits"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictions(model, bad, shift=True)


def test_certificate() -> None:
    reference = torch.arange(200)
    predicted = reference.clone()
    predicted[:4] = -1
    found = certificate(predicted, reference)
    assert (found.agreement, found.count, found.bound) == (0.98, 200, 0.95)
    limits = scipy.stats.binomtest(196, 200, alternative="greater").proportion_ci(0.95, method="exact")
    assert found.lower == pytest.approx(limits.low, rel=1e-12)
    assert found.holds
    predicted[:12] = -1
    assert not certificate(predicted, reference).holds
    assert certificate(predicted, reference, alpha=0.2).holds
    assert certificate(-reference - 1, reference).lower == 0
    assert certificate(reference, reference).agreement == 1
    for bad in (reference[:-1], torch.empty(0)):
        with pytest.raises(ValueError, match="predictions at the same places"):
            certificate(bad, reference if len(bad) else bad)
    with pytest.raises(ValueError, match="alpha"):
        certificate(reference, reference, alpha=1)
