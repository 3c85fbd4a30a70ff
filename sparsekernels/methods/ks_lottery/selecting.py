"""KS-Lottery: train the embedding rows whose distribution tuning changes (Yuan et al., arXiv 2402.02801)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...choosing import count_for
from ...common.messages import warn
from ...common.names import embedding_weight
from ...common.shards import Cut
from ...common.supported import is_dtensor, local_of
from ...index import Index
from ...ops import ks_2samp, topk
from ...selection import Selection
from ...training.slot import Slot
from ...training.train_only import SparseModel

Correction = Literal["bh", "bonferroni"]
Table = Tensor | nn.Module | SparseModel
CHUNK = 1 << 24  # elements of a table that exist in fp32 at a time


class Tables(NamedTuple):
    """One embedding table in two states, each [V, D], and the name of its parameter.

    Of a sharded table, `before` and `after` are the rows of this rank, `shape` is that of the whole, and `cut` says
    which rows these are.
    """

    name: str
    before: Tensor
    after: Tensor
    shape: torch.Size
    cut: Cut | None = None

    def parts(self, dtype: torch.dtype) -> Iterable[tuple[Tensor, Tensor]]:
        """Both, a few rows at a time."""
        rows = max(1, CHUNK // self.before.shape[1])
        for x, y in zip(self.before.split(rows), self.after.split(rows), strict=True):
            yield x.to(dtype), y.to(dtype)

    def of_all_rows(self, parts: Iterable[Tensor]) -> Tensor:
        """What was computed for each row, a few at a time: [V] on the CPU. A collective call for a sharded table."""
        mine = torch.cat(list(parts))
        if self.cut is None:
            return mine.cpu()
        room = mine.new_zeros(self.cut.chunk)
        room[: len(mine)] = mine
        return self.cut.gather(room).reshape(-1)[: self.shape[0]].cpu()

    def refuse_nan(self, of_rows: Tensor) -> None:
        if bool(of_rows.isnan().any()):
            raise ValueError(f"{self.name!r} has NaN in row {int(of_rows.isnan().nonzero()[0])}, before or after")


def select(
    before: Table,
    after: Table | None = None,
    alpha: float = 0.05,
    correction: Correction | None = None,
    *,
    fallback_density: float = 0.02,
    name: str | None = None,
) -> Selection:
    """Select the rows of an embedding table whose distribution changed, by an exact two-sample KS test per row.

    For each row, the D numbers before and the D numbers after are the two samples; the test is two-sided. The winning
    ticket is the rows with p < alpha. If there are none, as after tuning at a small learning rate (a narrower table
    needs a larger change), it is the rows of smallest p-value, up to a given size, with a warning.

    Args:
        before: the table before tuning, [V, D]; or a model, for its input embedding; or the SparseModel from
            `embed_tune`, which has both states: then omit `after`. For a SparseModel, or the model that it trains,
            these are the rows before training.
        after: the table after tuning, in one of the same three forms; for a SparseModel its fp32 values, before
            rounding. Under fully_shard both tables are DTensors, `before` a clone of the sharded weight. This is a
            collective call then: each rank tests its own rows, and all get the same Selection.
        alpha: rows with a p-value below it are selected, in (0, 1).
        correction: adjustment of p-values for V simultaneous tests: "bonferroni", "bh" (Benjamini-Hochberg), or None,
            as in the paper: then about alpha * V rows are false positives if the samples are independent.
        fallback_density: size of the ticket if no row has p < alpha, a share of all rows in [0, 1]:
            k = min(int(fallback_density * V) + 1, V); of rows with equal p-values those that moved further, and no row
            that did not change. 0 is the paper's rule: the ticket may be empty.
        name: the parameter that the Selection names. Required if both tables are tensors; otherwise the default is the
            table that the SparseModel trains, or the model's input embedding.

    Returns:
        Selection of rows, empty if no row changed. `.report` has "pvalues" and "statistics", float64 [V] on the CPU,
        "adjusted" under a correction, and "significant", the number of rows with p < alpha; if that is 0, the ticket
        was chosen by size.

    A row that was not trained, or only permuted, has statistic 0 and p-value 1. The test compares distributions, not
    positions: see `by_shift` for those.

    Raises:
        ValueError: alpha, correction or fallback_density is invalid, tables are empty or do not fit each other, or have
            NaN (the message names the row), or only one of them is sharded. RuntimeError: the SparseModel was restored
            or merged.

    Numerics: p-values in fp64, exact. Deterministic.
    Cost: one pass over both tables, and that of `sparsekernels.ops.ks_2samp`.

    Source: test and alpha are the paper's, as quoted by others. Ours: corrections, through scipy, and a ticket by size.

    Examples:
        >>> before = torch.randn(10, 64)
        >>> after = before.clone()
        >>> after[3] += 2
        >>> ticket = sk.methods.ks_lottery.select(before, after, name="embed.weight")
        >>> ticket["embed.weight"].positions, ticket.report["significant"]
        (tensor([3], dtype=torch.int32), 1)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if correction not in (None, "bh", "bonferroni"):
        raise ValueError(f'correction must be None, "bh" or "bonferroni", got {correction!r}')
    if not 0 <= fallback_density <= 1:
        raise ValueError(f"fallback_density must lie in [0, 1], got {fallback_density}")
    tables = tables_of(before, after, name)
    found = [ks_2samp(x, y, method="exact") for x, y in tables.parts(_common(tables))]
    p = tables.of_all_rows(part.pvalue for part in found)
    tables.refuse_nan(p)
    report: dict[str, Any] = {"pvalues": p, "statistics": tables.of_all_rows(part.statistic for part in found)}
    if correction == "bonferroni":
        p = report["adjusted"] = (p * len(p)).clamp_max(1)
    elif correction == "bh":
        from scipy.stats import false_discovery_control

        p = report["adjusted"] = torch.from_numpy(false_discovery_control(p.numpy(), method="bh"))
    rows = (p < alpha).nonzero().reshape(-1)
    report["significant"] = len(rows)
    if not len(rows) and fallback_density:
        rows = _least_alike(tables, report["statistics"], count_for(len(p), None, fallback_density))
        taken = (
            f"The ticket is the {len(rows)} rows of smallest p" if len(rows) else "No row changed; the ticket is empty"
        )
        smallest = f"none of {len(p)} rows of {tables.name!r} has p < {alpha:g}, the smallest is {float(p.min()):.3g}"
        warn(f"ks_lottery.select: {smallest}. {taken}. Tune longer or at a larger lr")
    return _selection(tables.name, rows, tables.shape, report)


