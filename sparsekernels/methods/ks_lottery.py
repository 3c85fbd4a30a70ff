"""KS-Lottery: train the embedding rows whose distribution a tuning changes (Yuan et al., arXiv 2402.02801)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..names import embedding_weight
from ..ops import ks_2samp, topk
from ..selection import Index, Selection
from ..sparsify import SparseModel

Correction = Literal["bh", "bonferroni"]
CHUNK = 1 << 24  # elements of a table that exist in fp32 at a time


class Tables(NamedTuple):
    """One embedding table in two states, each [V, D], and the name of its parameter."""

    name: str
    before: Tensor
    after: Tensor


def ks_lottery(
    before: Tensor | nn.Module | SparseModel,
    after: Tensor | nn.Module | SparseModel | None = None,
    alpha: float = 0.05,
    correction: Correction | None = None,
    *,
    name: str | None = None,
) -> Selection:
    """Select the rows of an embedding table that a two-sample Kolmogorov-Smirnov test tells from what they were.

    For each row: the D numbers before and the D numbers after are two samples; the test is two-sided and exact. The
    winning ticket is the rows with p < alpha.

    Args:
        before: the table before tuning, [V, D]; a model, whose input embedding is meant; or the SparseModel that
            `embed_tune` returns, which holds both states: then leave `after` out.
        after: the table after tuning, the same three ways; of a SparseModel its fp32 values, before they are rounded.
        alpha: rows with a p-value below it are selected, in (0, 1).
        correction: how p-values are adjusted for the V tests made at once: "bonferroni", "bh" (Benjamini-Hochberg), or
            None, as in the paper: then alpha * V rows would be selected by chance, were the samples independent.
        name: the parameter that the Selection names. Needed where both tables are tensors; elsewhere the default is the
            model's input embedding.

    Returns:
        Selection of rows, empty if there are none. `.report` holds "pvalues" and "statistics", float64 [V] on the CPU,
        and "adjusted" under a correction.

    A row that was not trained, or only permuted, has statistic 0 and p-value 1. The test compares distributions, not
    positions: see `by_shift` for those.

    Raises:
        ValueError: alpha or correction is none of the above, tables that do not fit each other, NaN (the row is named).

    Cost: one pass over both tables, and what `sparsekernels.ops.ks_2samp` costs.

    Source: the paper for test and alpha. Ours: corrections, through scipy.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if correction not in (None, "bh", "bonferroni"):
        raise ValueError(f'correction must be None, "bh" or "bonferroni", got {correction!r}')
    tables = tables_of(before, after, name)
    rows, width = tables.before.shape
    pvalues, statistics = [], []
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows, step):
        x, y = (table[start : start + step].to(_common(tables)) for table in (tables.before, tables.after))
        found = ks_2samp(x, y)
        pvalues.append(found.pvalue.cpu())
        statistics.append(found.statistic.cpu())
    p = torch.cat(pvalues)
    if bool(p.isnan().any()):
        raise ValueError(f"{tables.name!r} has NaN in row {int(p.isnan().nonzero()[0])}, before or after")
    report: dict[str, Any] = {"pvalues": p, "statistics": torch.cat(statistics)}
    if correction == "bonferroni":
        p = report["adjusted"] = (p * rows).clamp_max(1)
    elif correction == "bh":
        from scipy.stats import false_discovery_control

        p = report["adjusted"] = torch.from_numpy(false_discovery_control(p.numpy(), method="bh"))
    return _selection(tables.name, (p < alpha).nonzero().reshape(-1), tables.before.shape, report)


