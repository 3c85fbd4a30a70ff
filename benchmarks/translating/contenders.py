"""The contenders: what is tuned, and which rows. All see the same batches equally often, at a constant rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk

from ..finetuning.training import ModelError, progress_bar
from .prompts import Batch

UNTUNED, FULL, EMBED = "untuned", "full", "embed tuning"
TICKET, TRANSFER = "partial tuning, ticket", "partial transfer, ticket"
SHIFT, FREQUENCY, RANDOM = "rows of largest shift", "most frequent rows", "random rows"
ONE_ROW = "one row, that before the answer"

# Name -> the middle of the learning rates tried; None where nothing is trained. In the order of the tables.
CONTENDERS: dict[str, float | None] = {
    UNTUNED: None,
    FULL: 1e-4,
    EMBED: 1e-3,
    TICKET: 5e-3,
    TRANSFER: None,
    SHIFT: 5e-3,
    FREQUENCY: 5e-3,
    RANDOM: 5e-3,
    ONE_ROW: 1e-2,
}
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Ticket:
    """The winning ticket, and how it came about.

    How many rows have p < alpha depends on the width of the table and on the rate of embed tuning: none, or most of
    them. So that all seeds can be compared, the ticket here is a share `SHARE` of the rows, of smallest p-value.

    Attributes:
        selection: the rows; among equal p-values, the lower ones.
        counts: rows with p < alpha: "none" without a correction, "bh", "bonferroni".
        pvalues, statistics: of every row, [V].
    """

    SHARE = 0.02

    selection: sk.Selection
    counts: dict[str, int]
    pvalues: Tensor
    statistics: Tensor

    @classmethod
    def draw(cls, embed: Any, alpha: float) -> Ticket:
        """Test the rows of an embed-tuned model."""
        found = {
            correction: sk.methods.ks_lottery.select(embed, alpha=alpha, correction=correction, fallback_density=0)
            for correction in CORRECTIONS
        }
        report = found[None].report
        counts = {correction or "none": sum(map(len, rows.values())) for correction, rows in found.items()}
        name, shape = next((name, index.shape) for name, index in embed.selection.items())
        smallest = report["pvalues"].argsort(stable=True)[: int(cls.SHARE * shape[0])].sort().values
        rows = sk.Selection({name: sk.Index(smallest, shape, granularity="row")})
        return cls(rows, counts, report["pvalues"], report["statistics"])

    @property
    def rows(self) -> sk.Index:
        (index,) = self.selection.values()
        return index


CORRECTIONS = (None, "bh", "bonferroni")


def choose(
    embed: Any, ticket: Ticket, batches: Sequence[Batch], before_answer: int, seed: int
) -> dict[str, sk.Selection]:
    """The rows of every contender that tunes rows: as many as the ticket has, and the one row.

    Args:
        embed: the embed-tuned model, not yet restored.
        batches: the batches it was tuned with.
        before_answer: the token that stands before every answer.
        seed: of the random rows.
    """
    ((name, index),) = ticket.selection.items()
    drawn = torch.randperm(index.shape[0], generator=torch.Generator().manual_seed(seed))[: len(index)].sort().values
    return {
        TICKET: ticket.selection,
        SHIFT: sk.methods.ks_lottery.by_shift(embed, k=len(index)),
        FREQUENCY: sk.methods.ks_lottery.by_frequency(embed.model, batches, k=len(index)),
        RANDOM: sk.Selection({name: sk.Index(drawn, index.shape, granularity="row")}),
        ONE_ROW: sk.Selection({name: sk.Index(torch.tensor([before_answer]), index.shape, granularity="row")}),
    }


def loss_in_bf16(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss, its products in bfloat16."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        loss: Tensor = model(**{key: x.to(device) for key, x in batch.items()}).loss
    return loss


@contextmanager
def tuned(
    model: nn.Module, name: str, lr: float, batches: Sequence[Batch], epochs: int, selection: sk.Selection | None = None
) -> Iterator[Any]:
    """Tune the model as a contender does; on leaving, the model is what it was.

    Yields the SparseModel, or None for full tuning, which has none.
    """
    same = {"lr": lr, "epochs": epochs, "loss": loss_in_bf16, "max_grad_norm": MAX_GRAD_NORM, "progress": True}
    try:
        if name == FULL:
            with fully_tuned(model, batches, lr, epochs):
                yield None
        elif name == EMBED:
            with sk.methods.ks_lottery.embed_tune(model, batches, **same) as embed:
                yield embed
        else:
            assert selection is not None
            with sk.methods.ks_lottery.partial_tune(model, selection, batches, **same) as partial:
                yield partial
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


@contextmanager
def fully_tuned(model: nn.Module, batches: Sequence[Batch], lr: float, epochs: int) -> Iterator[None]:
    """Tune every weight, as `embed_tune` tunes the embedding: AdamW, constant rate, no decay."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0, fused=True)
    try:
        model.train()
        with progress_bar(epochs * len(batches), FULL, "step") as bar:
            for batch in (batch for _ in range(epochs) for batch in batches):
                loss_in_bf16(model, batch).backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
        yield
    finally:
        model.load_state_dict(base)
        model.eval()
