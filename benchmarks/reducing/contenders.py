"""Three ways to find what to reduce: by gradients, by trying everything, by trying a few at random."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import sparsekernels as sk
from sparsekernels.methods import laser

from ..timing import interleaved, seconds

Batch = dict[str, torch.Tensor]
TRIED, ROUNDS = 16, 3


@dataclass(frozen=True)
class Quality:
    """Of a model on a set of texts: the share of right labels (of next tokens, for a language model), the mean loss."""

    accuracy: float
    loss: float

    @property
    def value(self) -> float:
        """What is maximised: the accuracy, and among equals the smaller loss."""
        return self.accuracy - 1e-4 * self.loss


@torch.no_grad()
def quality(model: nn.Module, batches: Sequence[Batch]) -> Quality:
    """Every text counts the same, in eval mode."""
    model.eval()
    right = loss = texts = labels = 0.0
    for batch in batches:
        output, wanted = model(**batch), batch["labels"]
        size = len(wanted)
        logits = output.logits
        if wanted.dim() == 2:
            logits, wanted = logits[:, :-1], wanted[:, 1:]
        counted = wanted != -100
        right += float((logits.argmax(-1) == wanted)[counted].sum())
        labels += float(counted.sum())
        loss += float(output.loss) * size
        texts += size
    return Quality(right / labels, loss / texts)


@dataclass
class Found:
    """What a contender found, and what it took: texts that ran forward, a backward being counted as three of them."""

    reduced: laser.Reduced
    seconds: float
    texts: int
    evaluations: int


def adapt(model: nn.Module, samples: Sequence[Batch], objective: str, rhos: Sequence[float], **options: Any) -> Found:
    """One backward ranks, the best few are evaluated on the same texts."""
    started = time.perf_counter()
    reduced = laser.adapt(
        model,
        samples,
        evaluator(samples, objective),
        rhos=rhos,
        num_candidates=TRIED,
        max_matrices=ROUNDS,
        progress=False,
        **options,
    )
    took = time.perf_counter() - started
    report = reduced.report
    passes = report["evaluations"] + 3 * report["backwards"]
    return Found(reduced, took, passes * count(samples), report["evaluations"])


def search(
    model: nn.Module,
    texts: Sequence[Batch],
    objective: str,
    rhos: Sequence[float],
    seen: list[Quality],
) -> Found:
    """Everything is evaluated; `seen` gets the quality of the model, and of every reduction in order."""
    started = time.perf_counter()
    reduced = laser.search(
        model, evaluator(texts, objective, seen), rhos=rhos, max_matrices=ROUNDS, progress=sys.stderr.isatty()
    )
    took = time.perf_counter() - started
    evaluations = reduced.report["evaluations"]
    return Found(reduced, took, evaluations * count(texts), evaluations)


def chance(model: nn.Module, samples: Sequence[Batch], objective: str, rhos: Sequence[float], seed: int) -> Found:
    """As many reductions evaluated as by `adapt`, on the same texts, with the same rule, but drawn at random."""
    started = time.perf_counter()
    draw, evaluate = random.Random(seed), evaluator(samples, objective)
    plan: list[laser.Reduction] = []
    cache = laser.Decompositions()

    def value() -> float:
        with torch.no_grad():
            return evaluate(model)

    best, evaluations = value(), 1
    labels = list(sk.matrices(model))
    for _ in range(ROUNDS):
        every = [laser.Reduction(label, rho) for label in labels for rho in rhos]
        tried = []
        for reduction in draw.sample(every, TRIED):
            with laser.reduce(model, [*plan, reduction], factored=False, decompositions=cache):
                tried.append(replace(reduction, measured=value() - best))
        evaluations += TRIED
        kept = max(tried, key=lambda reduction: reduction.measured or 0.0)
        if not (kept.measured or 0.0) > 0:
            break
        best += kept.measured or 0.0
        plan.append(kept)
        labels.remove(kept.matrix)
    reduced = laser.reduce(model, plan, decompositions=cache)
    took = time.perf_counter() - started
    return Found(reduced, took, evaluations * count(samples), evaluations)


def evaluator(
    texts: Sequence[Batch], objective: str, seen: list[Quality] | None = None
) -> Callable[[nn.Module], float]:
    """What a contender maximises over some texts: "accuracy", or "loss", which is minimised."""

    def evaluate(model: nn.Module) -> float:
        found = quality(model, texts)
        if seen is not None:
            seen.append(found)
        return found.value if objective == "accuracy" else -found.loss

    return evaluate


def count(batches: Sequence[Batch]) -> int:
    return sum(len(batch["labels"]) for batch in batches)


def compare_times(
    model: nn.Module, batches: Sequence[Batch], rhos: Sequence[float], rounds: int = 15
) -> dict[str, float]:
    """Seconds to rank every matrix, decompositions cached, and of a plain forward and backward; interleaved, medians.

    The plain backward makes the gradients of the weights that are ranked, and of no others.
    """
    model.eval()
    first = laser.rank(model, batches, rhos=rhos, progress=False)
    weights = {model.get_parameter(matrix.parameter) for matrix in first.matrices.values()}
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def plain() -> None:
        for batch in batches:
            (model(**batch).loss * (len(batch["labels"]) / count(batches))).backward()
        for p in weights:
            p.grad = None

    def ranked() -> None:
        laser.rank(model, batches, rhos=rhos, decompositions=first.decompositions, progress=False)

    calls = {"forward": forward, "plain": plain, "ranked": ranked}
    for p, _ in flags:
        p.requires_grad_(p in weights)
    samples = {name: lambda _, call=call: seconds(call) for name, call in calls.items()}
    times = {name: mine[1:] for name, mine in interleaved(samples, least=rounds).items()}
    for p, flag in flags:
        p.requires_grad_(flag)
    turns = list(zip(*times.values(), strict=True))
    return {name: statistics.median(mine) for name, mine in times.items()} | {
        "ratio": statistics.median(ranked / plain for _, plain, ranked in turns),
        "ratio_of_backwards": statistics.median((ranked - fwd) / (plain - fwd) for fwd, plain, ranked in turns),
    }