def by_shift(
    before: Tensor | nn.Module | SparseModel,
    after: Tensor | nn.Module | SparseModel | None = None,
    *,
    k: int,
    name: str | None = None,
) -> Selection:
    """Select the k rows of an embedding table that moved furthest, by L2 norm: a baseline beside `ks_lottery`.

    Args, and the errors they raise, are those of `ks_lottery`; k is between 1 and V. Ties go to the lower row.

    Returns:
        Selection of k rows. `.report["shifts"]`: fp32 (fp64 for fp64) [V] on the CPU.
    """
    tables = tables_of(before, after, name)
    step = max(1, CHUNK // max(1, tables.before.shape[1]))
    wide = torch.promote_types(_common(tables), torch.float32)
    shifts = torch.cat(
        [
            (y.to(wide) - x.to(wide)).norm(dim=1)
            for x, y in zip(tables.before.split(step), tables.after.split(step), strict=True)
        ]
    ).cpu()
    return _selection(tables.name, _largest(shifts, k), tables.before.shape, {"shifts": shifts})


def by_frequency(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, k: int, embedding: str | None = None
) -> Selection:
    """Select the k rows of the input embedding whose tokens are the most frequent: a baseline beside `ks_lottery`.

    Args:
        model: gives name and shape of the table.
        batches: mappings with "input_ids" and, where there is padding, "attention_mask".
        k: between 1 and V. Ties go to the lower row.
        embedding: name of the table; default: the model's input embedding.

    Returns:
        Selection of k rows. `.report["counts"]`: int64 [V] on the CPU.

    Raises:
        ValueError: k out of range, a batch without input_ids, or ids that the table does not have.
    """
    name = embedding_weight(model, embedding)
    shape = model.get_parameter(name).shape
    counts = torch.zeros(shape[0], dtype=torch.int64)
    for number, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor):
            raise ValueError(f"batches: batch {number} has no tensor input_ids")
        mask = batch.get("attention_mask")
        ids = (ids if mask is None else ids[mask != 0]).reshape(-1)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < shape[0]:
            raise ValueError(f"batches: batch {number} has ids outside of the {shape[0]} rows of {name!r}")
        counts += torch.bincount(ids, minlength=shape[0]).cpu()
    return _selection(name, _largest(counts.double(), k), shape, {"counts": counts})


def tables_of(
    before: Tensor | nn.Module | SparseModel, after: Tensor | nn.Module | SparseModel | None, name: str | None
) -> Tables:
    """Both states of the table, checked to fit each other."""
    if after is None:
        if not isinstance(before, SparseModel):
            raise ValueError("after is missing; only the SparseModel of embed_tune holds both tables by itself")
        after = before
    elif isinstance(before, SparseModel) and after is before.model:
        after = before
    elif isinstance(after, SparseModel) and before is after.model:
        before = after
    if name is None or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        models = [x.model if isinstance(x, SparseModel) else x for x in (before, after) if not isinstance(x, Tensor)]
        if not models:
            raise ValueError("name is missing: which parameter are these tables of?")
        name = embedding_weight(models[0], name)
    x, y = _table(before, name, "before"), _table(after, name, "after")
    for table, argument in ((x, "before"), (y, "after")):
        if table.dim() != 2 or not table.is_floating_point():
            raise ValueError(f"{argument} must be a floating-point table [V, D], got {table.dtype} {list(table.shape)}")
    if x.numel() and x.data_ptr() == y.data_ptr():
        raise ValueError("before and after are one table in memory; clone it before it is tuned")
    if x.shape != y.shape or x.device != y.device:
        raise ValueError(
            f"before and after must share shape and device, got {list(x.shape)} on {x.device} and "
            f"{list(y.shape)} on {y.device}"
        )
    return Tables(name, x, y)


def _table(source: Tensor | nn.Module | SparseModel, name: str, argument: str) -> Tensor:
    if isinstance(source, Tensor):
        return source.detach()
    if isinstance(source, nn.Module):
        return source.get_parameter(embedding_weight(source, name)).detach()
    weight = source.model.get_parameter(name)
    trained = dict(source.named_parameters())  # refuses a model that was given back
    slot = next((slot for slot in source.slots.values() if slot.weight is weight), None)
    if slot is None or not slot.rows or len(slot.index) != len(weight):
        raise ValueError(
            f"{argument}: the SparseModel does not train every row of {name!r}; it trains {', '.join(trained)}"
        )
    return slot.originals if argument == "before" else slot.values.detach()


def _common(tables: Tables) -> torch.dtype:
    """fp32 at least where the two differ: what training left of a bf16 table is no bf16 any more."""
    return torch.promote_types(tables.before.dtype, tables.after.dtype)


def _largest(scores: Tensor, k: int) -> Tensor:
    if not 1 <= k <= len(scores):
        raise ValueError(f"k must lie in [1, {len(scores)}], got {k}")
    return topk([scores], k)[0]


def _selection(name: str, rows: Tensor, shape: torch.Size, report: dict[str, Any]) -> Selection:
    selection = Selection({name: Index(rows.cpu(), shape, rows=True)} if len(rows) else {})
    selection.report = report
    return selection
