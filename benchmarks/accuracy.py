"""Measure how accurate each way of fine-tuning gets, with its learning rate chosen on the validation split.

    python benchmarks/accuracy.py

The text task and the model of finetune.py, three epochs, three seeds. First every method searches its learning rate
with seed 0 over one epoch: three rates a factor of three apart, and further ones as long as the best lies at an end.
Then it trains with the rate found; the test split is looked at once a run. A method's rate is that of the weights
outside the head. The head has one rate in all methods, the best of three for dense training, which so gets the most
tuning; head-only training searches its own.

Every run is added to the results file as soon as it is finished; starting again continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune import default_model
from finetuning import report
from finetuning.text_task import DataError, TextTask, load_task
from finetuning.training import Config, ModelError, train

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
SEEDS = (0, 1, 2)
EPOCHS = 3
FACTOR = 3.0  # between neighbouring learning rates of the search
MAX_EXTENSIONS = 2  # how often a search may go on past its grid
HEAD_RATES = (1e-3, 3e-3, 1e-2)
METHODS: dict[str, tuple[str, float, float]] = {  # name -> method, density, middle of the learning rates tried
    "head": ("head", 1.0, 1e-2),
    "dense": ("dense", 1.0, 3e-4),
    "sift 5%": ("sift", 0.05, 1e-3),
    "sift 1%": ("sift", 0.01, 1e-3),
    "random 5%": ("random", 0.05, 1e-3),
    "random 1%": ("random", 0.01, 1e-3),
}


class Study:
    """The results file and what is in it."""

    def __init__(self, path: Path, task: TextTask, base: Config) -> None:
        self.path, self.task, self.base = path, task, base
        settings = {**asdict(base), "model": Path(base.model).parent.name, "threads": None, "epochs": EPOCHS}
        settings |= {"data": task.source, "texts": task.sizes, "seeds": list(SEEDS)}
        self.content: dict[str, Any] = {"machine": report.machine(), "settings": settings, "runs": [], "summary": []}
        if path.is_file():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["settings"] != settings:
                raise DataError(f"{path} was measured with other settings; move it away to start afresh")

    def run(self, stage: str, name: str, rate: float, seed: int, head_rate: float, epochs: int) -> dict[str, Any]:
        """Return the run with these settings, training only if the file does not hold it yet."""
        key = {"stage": stage, "name": name, "lr": rate, "head_lr": head_rate, "seed": seed, "epochs": epochs}
        for run in self.content["runs"]:
            if all(run[field] == value for field, value in key.items()):
                return dict(run)
        method, density, _ = METHODS[name]
        config = replace(
            self.base,
            method=method,
            density=density,
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

    def search_head(self) -> float:
        """Return the head's learning rate that is best for dense training at a low rate of everything else."""
        low = round(METHODS["dense"][2] / FACTOR, 9)
        return max(HEAD_RATES, key=lambda rate: self.run("search", "dense", low, 0, rate, 1)["validation"])

    def search(self, name: str, head_rate: float) -> float:
        """Return the learning rate with the best validation accuracy after one epoch."""
        middle = METHODS[name][2]
        scores: dict[float, float] = {}

        def score(rate: float) -> None:
            rate = float(f"{rate:.3g}")
            scores[rate] = self.run("search", name, rate, 0, rate if name == "head" else head_rate, 1)["validation"]

        for rate in (middle / FACTOR, middle, middle * FACTOR):
            score(rate)
        for _ in range(MAX_EXTENSIONS):
            best = max(scores, key=lambda rate: scores[rate])
            if best == max(scores):
                score(best * FACTOR)
            elif best == min(scores):
                score(best / FACTOR)
            else:
                break
        return max(scores, key=lambda rate: scores[rate])

    def summarise(self) -> None:
        rows = []
        for name in METHODS:
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

    def markdown(self, rows: list[dict[str, Any]]) -> str:
        machine, settings = self.content["machine"], self.content["settings"]
        dense = next((row["by_seed"] for row in rows if row["name"] == "dense"), {})
        lines = [
            f"Test accuracy on {settings['data']}, {EPOCHS} epochs, mean ± standard deviation over the seeds.",
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
        lines += ["", f"{machine['cpu']}, torch {machine['versions']['torch']}; `python benchmarks/accuracy.py`.", ""]
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, continued if it exists [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [%(default)s]")
    args = parser.parse_args()
    try:
        base = Config(
            method="dense",
            model=default_model(),
            max_length=16,
            batch_size=32,
            autocast=True,
            validation_texts=None,
            threads=args.threads,
        )
        study = Study(args.out, load_task("classification"), base)
        head_rate = study.search_head()
        rates = {name: study.search(name, head_rate) for name in METHODS}
        for seed in SEEDS:
            for name, rate in rates.items():
                study.run("final", name, rate, seed, rate if name == "head" else head_rate, EPOCHS)
        study.summarise()
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
