"""The runs of ks_lottery.py: learning rates searched once, then every method for each language and seed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import sparsekernels as sk

from ..study import Content, Study, around, best_rate
from . import contenders, prompts
from .contenders import CONTENDERS, EMBED, TRANSFER, UNTUNED, Ticket
from .parallel_text import Pair

RANKED = 40  # rows of largest statistic whose tokens are kept


@dataclass(frozen=True)
class Settings:
    """What decides the outcome beside model and text."""

    epochs: int
    batch_size: int
    alpha: float
    max_new_tokens: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """The text of one language: what is tuned with, and what is translated."""

    language: str
    tuning: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]


class Lottery:
    """What is measured into a study: rates, and a run for each language and seed."""

    def __init__(self, study: Study, model: Any, tokenizer: Any, jobs: Sequence[Job], settings: Settings) -> None:
        self.study, self.content = study, study.content
        self.model, self.tokenizer, self.jobs, self.settings = model, tokenizer, jobs, settings

    def batches(self, pairs: Sequence[Pair], seed: int | None = None) -> list[prompts.Batch]:
        return prompts.batches(self.tokenizer, pairs, self.settings.batch_size, seed)

    def tuned(self, name: str, lr: float, batches: Sequence[prompts.Batch], selection: sk.Selection | None) -> Any:
        return contenders.tuned(self.model, name, lr, batches, self.settings.epochs, selection)

    def measure(self, pairs: Sequence[Pair]) -> tuple[dict[str, float], list[str]]:
        """Translate, and score what was written."""
        sources, references = zip(*pairs, strict=True)
        written = prompts.translate(self.model, self.tokenizer, sources, self.settings.max_new_tokens)
        return prompts.score(written, references), written

    @property
    def before_answer(self) -> int:
        """The token that ends every prompt."""
        return int(prompts.prompt_ids(self.tokenizer, "")[-1])

    def search(self) -> None:
        """Find the learning rate of every contender, by chrF on validation: first language, first seed."""
        job, seed = self.jobs[0], self.settings.seeds[0]
        batches = self.batches(job.tuning, seed)
        selections: dict[str, sk.Selection] = {}

        def score(name: str, rate: float) -> float:
            tried = self.content["rates"].setdefault(name, {}).setdefault("tried", {})
            if (key := f"{rate:g}") not in tried:
                started = time.perf_counter()
                with self.tuned(name, rate, batches, selections.get(name)) as found:
                    if name == EMBED:
                        counts = self.content["rates"][name].setdefault("rows_below_alpha", {})
                        counts[key] = Ticket.draw(found, self.settings.alpha).counts["none"]
                    tried[key] = self.measure(job.validation)[0]["chrf"]
                seconds = time.perf_counter() - started
                self.content["search_seconds"] += seconds
                self.study.save()
                print(f"search: {name}, lr {key}: validation chrF {tried[key]:.2f}, {seconds:.0f} s", flush=True)
            return float(tried[key])

        for name, middle in CONTENDERS.items():
            if middle is None or "lr" in self.content["rates"].get(name, {}):
                continue
            if name not in (contenders.FULL, EMBED) and not selections:
                with self.tuned(EMBED, self.content["rates"][EMBED]["lr"], batches, None) as embed:
                    ticket = Ticket.draw(embed, self.settings.alpha)
                    selections = contenders.choose(embed, ticket, batches, self.before_answer, seed)
            rate = best_rate(lambda rate, name=name: score(name, rate), around(middle))
            self.content["rates"][name]["lr"] = rate
            self.study.save()

    def run(self, job: Job, seed: int) -> Content:
        """Every method once, on the same batches; what the file holds already is not measured again."""
        return self.study.run({"language": job.language, "seed": seed}, lambda: self.measured(job, seed))

    def measured(self, job: Job, seed: int) -> Content:
        started = time.perf_counter()
        batches, labelled = self.batches(job.tuning, seed), self.batches(job.test)
        results: dict[str, dict[str, Any]] = {}
        predicted: dict[str, torch.Tensor] = {}

        def evaluate(name: str, selection: sk.Selection | None = None) -> None:
            scores, written = self.measure(job.test)
            predicted[name] = sk.methods.ks_lottery.predictions(self.model, labelled)
            weights = sum(p.numel() for p in self.model.parameters()) if name == contenders.FULL else 0
            weights = selection.numel if selection is not None else weights
            results[name] = {"scores": scores, "trained": weights, "examples": written[:3]}
            print(
                f"{job.language}, seed {seed}: {name}: chrF {scores['chrf']:.1f}, BLEU {scores['bleu']:.1f}, "
                f"first line {scores['chrf_first_line']:.1f}, {scores['bleu_first_line']:.1f}",
                flush=True,
            )

        rates = {name: entry["lr"] for name, entry in self.content["rates"].items()}
        evaluate(UNTUNED)
        with self.tuned(EMBED, rates[EMBED], batches, None) as embed:
            evaluate(EMBED, embed.selection)
            ticket = Ticket.draw(embed, self.settings.alpha)
            selections = contenders.choose(embed, ticket, batches, self.before_answer, seed)
            transfer = sk.methods.ks_lottery.partial_transfer(embed, ticket.selection)
        with transfer.apply(self.model):
            evaluate(TRANSFER, ticket.selection)
        for name in (contenders.FULL, *selections):
            with self.tuned(name, rates[name], batches, selections.get(name)):
                evaluate(name, selections.get(name))
        for name, result in results.items():
            certified = sk.methods.ks_lottery.certificate(predicted[name], predicted[EMBED], self.settings.alpha)
            result["agreement"] = {
                "share": certified.agreement,
                "lower": certified.lower,
                "holds": bool(certified.holds),
            }
        return {
            "seconds": round(time.perf_counter() - started, 1),
            "steps": len(batches) * self.settings.epochs,
            "ticket": self.describe(ticket, selections),
            "contenders": {name: results[name] for name in CONTENDERS},
            "references": [list(pair) for pair in job.test[:3]],
        }

    def describe(self, ticket: Ticket, selections: dict[str, sk.Selection]) -> dict[str, Any]:
        """What is reported of a ticket: sizes, the tokens, and the statistics for the plots."""
        ranked = ticket.statistics.argsort(descending=True, stable=True)
        shared = {
            name: (selection & ticket.selection).numel // ticket.rows.elements_per_position
            for name, selection in selections.items()
        }
        return {
            "rows": len(ticket.rows),
            "of": ticket.rows.shape[0],
            "counts": ticket.counts,
            "tokens": [self.token(int(row)) for row in ranked[:RANKED]],
            "shared_rows": shared,
            "levels": levels(ticket),
        }

    def token(self, row: int) -> str:
        """How a token is written: as text where it is whole characters, else as the tokenizer has it."""
        text = self.tokenizer.decode([row])
        return self.tokenizer.convert_ids_to_tokens(row) if "\ufffd" in text or not text else text


def levels(ticket: Ticket) -> list[list[float]]:
    """[statistic, p-value, rows that have them] from the largest down: a table of D columns has D + 1 at most."""
    found = Counter(zip(ticket.statistics.tolist(), ticket.pvalues.tolist(), strict=True))
    return [[round(d, 6), float(f"{p:.5g}"), rows] for (d, p), rows in sorted(found.items(), reverse=True)]
