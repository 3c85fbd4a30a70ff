"""Reduce the rank of a fine-tuned model's weights: LASER found by gradients, by searching everything, or at random.

    python -m benchmarks laser

The model is MiniLM, fine-tuned on the text task of finetune.py (three epochs, 16 tokens; kept in --work, so that it is
trained once), or any --model with --data of your own, taken as it is. For each seed:

  adapt   `laser.adapt`: a backward over --samples texts of the validation split ranks all matrices at every rho, the 16
          best reductions are evaluated on the same texts; up to 3 matrices are reduced, one after the other
  search  `laser.search`: every matrix at every rho is evaluated on the whole validation split
  random  as many reductions as adapt evaluates, on the same texts, drawn at random
  adapt by rows  the same as adapt, which may also reduce four blocks, or four clusters, of rows each on its own

each of them with accuracy as its aim (among equals the smaller loss), adapt and random once more with the loss.
Reported are accuracy and loss on the test split, texts that were evaluated (a backward counts as three), wall time with
all decompositions, parameters saved; how well predicted gains agree with those that search measured on the validation
split, and with those on the same texts; and the time of ranking beside that of a plain forward and backward.

Every seed is added to the results file as soon as it is done; a new start continues there. Results: --out, and beside
it the same name with .md, _gains.png (layer x matrix, predicted and measured), _correlation.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model

import sparsekernels as sk
from sparsekernels.methods import laser

from .finetuning.config import Config, add_text_arguments, config_of
from .finetuning.text_task import TextTask, load_task
from .finetuning.training import Loaded, load, train
from .reducing import contenders, report
from .study import Content, Study, in_fresh_process, positive, program

SEEDS = (0, 1, 2)


def arguments(add: Callable[..., Any]) -> None:
    add_text_arguments(add, epochs=3, seeds=SEEDS)
    add("--task", choices=("classification", "causal-lm"), default="classification", help="[%(default)s]")
    add("--samples", type=positive, default=100, help="texts that adapt and random look at [%(default)s]")
    add("--validation-texts", type=positive, help="texts that search evaluates [the whole split]")
    add("--rho", type=float, action="append", help=f"repeatable [{', '.join(map(str, laser.RHOS))}]")
    add("--work", type=Path, default=Path("out/laser"), help="folder for fine-tuned models [%(default)s]")


def settings_of(args: argparse.Namespace, seed: int) -> Config:
    """Those of accuracy.py: the dense run of it is the model here."""
    return config_of(args, task=args.task, lr=3e-4, head_lr=1e-2, seed=seed)


def fine_tuned(args: argparse.Namespace, task: TextTask, seed: int) -> Loaded:
    """The model to reduce, trained in a process of its own the first time."""
    config = settings_of(args, seed)
    if args.model != "minilm":
        return load(config, task)
    size = f"{config.epochs}x{config.max_length}" + (f"-{config.steps}" if config.steps else "")
    data = args.data.stem if args.data else "docstrings"
    path = args.work / f"minilm-{args.task}-{data}-{size}-seed{seed}.safetensors"
    if not path.is_file():
        args.work.mkdir(parents=True, exist_ok=True)
        in_fresh_process(train_and_keep, config, task, path)
    loaded = load(config, task)
    load_model(loaded.model, str(path))
    return loaded


def train_and_keep(config: Config, task: TextTask, path: Path) -> None:
    train(config, task, test=False, keep=path)


def run_seed(args: argparse.Namespace, task: TextTask, seed: int) -> dict[str, Any]:
    """Everything that is measured with one model and one draw of texts."""
    if args.threads:
        torch.set_num_threads(args.threads)
    config, loaded, rhos = settings_of(args, seed), fine_tuned(args, task, seed), args.rho or list(laser.RHOS)
    model = loaded.model.eval()
    samples = loaded.batches(config, "validation", limit=args.samples, draw=seed)
    validation = loaded.batches(config, "validation", limit=args.validation_texts)
    test = loaded.batches(config, "test")
    print(f"seed {seed}: {contenders.count(samples)} texts to adapt on, {contenders.count(validation)} to search on")
    done: dict[str, Any] = {
        "test_before": asdict(contenders.quality(model, test)),
        "matrices": sum(m.shape[0] * m.shape[1] for m in sk.matrices(model).values()),
        "found": {},
    }

    def note(name: str, found: contenders.Found) -> None:
        entry = {
            "test": asdict(contenders.quality(model, test)),
            "seconds": found.seconds,
            "texts": found.texts,
            "evaluations": found.evaluations,
            "saved": found.reduced.parameters_saved,
            "plan": [asdict(reduction) for reduction in found.reduced.plan],
        }
        found.reduced.revert()
        done["found"][name] = entry
        plan = "; ".join(map(str, found.reduced.plan)) or "nothing"
        print(f"  {name}: test accuracy {entry['test']['accuracy']:.4f}, {found.seconds:.0f} s: {plan}", flush=True)

    for aim in ("accuracy", "loss"):
        note(f"adapt, {aim}", contenders.adapt(model, samples, aim, rhos))
        note(f"random, {aim}", contenders.chance(model, samples, aim, rhos, seed))
    rows = {"blocks": (1, 4), "clusters": (4,)}
    note("adapt by rows, accuracy", contenders.adapt(model, samples, "accuracy", rhos, **rows))
    seen: list[contenders.Quality] = []
    found = contenders.search(model, validation, "accuracy", rhos, seen)
    tried = found.reduced.report["candidates"]
    note("search, accuracy", found)
    done["gains"] = gains(model, samples, tried, seen, rhos)
    return done


def time_ranking(args: argparse.Namespace, task: TextTask, seed: int) -> dict[str, float]:
    """Ranking beside a plain forward and backward, on the texts of a seed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    config, loaded = settings_of(args, seed), fine_tuned(args, task, seed)
    samples = loaded.batches(config, "validation", limit=args.samples, draw=seed)
    return contenders.compare_times(loaded.model, samples, args.rho or list(laser.RHOS))


