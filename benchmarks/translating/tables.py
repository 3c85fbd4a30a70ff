"""What the study leaves to read: a table for each language, and what holds of the paper's claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .. import study
from ..study import mean_and_spread
from .contenders import CONTENDERS, EMBED, FREQUENCY, FULL, ONE_ROW, RANDOM, SHIFT, TICKET, TRANSFER, UNTUNED

METRICS = {
    "chrf": "chrF",
    "bleu": "BLEU",
    "chrf_first_line": "chrF, first line",
    "bleu_first_line": "BLEU, first line",
}


def values(runs: Sequence[dict[str, Any]], name: str, metric: str) -> list[float]:
    """One number a run."""
    return [run["contenders"][name]["scores"][metric] for run in runs]


def of_language(content: dict[str, Any], language: str) -> list[dict[str, Any]]:
    return [run for run in content["runs"] if run["language"] == language]


def languages(content: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["language"] for run in content["runs"]))


def table(content: dict[str, Any], language: str) -> str:
    """One line a contender: mean ± standard deviation over the seeds."""
    runs = of_language(content, language)
    header = [f"en → {language}, seeds: {len(runs)}", "weights", "lr", *METRICS.values(), "one line", "agreement"]
    lines = []
    for name in CONTENDERS:
        entries = [run["contenders"][name] for run in runs]
        trained = sorted({entry["trained"] for entry in entries})
        rate = content["rates"].get(name, {}).get("lr")
        lines.append(
            [
                name,
                "-" if not trained[-1] else f"{trained[0]:,}" + (f" to {trained[-1]:,}" if len(trained) > 1 else ""),
                "-" if rate is None else f"{rate:g}",
                *(mean_and_spread(values(runs, name, metric)) for metric in METRICS),
                f"{statistics.mean(values(runs, name, 'one_line')):.0%}",
                f"{statistics.mean(entry['agreement']['share'] for entry in entries):.1%}",
            ]
        )
    return study.table(header, lines, aligned=True)


def gained(runs: Sequence[dict[str, Any]], name: str, metric: str) -> list[float]:
    """For each run, the share of embed tuning's gain over the untuned model that a contender reaches."""
    triples = zip(*(values(runs, which, metric) for which in (name, EMBED, UNTUNED)), strict=True)
    return [(own - base) / (embed - base) if embed != base else float("nan") for own, embed, base in triples]


def claims(content: dict[str, Any]) -> list[tuple[str, str]]:
    """What the paper says, and what was measured here, over all languages and seeds."""
    runs, alpha = content["runs"], content["settings"]["alpha"]

    def ahead(name: str, other: str, metric: str = "chrf") -> str:
        gaps = [a - b for a, b in zip(values(runs, name, metric), values(runs, other, metric), strict=True)]
        return f"{mean_and_spread(gaps)} chrF, ahead in {sum(gap > 0 for gap in gaps)} of {len(gaps)} runs"

    def share(name: str) -> str:
        whole, first = (statistics.mean(gained(runs, name, metric)) for metric in ("chrf", "chrf_first_line"))
        return f"{whole:.0%} of embed tuning's gain in chrF; of that on the first line {first:.0%}"

    def agrees(name: str) -> str:
        found = [run["contenders"][name]["agreement"] for run in runs]
        mean = statistics.mean(entry["share"] for entry in found)
        return (
            f"{mean:.1%}; the bound of {1 - alpha:.0%} is met in {sum(e['holds'] for e in found)} of {len(found)} runs"
        )

    def span(pick: Callable[[dict[str, Any]], int]) -> str:
        numbers = sorted(pick(run["ticket"]) for run in runs)
        return f"{numbers[0]} to {numbers[-1]}" if numbers[0] != numbers[-1] else str(numbers[0])

    def counted(correction: str) -> str:
        return span(lambda ticket: ticket["counts"][correction])

    rows = runs[0]["ticket"]["of"]
    by_rate = ", ".join(f"{n} at {rate}" for rate, n in content["rates"][EMBED]["rows_below_alpha"].items())
    corrected = f"with Benjamini-Hochberg {counted('bh')}, with Bonferroni {counted('bonferroni')}"
    largest = max(run["ticket"]["rows"] / run["ticket"]["of"] for run in runs)
    return [
        (f"few rows change at p < {alpha:g}", f"{counted('none')} of {rows}; {corrected}"),
        ("how many do, by the rate of embed tuning", by_rate),
        ("a ticket of at most 2 % of the rows", f"{span(lambda ticket: ticket['rows'])} rows, at most {largest:.1%}"),
        ("embed tuning is as good as full tuning", ahead(EMBED, FULL)),
        ("tuning the ticket is as good as embed tuning", f"{ahead(TICKET, EMBED)}: {share(TICKET)}"),
        ("moving the ticket's rows is enough", share(TRANSFER)),
        ("tuning the ticket agrees with embed tuning", agrees(TICKET)),
        ("(not claimed) moving the ticket agrees with embed tuning", agrees(TRANSFER)),
        ("the ticket is better than rows of largest shift", ahead(TICKET, SHIFT)),
        ("the ticket is better than the most frequent rows", ahead(TICKET, FREQUENCY)),
        ("the ticket is better than random rows", ahead(TICKET, RANDOM)),
        ("(a replication) one row is enough", f"{share(ONE_ROW)}; the ticket against it: {ahead(TICKET, ONE_ROW)}"),
    ]


def markdown(content: dict[str, Any]) -> str:
    """The whole report."""
    settings, machine, runs = content["settings"], content["machine"], content["runs"]
    steps, tuning = runs[0]["steps"], settings["tuning_pairs"]
    sizes = ", ".join(f"{language} {count:,}" for language, count in tuning.items())
    tests = ", ".join(f"{language} {count:,}" for language, count in settings["test_pairs"].items())
    lines = [
        f"Model: {settings['model']}. Text: {settings['source']}; tuned with {sizes} pairs for {settings['epochs']} "
        f"epochs ({steps} steps of {settings['batch_size']}), tested on {tests}. Mean ± standard deviation over "
        "the seeds. Scores are of the whole output and of its first line; `one line` "
        "is the share of outputs with no second line; `agreement` is the share of equal predictions with embed tuning, "
        "token by token with the reference before them.",
        "",
    ]
    for language in languages(content):
        lines += [table(content, language), ""]
    lines += [study.table(["claim", "measured here"], claims(content)), ""]
    for language in languages(content):
        first = of_language(content, language)[0]
        tokens = ", ".join(f"`{token!r}`" for token in first["ticket"]["tokens"][: min(20, first["ticket"]["rows"])])
        lines += [f"Rows of largest statistic, en → {language}, seed {first['seed']}: {tokens}.", ""]
    seconds = sum(run["seconds"] for run in runs) + content["search_seconds"]
    model = f", and {content['model_seconds'] / 60:.0f} for the model" if content["model_seconds"] else ""
    minutes = f"{machine['cores']} cores, {seconds / 60:.0f} minutes{model}"
    return "\n".join([*lines, f"{minutes}; {study.written_by(content, 'python -m benchmarks ks-lottery')}"])
