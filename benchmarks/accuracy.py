"""How accurate each way of fine-tuning gets, with its learning rate chosen on the validation split.

    python -m benchmarks accuracy

The text task and the model of finetune.py, three epochs, three seeds. First every method searches its learning rate
with seed 0 over one epoch: three rates a factor of three apart, and further ones as long as the best lies at an end.
Then it trains with the rate found; the test split is looked at once a run. A method's rate is that of the weights
outside the head. The head has one rate in all methods, the best of three for dense training, which so gets the most
tuning; head-only training searches its own.

Every run is added to the results file as soon as it is finished; starting again continues where it stopped.
"""

from __future__ import annotations

import argparse
from functools import partial

from .finetuning.config import add_text_arguments, config_of
from .finetuning.text_task import load_task
from .finetuning.trainings import Entry, Trainings, table
from .study import FACTOR, Content, program

SEEDS = (0, 1, 2)
HEAD_RATES = (1e-3, 3e-3, 1e-2)
ENTRIES = {
    "head": Entry("head", 1.0, 1e-2),
    "dense": Entry("dense", 1.0, 3e-4),
    "sift 5%": Entry("sift", 0.05, 1e-3),
    "sift 1%": Entry("sift", 0.01, 1e-3),
    "random 5%": Entry("random", 0.05, 1e-3),
    "random 1%": Entry("random", 0.01, 1e-3),
}


def measure(args: argparse.Namespace, origin: Content) -> Content:
    base, task = config_of(args, threads=args.threads or 1), load_task("classification", args.data)
    trainings = Trainings(args.out, task, base, ENTRIES, args.seed or SEEDS, origin)
    low = round(ENTRIES["dense"].lr / FACTOR, 9)  # of everything but the head, while the head's rate is searched
    head_rate = max(HEAD_RATES, key=lambda rate: trainings.run("search", "dense", low, 0, rate, 1)["validation"])
    return trainings.finish({name: trainings.search(name, head_rate) for name in ENTRIES}, head_rate)


main = program(
    "accuracy",
    __doc__,
    partial(add_text_arguments, epochs=3, seeds=SEEDS),
    measure,
    partial(table, name="accuracy"),
    small=("--steps", "2", "--epochs", "1", "--seed", "0"),
)