def gains(model: Any, samples: Any, tried: Any, seen: Any, rhos: list[float]) -> list[dict[str, Any]]:
    """Of every reduction: the predicted gain, the measured one on the same texts, those of search on validation."""
    ranking = laser.rank(model, samples, rhos=rhos, progress=False)
    predicted = {(r.matrix, r.rho): r.predicted for r in ranking}
    before, found = seen[0], []
    with torch.no_grad():
        loss = contenders.quality(model, samples).loss
        for reduction, after in zip(tried, seen[1:], strict=False):
            with laser.reduce(model, [reduction], factored=False, decompositions=ranking.decompositions):
                same = loss - contenders.quality(model, samples).loss
            found.append(
                {
                    "matrix": reduction.matrix,
                    "rho": reduction.rho,
                    "predicted": predicted[reduction.matrix, reduction.rho],
                    "measured": same,
                    "validation": before.loss - after.loss,
                    "validation_accuracy": after.accuracy - before.accuracy,
                }
            )
    return found


def measure(args: argparse.Namespace, origin: Content) -> Content:
    seeds, task = args.seed or list(SEEDS), load_task(args.task, args.data)
    kept = ("model", "task", "samples", "validation_texts", "max_length", "epochs", "steps")
    settings = {key: getattr(args, key) for key in kept}
    settings |= {"data": task.source, "texts": task.sizes, "rho": args.rho or list(laser.RHOS)}
    study = Study(args.out, settings, origin, seeds=[])
    if "times" not in study.content:
        study.content["times"] = in_fresh_process(time_ranking, args, task, seeds[0])
    for seed in seeds:
        study.run({"seed": seed}, lambda seed=seed: in_fresh_process(run_seed, args, task, seed), into="seeds")
    return study.content


main = program(
    "laser",
    __doc__,
    arguments,
    measure,
    report.markdown,
    report.draw,
    small=(
        *("--steps", "10", "--seed", "0", "--samples", "16", "--validation-texts", "16", "--rho", "0.2"),
        *("--work", "out/small/laser"),
    ),
)