def _least_alike(tables: Tables, statistics: Tensor, k: int) -> Tensor:
    """The k rows of largest statistic, ties to those that moved further, ascending; no row that did not change."""
    order = _shifts(tables).argsort(descending=True, stable=True)
    order = order[statistics[order].argsort(descending=True, stable=True)][:k]
    return order[statistics[order] > 0].sort().values


def by_shift(before: Table, after: Table | None = None, *, k: int, name: str | None = None) -> Selection:
    """Select the k rows of an embedding table that moved furthest, by L2 norm: a baseline for `select`.

    Args:
        before, after, name: as in `select`.
        k: number of rows, in [1, V]. Ties go to the lower row; rows that did not move fill the rest.

    Returns:
        Selection of k rows. `.report["shifts"]`: fp32 (fp64 for fp64) [V] on the CPU. Deterministic.

    Raises:
        ValueError: k out of range, tables that are empty or do not fit each other, NaN (the message names the row).
            RuntimeError: the SparseModel was restored or merged.

    Source: ours.

    Examples:
        >>> before, after = torch.zeros(4, 3), torch.tensor([[0.0], [2.0], [0.0], [-1.0]]).expand(4, 3)
        >>> sk.methods.ks_lottery.by_shift(before, after, k=2, name="embed.weight")["embed.weight"].positions
        tensor([1, 3], dtype=torch.int32)
    """
    tables = tables_of(before, after, name)
    shifts = _shifts(tables)
    tables.refuse_nan(shifts)
    return _selection(tables.name, _largest(shifts, k), tables.shape, {"shifts": shifts})


def by_frequency(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, k: int, embedding: str | None = None
) -> Selection:
    """Select the k rows of the input embedding with the most frequent tokens: a baseline for `select`.

    Args:
        model: gives name and shape of the table; not changed.
        batches: mappings with integer "input_ids" and, if there is padding, "attention_mask" of the same shape.
        k: number of rows, in [1, V]. Ties go to the lower row; rows of tokens that never occur fill the rest.
        embedding: name of the table; default: the model's input embedding.

    Returns:
        Selection of k rows. `.report["counts"]`: int64 [V] on the CPU. Deterministic.

    Raises:
        ValueError: k out of range, no tokens, a batch without input_ids or with a mask of another shape, or ids outside
            the table.

    Source: ours.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(6, 4))
        >>> batches = [{"input_ids": torch.tensor([[5, 5, 2, 1, 2, 5]])}]
        >>> sk.methods.ks_lottery.by_frequency(model, batches, k=2, embedding="0.weight")["0.weight"].positions
        tensor([2, 5], dtype=torch.int32)
    """
    name = embedding_weight(model, embedding)
    shape = model.get_parameter(name).shape
    counts = torch.zeros(shape[0], dtype=torch.int64)
    for number, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise ValueError(f"batches: batch {number} has no integer tensor input_ids")
        mask = batch.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != ids.shape:
                raise ValueError(f"batches: the attention_mask of batch {number} must be a tensor shaped as input_ids")
            ids = ids[mask != 0]
        ids = ids.reshape(-1).cpu()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < shape[0]:
            raise ValueError(f"batches: batch {number} has ids outside of the {shape[0]} rows of {name!r}")
        counts += torch.bincount(ids, minlength=shape[0])
    if not bool(counts.any()):
        raise ValueError("batches hold no tokens to count")
    return _selection(name, _largest(counts.double(), k), shape, {"counts": counts})


