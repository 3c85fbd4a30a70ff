"""A study: the same job by several methods, each with its learning rate searched, over several seeds; resumable."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import report
from .config import Config
from .text_task import TextTask
from .training import train

FACTOR = 3.0  # between neighbouring learning rates of the search
MAX_EXTENSIONS = 2  # how often a search may go on past its grid


def best_rate(score: Callable[[float], float], middle: float) -> float:
    """Return the rate that scores best of three, a factor of three apart; goes on while the best is at an end."""
    scores: dict[float, float] = {}

    def try_out(rate: float) -> None:
        rate = float(f"{rate:.3g}")
        scores[rate] = score(rate)

    for rate in (middle / FACTOR, middle, middle * FACTOR):
        try_out(rate)
    for _ in range(MAX_EXTENSIONS):
        best = max(scores, key=lambda rate: scores[rate])
        if best == max(scores):
            try_out(best * FACTOR)
        elif best == min(scores):
            try_out(best / FACTOR)
        else:
            break
    return max(scores, key=lambda rate: scores[rate])


@dataclass(frozen=True)
class Entry:
    """What is studied under a name: a method, its size, and the middle of the learning rates that are tried."""

    method: str
    density: float
    lr: float
    samples: int = 1024


class Study:
    """The results file and what is in it; every run is added to it as soon as it is finished."""

    def __init__(
        self, path: Path, task: TextTask, base: Config, entries: Mapping[str, Entry], seeds: tuple[int, ...]
    ) -> None:
        self.path, self.task, self.base, self.entries = path, task, base, entries
        settings = {**asdict(base), "model": Path(base.model).parent.name, "threads": None}
        settings |= {"data": task.source, "texts": task.sizes, "seeds": list(seeds)}
        del settings["samples"]  # part of an entry
        fresh = {"machine": report.machine(), "settings": settings, "runs": [], "summary": []}
        self.content = report.continued(path, fresh)

    def run(self, stage: str, name: str, rate: float, seed: int, head_rate: float, epochs: int) -> dict[str, Any]:
        """Return the run with these settings, training only if the file does not hold it yet."""
        key = {"stage": stage, "name": name, "lr": rate, "head_lr": head_rate, "seed": seed, "epochs": epochs}
        for run in self.content["runs"]:
            if all(run[field] == value for field, value in key.items()):
                return dict(run)
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
        started = time.perf_counter()
        done = train(config, self.task, test=stage == "final")
        run = {
            **key,
            "validation": done["validation"][-1]["value"],
            "validation_by_epoch": [point["value"] for point in done["validation"]],
            "test": done["test"]["value"] if "test" in done else None,
            "trained_weights": done["trained_weights"],
            "steps": done["steps"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        self.content["runs"].append(run)
        self.save()
        print(
            f"{stage}: {name}, lr {rate:g}, seed {seed}: validation {run['validation']:.4f}, {run['seconds']:.0f} s",
            flush=True,
        )
        return run

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(self.path, self.content)

    def search(self, name: str, head_rate: float) -> float:
        """Return the learning rate with the best validation accuracy after one epoch of seed 0; see `best_rate`."""

        def score(rate: float) -> float:
            head = rate if name == "head" else head_rate
            return float(self.run("search", name, rate, 0, head, 1)["validation"])

        return best_rate(score, self.entries[name].lr)

    def summarise(self) -> list[dict[str, Any]]:
        """One row an entry: mean and spread of its final runs."""
        rows = []
        for name in self.entries:
            runs = [run for run in self.content["runs"] if run["stage"] == "final" and run["name"] == name]
            if runs:
                tests = [run["test"] for run in runs]
                rows.append(
                    {
                        "name": name,
                        "by_seed": {str(run["seed"]): run["test"] for run in runs},
                        "lr": runs[0]["lr"],
                        "head_lr": runs[0]["head_lr"],
                        "trained_weights": runs[0]["trained_weights"],
                        "test": statistics.mean(tests),
                        "spread": report.spread(tests),
                        "validation": statistics.mean(run["validation"] for run in runs),
                    }
                )
        self.content["summary"] = rows
        self.save()
        report.write_text(self.path.with_suffix(".md"), self.markdown(rows))
        return rows

    def markdown(self, rows: list[dict[str, Any]]) -> str:
        machine, settings = self.content["machine"], self.content["settings"]
        dense = next((row["by_seed"] for row in rows if row["name"] == "dense"), {})
        epochs = f"{settings['epochs']} epoch" + "s" * (settings["epochs"] > 1)
        lines = [
            f"Test accuracy on {settings['data']}, {epochs}, mean ± standard deviation over the seeds.",
            "The gap to dense training is over shared seeds.",
            "",
            "| method | trained weights | learning rate (head) | test accuracy | seeds | against dense |",
            "|---|---|---|---|---|---|",
        ]
        for row in sorted(rows, key=lambda row: -row["test"]):
            shared = [test - dense[seed] for seed, test in row["by_seed"].items() if seed in dense]
            gap = f"{100 * statistics.mean(shared):+.1f} points" if shared and row["name"] != "dense" else ""
            lines.append(
                f"| {row['name']} | {row['trained_weights']:,} | {row['lr']:g} ({row['head_lr']:g}) "
                f"| {row['test']:.1%} ± {row['spread']:.1%} | {len(row['by_seed'])} | {gap} |"
            )
        script = self.path.with_suffix(".py").name
        lines += ["", f"{machine['cpu']}, torch {machine['versions']['torch']}; `python benchmarks/{script}`.", ""]
        return "\n".join(lines)
