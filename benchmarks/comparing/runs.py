"""Runs of contenders on a task: training, the search of rates, several at a time, and what a table says of them."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import Any

import torch
from torch import nn

from .. import study
from ..finetuning.memory import PeakMemory
from ..study import MAX_EXTENSIONS, MIB, Content, Refused, Study, best_rate
from .contenders import BLOCK, Contender, prepare, reselect
from .tasks import Task

SEARCH_SEED = 0
UNTUNED = "untuned"
WARM_UP = 0.1  # of the steps; then the rate falls to zero, linearly
Contenders = Mapping[str, Contender]
MakeTask = Callable[[argparse.Namespace], Task]


def train(task: Task, contender: Contender, rate: float, seed: int) -> Content:
    """One run: scores on the validation and the test split, and what it took; seconds are CPU time of all of it."""
    started = time.process_time()
    model, found = fit(task, contender, rate, seed)
    found = {**scores(task, model, ("validation", "test")), **found}
    return {**found, "cpu_seconds": round(time.process_time() - started, 1)}


def fit(task: Task, contender: Contender, rate: float, seed: int) -> tuple[nn.Module, Content]:
    """The trained model, in eval mode, and what it took. The peak is that of the process, above the loaded model."""
    model, given = task.model(seed).train(), task.train(seed)
    gc.collect()
    peak = PeakMemory("cpu")
    peak.start()
    prepared = prepare(contender, task, model, given, rate, seed)
    optimizer, copy = prepared.optimizer, task.model(seed) if contender.every else None
    rates = [group["lr"] for group in optimizer.param_groups]
    warm = max(1, round(WARM_UP * len(given)))
    torch.manual_seed(seed)  # the same dropout for every contender, whatever its choice drew
    for step, batch in enumerate(given):
        if copy is not None and step and step % contender.every == 0:
            reselect(contender, prepared, copy, [*given[step:], *given[:step]], seed + step)
        scale = min((step + 1) / warm, (len(given) - step) / max(1, len(given) - warm))
        for group, highest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = highest * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prepared.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = {"peak_bytes": peak.read(), "trained_weights": sum(p.numel() for p in prepared.parameters)}
    found["bytes_to_ship"] = prepared.bytes_to_ship
    return model.eval(), found


def scores(task: Task, model: nn.Module, splits: Sequence[str]) -> Content:
    """Of each split; of a task whose answers are right or wrong, also how many of the last split are right."""
    found = {split: task.score(model, task.held_out(split)) for split in splits}
    return {**found, "right": task.right(model, task.held_out(splits[-1]))} if task.checkable else found


def untuned(task: Task) -> Content:
    return scores(task, task.model(SEARCH_SEED).eval(), ["test"])


# ---- several at a time

_task: Task  # of a worker


def _begin(make_task: MakeTask, args: argparse.Namespace, threads: int) -> None:
    global _task
    torch.set_num_threads(threads)
    _task = make_task(args)


def _in_worker(function: Callable[..., Content], *arguments: Any) -> Content:
    return function(_task, *arguments)


@contextmanager
def caller(task: Task, make_task: MakeTask, args: argparse.Namespace) -> Iterator[Callable[..., Content]]:
    """What calls a function with the task: here, or, with several --workers, in one of that many processes."""
    if args.workers == 1:
        yield lambda function, *arguments: function(task, *arguments)
        return
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.workers)
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _begin, (make_task, args, threads))
    with pool:
        yield lambda function, *arguments: pool.submit(_in_worker, function, *arguments).result()


# ---- the study


def arguments(add: Callable[..., Any], names: Sequence[str]) -> None:
    add("--steps", type=study.positive, help="steps of a run [50; grains-text: an epoch]")
    add("--batch-size", type=study.positive, help="texts of a batch [8; grains-text: 32]")
    add("--seeds", type=study.positive, default=3, help="runs with the rate that was found [%(default)s]")
    add("--workers", type=study.positive, default=1, help="runs at a time, each in a process [%(default)s]")
    add("--only", nargs="+", metavar="NAME", choices=list(names), help="measure these contenders alone")


def measure(
    args: argparse.Namespace,
    origin: Content,
    make_task: MakeTask,
    contenders: Contenders,
    rates: Callable[[float], Sequence[float]] = study.around,
) -> Content:
    """`rates`: those that are tried first, given the middle."""
    names = args.only or list(contenders)
    task = make_task(args)
    settings = {"steps": task.steps, "batch_size": task.batch_size, "block": list(BLOCK), "seeds": args.seeds}
    if (count := len(rates(1.0))) != 3:
        settings["rates"] = count
    results = Study(args.out, settings | task.settings, origin)
    sign = 1 if task.higher else -1
    stop = Event()
    with caller(task, make_task, args) as call:

        def run(name: str, rate: float, seed: int) -> Content:
            def once() -> Content:
                if stop.is_set():
                    raise Refused("another run has failed, or was interrupted")
                found = call(train, contenders[name], rate, seed)
                print(f"{name}, lr {rate:g}, seed {seed}: {found}", flush=True)
                return found

            return results.run({"name": name, "lr": rate, "seed": seed}, once)

        def whole(name: str) -> None:
            grid = rates(contenders[name].lr)
            rate = best_rate(lambda rate: sign * run(name, rate, SEARCH_SEED)["validation"], grid)
            for seed in range(args.seeds):
                run(name, rate, seed)

        results.run({"name": UNTUNED, "lr": 0.0, "seed": SEARCH_SEED}, partial(call, untuned))
        if args.workers == 1:
            for name in names:
                whole(name)
            return results.content
        with ThreadPoolExecutor(args.workers) as threads:
            try:
                for future in as_completed([threads.submit(whole, name) for name in names]):
                    future.result()
            except BaseException:
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    return results.content


def final_runs(content: Content, name: str, higher: bool = False) -> list[Content]:
    """The runs with the rate of the best validation score, in the order of their seeds; none if some are missing."""
    runs = [run for run in content["runs"] if run["name"] == name]
    search = [run for run in runs if run["seed"] == SEARCH_SEED]
    best = max if higher else min
    rate = best(search, key=lambda run: run["validation"])["lr"] if search else None
    rates = [run["lr"] for run in search]
    fewest = content["settings"].get("rates", 3)
    if len(rates) < fewest or (rate in (min(rates), max(rates)) and len(rates) < fewest + MAX_EXTENSIONS):
        return []  # the search goes on
    found = sorted((run for run in runs if run["lr"] == rate), key=lambda run: run["seed"])
    return found if len(found) == content["settings"]["seeds"] else []


def tried(content: Content, name: str) -> list[float]:
    return [run["lr"] for run in content["runs"] if run["name"] == name and run["seed"] == SEARCH_SEED]


def before(content: Content) -> float:
    """The test score of the model as it was loaded."""
    (score,) = [run["test"] for run in content["runs"] if run["name"] == UNTUNED]
    return float(score)


def rows_of(content: Content, contenders: Contenders, program: str, about: str, higher: bool) -> str:
    """The table: what is trained, the score, the gap to dense training, the rate, and what runs tell of their costs."""
    finished = {name: runs for name in contenders if (runs := final_runs(content, name, higher))}
    if not finished:
        raise Refused("no contender was measured to the end")
    base, dense = before(content), finished.get("dense", [])
    every = [run for runs in finished.values() for run in runs]
    told = {key for key in ("right", "peak_bytes", "bytes_to_ship", "cpu_seconds") if all(key in run for run in every)}
    form, gap, scale = (".1%", ".1f", 100) if higher else (".3f", ".3f", 1)
    alone = content["settings"]["seeds"] == 1
    rows = []
    for name, runs in finished.items():
        scores, rates = [run["test"] for run in runs], tried(content, name)
        pairs = [(run["test"], other["test"]) for run, other in zip(runs, dense, strict=False)]
        against = statistics.mean(mine - other for mine, other in pairs) if pairs and name != "dense" else None
        row = {
            "": name,
            "trained weights": f"{runs[0]['trained_weights']:,}",
            f"test {'accuracy' if higher else 'loss'}": f"{scores[0]:{form}}"
            if alone
            else study.mean_and_spread(scores, form),
            "against dense": "" if against is None else f"{scale * against:+{gap}}{' points' * higher}",
            "learning rate": f"{runs[0]['lr']:g}",
            "tried": f"{min(rates):g} to {max(rates):g}",
        }
        if "right" in told:
            row["right answers"] = f"{statistics.mean(run['right'] for run in runs):.0%}"
        if "peak_bytes" in told:
            gains = [(base - mine) / (base - other) for mine, other in pairs]
            row["of dense training's gain"] = f"{statistics.mean(gains):.0%}" if gains else ""
            row["peak above the model"] = f"{statistics.median(run['peak_bytes'] for run in runs) / MIB:,.0f} MiB"
        if "bytes_to_ship" in told:
            row["to ship"] = f"{runs[0]['bytes_to_ship'] / MIB:,.1f} MiB"
        if "cpu_seconds" in told:
            row["CPU seconds"] = f"{statistics.median(run['cpu_seconds'] for run in runs):.0f}"
        rows.append(row)
    settings = content["settings"]
    said = f"{about}, {settings['steps']} steps of {settings['batch_size']}; before: {base:{form}}. " + (
        "One seed." if alone else f"Mean ± standard deviation over {settings['seeds']} seeds."
    )
    table = study.table(list(rows[0]), [list(row.values()) for row in rows])
    return "\n".join([said, "", table, "", study.written_by(content, f"python -m benchmarks {program}")])
