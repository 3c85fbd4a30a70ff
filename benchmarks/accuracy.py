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
import sys
from pathlib import Path

from finetune import default_model
from finetuning.config import Config
from finetuning.study import FACTOR, Entry, Study
from finetuning.text_task import DataError, load_task
from finetuning.training import ModelError

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
SEEDS = (0, 1, 2)
EPOCHS = 3
HEAD_RATES = (1e-3, 3e-3, 1e-2)
ENTRIES = {
    "head": Entry("head", 1.0, 1e-2),
    "dense": Entry("dense", 1.0, 3e-4),
    "sift 5%": Entry("sift", 0.05, 1e-3),
    "sift 1%": Entry("sift", 0.01, 1e-3),
    "random 5%": Entry("random", 0.05, 1e-3),
    "random 1%": Entry("random", 0.01, 1e-3),
}


def search_head(study: Study) -> float:
    """Return the head's learning rate that is best for dense training at a low rate of everything else."""
    low = round(ENTRIES["dense"].lr / FACTOR, 9)
    return max(HEAD_RATES, key=lambda rate: study.run("search", "dense", low, 0, rate, 1)["validation"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, continued if it exists [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [%(default)s]")
    args = parser.parse_args()
    try:
        base = Config(
            method="dense",
            model=default_model(),
            epochs=EPOCHS,
            max_length=16,
            batch_size=32,
            autocast=True,
            validation_texts=None,
            threads=args.threads,
        )
        study = Study(args.out, load_task("classification"), base, ENTRIES, SEEDS)
        head_rate = search_head(study)
        rates = {name: study.search(name, head_rate) for name in ENTRIES}
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
