"""The plots of the study."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..finetuning.plots import COLORS, pyplot, save_figure
from ..study import spread
from .contenders import CONTENDERS
from .tables import languages, of_language, values

ANNOTATED = 12  # ranked rows whose tokens are written beside them


def draw(content: dict[str, Any], path: Path) -> list[Path]:
    """Draw the plots beside the results file ``path``."""
    return [
        draw_scores(path.with_suffix(".png"), content),
        draw_pvalues(path.with_name(path.stem + "_pvalues.png"), content),
        draw_ranked(path.with_name(path.stem + "_ranked.png"), content),
    ]


def draw_scores(path: Path, content: dict[str, Any]) -> Path:
    """chrF of every contender, of the whole output and of its first line."""
    found = languages(content)
    figure, panels = pyplot().subplots(1, len(found), figsize=(2.6 + 3.6 * len(found), 4.4), sharey=True, squeeze=False)
    places = range(len(CONTENDERS))
    for axes, language in zip(panels[0], found, strict=True):
        runs = of_language(content, language)
        for offset, metric, label, color in (
            (-0.2, "chrf", "whole output", COLORS[0]),
            (0.2, "chrf_first_line", "first line", COLORS[1]),
        ):
            scores = [values(runs, name, metric) for name in CONTENDERS]
            bars = axes.barh(
                [place + offset for place in places],
                [statistics.mean(numbers) for numbers in scores],
                xerr=[spread(numbers) for numbers in scores],
                height=0.38,
                color=color,
                label=label,
                capsize=2,
            )
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axes.set(xlabel="chrF", title=f"en → {language}")
        axes.set_yticks(places, list(CONTENDERS))
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
    panels[0][0].invert_yaxis()
    panels[0][0].legend(loc="upper right", fontsize=8, frameon=False)
    return save_figure(figure, path)


def draw_pvalues(path: Path, content: dict[str, Any]) -> Path:
    """How the p-values of all rows are distributed, for the first seed of each language."""
    found = languages(content)
    figure, panels = pyplot().subplots(1, len(found), figsize=(4.2 * len(found), 3.8), sharey=True, squeeze=False)
    alpha = content["settings"]["alpha"]
    for axes, language in zip(panels[0], found, strict=True):
        run = of_language(content, language)[0]
        pvalues, rows = zip(*((p, rows) for _, p, rows in run["ticket"]["levels"]), strict=True)
        axes.hist(pvalues, weights=rows, bins=[i / 20 for i in range(21)], color=COLORS[0])
        axes.axvline(alpha, color=COLORS[1], linestyle="--", linewidth=1.2)
        below = run["ticket"]["counts"]["none"]
        axes.annotate(f"{below} rows\nbelow {alpha:g}", (alpha, 0.94), (6, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", color=COLORS[1])  # fmt: skip
        axes.set(xlabel="p-value", yscale="log", title=f"en → {language}, seed {run['seed']}", xlim=(0, 1))
    panels[0][0].set_ylabel("rows (log scale)")
    return save_figure(figure, path)


def draw_ranked(path: Path, content: dict[str, Any]) -> Path:
    """The statistic of every row, ranked, with the tokens of the largest, for the first seed of each language."""
    found = languages(content)
    figure, panels = pyplot().subplots(1, len(found), figsize=(5 * len(found), 4.6), sharey=True, squeeze=False)
    for axes, language in zip(panels[0], found, strict=True):
        run = of_language(content, language)[0]
        ranked = [d for d, _, rows in run["ticket"]["levels"] for _ in range(rows)]
        axes.plot(range(1, len(ranked) + 1), ranked, color=COLORS[0], linewidth=1.4)
        axes.plot(range(1, ANNOTATED + 1), ranked[:ANNOTATED], ".", color=COLORS[0])
        tokens = [f"{rank}. {token!r}" for rank, token in enumerate(run["ticket"]["tokens"][:ANNOTATED], 1)]
        axes.text(0.98, 0.98, "\n".join(tokens), transform=axes.transAxes, ha="right", va="top", fontsize=8)
        below = [d for d, p, _ in run["ticket"]["levels"] if p < content["settings"]["alpha"]]
        if below:
            axes.axhline(
                below[-1], color=COLORS[1], linestyle="--", linewidth=1.2, label=f"p < {content['settings']['alpha']:g}"
            )
        axes.axvline(
            run["ticket"]["rows"],
            color=COLORS[2],
            linestyle=":",
            linewidth=1.2,
            label=f"ticket, {run['ticket']['rows']} rows",
        )
        axes.legend(frameon=False, loc="lower left", fontsize=8)
        axes.set(xlabel="rank of the row (log scale)", xscale="log", title=f"en → {language}, seed {run['seed']}")
    panels[0][0].set_ylabel("KS statistic D")
    return save_figure(figure, path)