def tables_of(before: Table, after: Table | None, name: str | None) -> Tables:
    """Both states of the table, checked to fit each other."""
    if after is None:
        if not isinstance(before, SparseModel):
            raise ValueError("after is missing; only the SparseModel of embed_tune has both tables")
        after = before
    for source in (before, after):
        if isinstance(source, SparseModel):
            source.check_in_use()
    if name is None:
        name = _name(before, after)
    x, y = _table(before, name, "before"), _table(after, name, "after")
    # A table that a SparseModel trains in place has its state before and its fp32 values in the SparseModel.
    if isinstance(after, SparseModel) and _same_memory(x, after.model.get_parameter(name)):
        x = _slot(after, name, "after").originals
    if isinstance(before, SparseModel) and _same_memory(y, before.model.get_parameter(name)):
        y = _slot(before, name, "before").values.detach()
    for table, argument in ((x, "before"), (y, "after")):
        if table.dim() != 2 or not table.is_floating_point() or not table.numel():
            raise ValueError(
                f"{argument} must be a floating-point table [V, D] that is not empty, got {table.dtype} "
                f"{list(table.shape)}"
            )
    if x.shape != y.shape or x.device != y.device:
        raise ValueError(
            f"before and after must share shape and device, got {list(x.shape)} on {x.device} and "
            f"{list(y.shape)} on {y.device}"
        )
    shape, cut = x.shape, None
    if is_dtensor(x) or is_dtensor(y):
        cut, x, y = _rows_of_rank(name, x, y)
    if _same_memory(x, y):
        raise ValueError("before and after are the same memory; clone the table before tuning")
    return Tables(name, x, y, shape, cut)


def _rows_of_rank(name: str, before: Any, after: Any) -> tuple[Cut, Tensor, Tensor]:
    """How two sharded tables are cut, and the rows of them that this rank holds."""
    if not (is_dtensor(before) and is_dtensor(after)) or before.placements != after.placements:
        raise ValueError(
            f"before and after must both be {name!r} as it is sharded: clone the DTensor before tuning, and call "
            "reshard() on the model after an evaluation"
        )
    return Cut.of(after, repr(name)), local_of(before), local_of(after)


def _name(before: Table, after: Table) -> str:
    for source in (before, after):
        if isinstance(source, SparseModel):
            whole = [name for name, slot in source.slots.items() if _is_whole(slot)]
            return whole[0] if len(whole) == 1 else embedding_weight(source.model, argument="name")
    for source in (before, after):
        if isinstance(source, nn.Module):
            return embedding_weight(source, argument="name")
    raise ValueError("name is missing; pass the name of the tables' parameter")


def _table(source: Table, name: str, argument: str) -> Tensor:
    if isinstance(source, Tensor):
        return source.detach()
    if isinstance(source, nn.Module):
        return source.get_parameter(embedding_weight(source, name, "name")).detach()
    slot = _slot(source, name, argument)
    return slot.originals if argument == "before" else slot.values.detach()


def _slot(tuned: SparseModel, name: str, argument: str) -> Slot:
    weight = tuned.model.get_parameter(embedding_weight(tuned.model, name, "name"))
    for slot in tuned.slots.values():
        if slot.weight is weight and _is_whole(slot):
            return slot
    raise ValueError(f"{argument}: the SparseModel does not train every row of {name!r}, but {', '.join(tuned.slots)}")


def _is_whole(slot: Slot) -> bool:
    index = slot.selected
    return index.granularity == "row" and len(index.shape) == 2 and len(index) == index.num_positions


def _same_memory(x: Tensor, y: Tensor) -> bool:
    x, y = local_of(x), local_of(y)
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() and x.data_ptr() == y.data_ptr()


def _common(tables: Tables) -> torch.dtype:
    """The wider dtype of the two: after training, a bf16 table has fp32 values."""
    return torch.promote_types(tables.before.dtype, tables.after.dtype)


def _shifts(tables: Tables) -> Tensor:
    """L2 distance that each row moved, [V] on the CPU."""
    compute_dtype = torch.promote_types(_common(tables), torch.float32)
    return tables.of_all_rows((y - x).norm(dim=1) for x, y in tables.parts(compute_dtype))


def _largest(scores: Tensor, k: int) -> Tensor:
    if not isinstance(k, int) or not 1 <= k <= len(scores):
        raise ValueError(f"k must be an integer in [1, {len(scores)}], got {k!r}")
    return topk([scores], k)[0]


def _selection(name: str, rows: Tensor, shape: torch.Size, report: dict[str, Any]) -> Selection:
    selection = Selection({name: Index(rows.cpu(), shape, granularity="row")} if len(rows) else {})
    selection.report = report
    return selection
