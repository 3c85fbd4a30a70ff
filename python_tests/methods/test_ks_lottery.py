"""KS-Lottery's choice of rows: against scipy row by row, its corrections, its baselines, and what it refuses."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import scipy.stats
import torch
from models import batch, ids, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection
from sparsekernels.methods import ks_lottery
from sparsekernels.methods.ks_lottery import by_frequency, by_shift

NAME = "embed.weight"
ROWS, WIDTH = 40, 300


def tables(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows 0 to 9 as they were, the others shifted more and more; p-values from 1 to 1e-30."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    after = before.clone()
    after[10:] += torch.linspace(0.02, 1, ROWS - 10)[:, None].to(dtype)
    return before, after


def expected(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    found = [
        scipy.stats.ks_2samp(x, y, method="exact")
        for x, y in zip(before.double().numpy(), after.double().numpy(), strict=True)
    ]
    return (
        torch.tensor([f.statistic for f in found], dtype=torch.float64),
        torch.tensor([f.pvalue for f in found], dtype=torch.float64),
    )


def rows(selection: Selection) -> list[int]:
    ((name, index),) = selection.items()
    assert name == NAME
    assert index.granularity == "row"
    return index.positions.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("correction", [None, "bonferroni", "bh"])
@pytest.mark.parametrize("alpha", [0.05, 1e-6])
def test_equals_scipy_row_by_row(dtype: torch.dtype, correction: Any, alpha: float) -> None:
    before, after = tables(dtype)
    statistics, pvalues = expected(before, after)
    ticket = ks_lottery.select(before, after, alpha, correction, name=NAME)
    torch.testing.assert_close(ticket.report["statistics"], statistics, rtol=1e-12, atol=0)
    torch.testing.assert_close(ticket.report["pvalues"], pvalues, rtol=1e-12, atol=0)
    adjusted = pvalues
    if correction == "bonferroni":
        adjusted = (pvalues * ROWS).clamp(max=1)
    elif correction == "bh":  # the smallest, over the ranks from here on, of p * V / rank
        order = pvalues.argsort()
        scaled = pvalues[order] * ROWS / torch.arange(1, ROWS + 1)
        adjusted = pvalues.clone()
        adjusted[order] = torch.tensor([float(scaled[i:].min()) for i in range(ROWS)], dtype=torch.float64).clamp(max=1)
    assert ("adjusted" in ticket.report) == (correction is not None)
    if correction:
        torch.testing.assert_close(ticket.report["adjusted"], adjusted, rtol=1e-12, atol=0)
    assert rows(ticket) == (adjusted < alpha).nonzero().reshape(-1).tolist()
    assert 0 < len(rows(ticket)) < ROWS - 10


def test_rows_that_stayed_have_p_one() -> None:
    before, after = tables()
    after[3] = before[3].flip(0)
    ticket = ks_lottery.select(before, after, name=NAME)
    assert ticket.report["pvalues"][:10].eq(1).all()
    assert ticket.report["statistics"][:10].eq(0).all()


def test_no_row_is_an_empty_selection() -> None:
    before, _ = tables()
    with pytest.warns(RuntimeWarning, match="No row changed; the ticket is empty"):
        ticket = ks_lottery.select(before, before.clone(), name=NAME)
    assert len(ticket) == 0
    assert len(ticket.report["pvalues"]) == ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("correction", [None, "bonferroni", "bh"])
def test_where_no_row_is_significant_the_ticket_goes_by_size(correction: Any, dtype: torch.dtype) -> None:
    """The rows of smallest p; of those that share one, as most do, the ones that moved further; none that stayed."""
    before = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    after = before.to(torch.float32, copy=True)
    after[30:] += 0.01 * torch.arange(1, 21)[:, None] % 0.07
    after[7] = before[7].float().flip(0)
    statistics, pvalues = expected(before.float(), after)
    distance = (after - before.float()).norm(dim=1)
    order = sorted(range(50), key=lambda row: (-float(statistics[row]), -float(distance[row]), row))
    assert len(set(pvalues.tolist())) < 10
    for density in (0.02, 0.1, 0.3, 1.0):
        with pytest.warns(RuntimeWarning, match=r"none of 50 rows of 'embed\.weight' has p < 1e-09") as said:
            ticket = ks_lottery.select(before, after, 1e-9, correction, fallback_density=density, name=NAME)
        moved = [row for row in order[: min(int(density * 50) + 1, 50)] if statistics[row] > 0]
        assert rows(ticket) == sorted(moved)
        assert ticket.report["significant"] == 0
        assert torch.equal(ticket.report["pvalues"], ks_lottery.select(before, after, name=NAME).report["pvalues"])
        assert said[0].filename == __file__
    assert len(moved) == int((statistics > 0).sum()) < 20


def test_the_papers_rule_by_itself() -> None:
    """Without a fallback the ticket is what is significant, nothing else; with one too, where anything is."""
    before, after = tables()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = ks_lottery.select(before, after, 1e-60, fallback_density=0, name=NAME)
        assert len(empty) == empty.report["significant"] == 0
        few = ks_lottery.select(before, after, 1e-20, fallback_density=1.0, name=NAME)
    assert 0 < len(rows(few)) == few.report["significant"] < 10
    assert rows(few) == (few.report["pvalues"] < 1e-20).nonzero().reshape(-1).tolist()


def test_a_bf16_table_is_compared_with_fp32_values() -> None:
    """A step far below the resolution of bf16, as embedding tuning takes it, is seen."""
    before = torch.ones(3, WIDTH, dtype=torch.bfloat16)
    after = before.float()
    after[1] += 2e-5
    assert torch.equal(after.bfloat16(), before)
    assert rows(ks_lottery.select(before, after, name=NAME)) == [1]
    assert rows(by_shift(before, after, k=1, name=NAME)) == [1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-mlm"])
def test_models_and_sparse_models_give_name_and_tables(kind: str) -> None:
    base, model = transformer(kind), transformer(kind)
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    before = base.get_parameter(name).detach()
    tuned = sk.train_only(model, Selection({name: Index.full(before.shape)}))
    with torch.no_grad():
        next(iter(tuned.parameters()))[[2, 5]] += 3.0
    tuned.sync_()
    found = [
        ks_lottery.select(tuned),
        ks_lottery.select(base, tuned),
        ks_lottery.select(model, tuned),  # not the weights that are in the model now, but those it came with
        ks_lottery.select(tuned, model),
        ks_lottery.select(before, tuned),
        ks_lottery.select(model.get_parameter(name), tuned),  # nor these, which are the same memory
        ks_lottery.select(model.state_dict()[name], tuned),
        ks_lottery.select(tuned, model.get_input_embeddings().weight),
        ks_lottery.select(base, model),
        ks_lottery.select(before, model.get_parameter(name), name=name),
    ]
    for ticket in found:
        assert ticket[name].positions.tolist() == [2, 5]
        assert torch.equal(ticket.report["pvalues"], found[0].report["pvalues"])
    assert by_shift(tuned, k=2)[name] == found[0][name]


def test_wide_rows_are_tested_exactly_too() -> None:
    before = torch.randn(2, 10_001, generator=torch.Generator().manual_seed(0))
    after = before + torch.tensor([[0.05], [0.3]])
    found = ks_lottery.select(before, after, name=NAME).report["pvalues"]
    torch.testing.assert_close(found, expected(before, after)[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_under_a_name_of_its_own(dtype: torch.dtype) -> None:
    """Whatever table the SparseModel trains, and whether the model knows it as its input embedding or not."""
    model = Plain().to(dtype)
    tuned = sk.train_only(model, Selection({NAME: Index.full(model.embed.weight.shape)}))
    with torch.no_grad():
        next(iter(tuned.parameters()))[3] += 9.0
    assert (
        rows(ks_lottery.select(tuned))
        == rows(ks_lottery.select(model.embed.weight, tuned))
        == rows(by_shift(tuned, k=1))
        == [3]
    )
    tied = transformer("llama")
    tuned = sk.train_only(tied, Selection({"lm_head.weight": Index.full(tied.lm_head.weight.shape)}))
    assert tuple(by_shift(tuned, k=1)) == ("lm_head.weight",)
    assert by_shift(tuned, k=1, name="model.embed_tokens.weight").numel == tied.lm_head.weight.shape[1]


def test_by_shift_takes_the_furthest_rows_ties_to_the_lower() -> None:
    before = torch.zeros(6, 4)
    after = torch.tensor([0.0, 2.0, 1.0, -2.0, 2.0, 0.5])[:, None].expand(6, 4).contiguous()
    selection = by_shift(before, after, k=2, name=NAME)
    assert rows(selection) == [1, 3]
    assert selection.report["shifts"].tolist() == [0, 4, 2, 4, 4, 1]
    assert rows(by_shift(before, after, k=6, name=NAME)) == list(range(6))


def test_large_tables_are_worked_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = tables()
    whole, shifted = ks_lottery.select(before, after, name=NAME), by_shift(before, after, k=7, name=NAME)
    monkeypatch.setattr(sys.modules["sparsekernels.methods.ks_lottery.selecting"], "CHUNK", 3 * WIDTH + 1)
    parts = ks_lottery.select(before, after, name=NAME)
    assert torch.equal(parts.report["pvalues"], whole.report["pvalues"])
    assert rows(parts) == rows(whole)
    assert rows(by_shift(before, after, k=7, name=NAME)) == rows(shifted)


def test_by_frequency_counts_what_is_not_masked() -> None:
    model = transformer("llama")
    batches = [batch("llama", seed=seed) for seed in range(3)]
    for b in batches:
        b["attention_mask"][0, 2:] = 0
    selection = by_frequency(model, batches, k=4)
    ((name, index),) = selection.items()
    assert model.get_parameter(name) is model.get_input_embeddings().weight
    counts = [0] * index.shape[0]
    for b in batches:
        for token, real in zip(b["input_ids"].flatten().tolist(), b["attention_mask"].flatten().tolist(), strict=True):
            counts[token] += real
    assert selection.report["counts"].tolist() == counts
    assert index.positions.tolist() == sorted(sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:4])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)


def test_bad_input_is_refused() -> None:
    before, after = tables()
    broken = after.clone()
    broken[17, 5] = torch.nan
    for arguments, more, message in [
        ((before, after, 0.0), {}, r"alpha must lie in \(0, 1\), got 0.0"),
        ((before, after, 1.0), {}, "alpha must lie"),
        ((before, after, 0.05, "holm"), {}, "correction must be None"),
        ((before, after), {"fallback_density": 1.5}, r"fallback_density must lie in \[0, 1\], got 1.5"),
        ((before, after), {"fallback_density": -0.1}, r"fallback_density must lie in \[0, 1\], got -0.1"),
        ((before,), {}, "after is missing"),
        ((before, after[:-1]), {}, "must share shape"),
        ((before, before), {}, "are the same memory"),
        ((before[0], after[0]), {}, r"before must be a floating-point table"),
        ((before, after.long()), {}, r"after must be a floating-point table"),
        ((before, broken), {}, "has NaN in row 17"),
        ((before, after), {"name": None}, "name is missing"),
        ((before[:0], after[:0]), {}, "that is not empty"),
        ((before[:, :0], after[:, :0]), {}, "that is not empty"),
        ((Plain(), Plain()), {"name": None}, "name: the model has no get_input_embeddings"),
        ((Plain(), Plain()), {"name": "embed.bias"}, "not a two-dimensional parameter"),
    ]:
        with pytest.raises(ValueError, match=message):
            ks_lottery.select(*arguments, **{"name": NAME, **more})
    for k in (0, ROWS + 1, 1.5):
        with pytest.raises(ValueError, match=rf"k must be an integer in \[1, {ROWS}\], got {k}"):
            by_shift(before, after, k=k, name=NAME)
    with pytest.raises(ValueError, match="has NaN in row 17"):
        by_shift(before, broken, k=1, name=NAME)
    model = transformer("llama")
    for wrong, message in [
        ([batch("llama"), {"labels": ids(2)}], "batch 1 has no integer tensor input_ids"),
        ([{"input_ids": torch.ones(2, 3)}], "batch 0 has no integer tensor input_ids"),
        ([{"input_ids": ids(1, 3), "attention_mask": [[1, 1, 0]]}], "attention_mask of batch 0"),
        ([{"input_ids": ids(1, 3), "attention_mask": torch.ones(1, 2)}], "attention_mask of batch 0"),
        ([], "no tokens"),
        ([{"input_ids": ids(1, 3), "attention_mask": torch.zeros(1, 3)}], "no tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            by_frequency(model, wrong, k=1)
    with pytest.raises(ValueError, match="batch 0 has ids outside"):
        by_frequency(model, [{"input_ids": torch.tensor([[0, 10_000]])}], k=1)


def test_a_sparse_model_must_train_every_row() -> None:
    model = transformer("llama")
    name = "model.embed_tokens.weight"
    shape = model.get_parameter(name).shape
    with (
        sk.train_only(model, Selection({name: Index(torch.tensor([1, 2]), shape, granularity="row")})) as tuned,
        pytest.raises(ValueError, match=f"does not train every row of '{name}'"),
    ):
        ks_lottery.select(tuned)
    with pytest.raises(RuntimeError, match="this SparseModel is closed"):
        ks_lottery.select(tuned)
