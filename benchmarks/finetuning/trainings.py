"""Runs of a study: the same job by several methods, each with its learning rate searched, over several seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import study
from ..study import Content, Study
from .config import Config
from .text_task import TextTask
from .training import train


@dataclass(frozen=True)
class Entry:
    """What is studied under a name: a method, its size, and the middle of the learning rates that are tried."""

    method: str
    density: float
    lr: float
    samples: int = 1024


class Trainings:
    """The entries of a study, each trained with `base` but for what the entry says."""

    def __init__(
        self,
        path: Path,
        task: TextTask,
        base: Config,
        entries: Mapping[str, Entry],
        seeds: Sequence[int],
        origin: Content,
    ) -> None:
        self.task, self.base, self.entries, self.seeds = task, base, entries, seeds
        settings = {**asdict(base), "model": Path(base.model).parent.name, "threads": None}
        settings |= {"data": task.source, "texts": task.sizes, "seeds": list(seeds)}
        del settings["samples"]  # part of an entry
        self.study = Study(path, settings, origin, summary=[])

    def run(self, stage: str, name: str, rate: float, seed: int, head_rate: float, epochs: int) -> Content:
        """Return the run with these settings; the test split is looked at in the stage "final" alone."""
        entry = self.entries[name]
        config = replace(
            self.base,
            method=entry.method,
            density=entry.density,
            samples=entry.samples,
            lr=rate,
            head_lr=head_rate,
            seed=seed,
            epochs=epochs,
            evaluations=epochs,
        )

        def measure() -> Content:
            started = time.perf_counter()
            done = train(config, self.task, test=stage == "final")
            points, seconds = [point["value"] for point in done["validation"]], time.perf_counter() - started
            print(
                f"{stage}: {name}, lr {rate:g}, seed {seed}: validation {points[-1]:.4f}, {seconds:.0f} s", flush=True
            )
            return {
                "validation": points[-1],
                "validation_by_epoch": points,
                "test": done["test"]["value"] if "test" in done else None,
                "trained_weights": done["trained_weights"],
                "steps": done["steps"],
                "seconds": round(seconds, 1),
            }

        key = {"stage": stage, "name": name, "lr": rate, "head_lr": head_rate, "seed": seed, "epochs": epochs}
        return self.study.run(key, measure)

    def search(self, name: str, head_rate: float) -> float:
        """Return the rate with the best validation accuracy after one epoch of seed 0; see `study.best_rate`."""

        def score(rate: float) -> float:
            head = rate if name == "head" else head_rate
            return float(self.run("search", name, rate, 0, head, 1)["validation"])

        return study.best_rate(score, study.around(self.entries[name].lr))

    def finish(self, rates: Mapping[str, float], head_rate: float) -> Content:
        """Train every entry with its rate and every seed; the content, with a summary of one row an entry."""
        for seed in self.seeds:
            for name, rate in rates.items():
                self.run("final", name, rate, seed, rate if name == "head" else head_rate, self.base.epochs)
        content = self.study.content
        content["summary"] = [row for name in self.entries for row in _summary(content, name)]
        self.study.save()
        return content


def _summary(content: Content, name: str) -> list[dict[str, Any]]:
    runs = [run for run in content["runs"] if run["stage"] == "final" and run["name"] == name]
    if not runs:
        return []
    tests = [run["test"] for run in runs]
    return [
        {
            "name": name,
            "by_seed": {str(run["seed"]): run["test"] for run in runs},
            "lr": runs[0]["lr"],
            "head_lr": runs[0]["head_lr"],
            "trained_weights": runs[0]["trained_weights"],
            "test": statistics.mean(tests),
            "spread": study.spread(tests),
            "validation": statistics.mean(run["validation"] for run in runs),
        }
    ]


def table(content: Content, name: str) -> str:
    settings, rows = content["settings"], content["summary"]
    dense = next((row["by_seed"] for row in rows if row["name"] == "dense"), {})
    lines = []
    for row in sorted(rows, key=lambda row: -row["test"]):
        shared = [test - dense[seed] for seed, test in row["by_seed"].items() if seed in dense]
        lines.append(
            [
                row["name"],
                f"{row['trained_weights']:,}",
                f"{row['lr']:g} ({row['head_lr']:g})",
                f"{row['test']:.1%} ± {row['spread']:.1%}",
                str(len(row["by_seed"])),
                f"{100 * statistics.mean(shared):+.1f} points" if shared and row["name"] != "dense" else "",
            ]
        )
    head = ["method", "trained weights", "learning rate (head)", "test accuracy", "seeds", "against dense"]
    return (
        f"Test accuracy on {settings['data']}, {settings['epochs']} epoch{'s' * (settings['epochs'] > 1)}, "
        "mean ± standard deviation over the seeds.\nThe gap to dense training is over shared seeds.\n\n"
        f"{study.table(head, lines)}\n\n{study.written_by(content, f'python -m benchmarks {name}')}"
    )
