"""Fine-tune a model under stochastic gates until a share of its encoder is gone, beside dense fine-tuning and LoRA.

    python -m benchmarks gates

MiniLM on the text task of finetune.py, with the settings of accuracy.py: three epochs, 16 tokens, batch 32, bf16
autocast. Methods, all for the same steps:

  dense                       every weight trains; nothing is removed
  LoRA (PEFT)                 low-rank factors on all projections, with biases and norms; nothing is removed
  gates on rows and columns   gates, biases and norms train; 10, 20, 30, 40 % of the encoder's projections are removed
  ... + low-rank              with low-rank factors within the gates
  gates on heads and neurons + low-rank
  ... + rows                  with the rows of the embedding that a batch looks up, by sparse gradients and SparseAdamW

Reported are accuracy on the test split, trained parameters, what is left of the model, how far outputs before and after
compress() are apart, the forward time of the original and of each compressed model on 32 x 64 tokens in fp32, and the
time of training steps.

Every run is added to the results file as soon as it is done, and its compressed model is kept in --work; starting again
continues there. Results: --out, and beside it the same name with .md, .png (accuracy against share removed and against
forward time), _open.png (open gates of each layer).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .finetuning.config import Config, add_text_arguments, config_of
from .finetuning.text_task import load_task
from .gating import report
from .gating.contenders import RANK, Contender, latencies, step_times, train
from .study import Content, Study, in_fresh_process, positive, program

SHARES = (0.1, 0.2, 0.3, 0.4)
SEEDS = (0, 1, 2)


def arguments(add: Callable[..., Any]) -> None:
    add_text_arguments(add, epochs=3, seeds=SEEDS)
    add("--removed", type=float, action="append", help=f"share, repeatable [{', '.join(map(str, SHARES))}]")
    add("--kind", choices=("stg", "finegates", "hard_concrete"), default="stg", help="of gates [%(default)s]")
    add("--rounds", type=positive, default=20, help="of timing [%(default)s]")
    add("--jobs", type=positive, default=2, help="training runs at a time [%(default)s]")
    add("--work", type=Path, default=Path("out/gates"), help="folder for compressed models [%(default)s]")


def entries(shares: tuple[float, ...], kind: str) -> list[Contender]:
    contenders = [Contender("dense"), Contender("lora")]
    contenders += [
        Contender("gates", share, granularity, RANK, kind)
        for share in reversed(shares)
        for granularity in ("row+column", "head+mlp")
    ]
    contenders += [Contender("gates", share, "head+mlp", RANK, kind, embedding=True) for share in reversed(shares)]
    return contenders + [Contender("gates", share, kind=kind) for share in reversed(shares)]


def folder_of(work: Path, contender: Contender, seed: int) -> Path:
    what = (
        contender.granularity.replace("+", "-")
        + ("-low-rank" if contender.rank else "")
        + ("-rows" if contender.embedding else "")
    )
    return work / f"{contender.kind}-{what}-{round(100 * contender.removed)}-seed{seed}"


def measure(args: argparse.Namespace, origin: Content) -> Content:
    seeds, shares, threads = tuple(args.seed or SEEDS), tuple(args.removed or SHARES), args.threads or 1
    contenders, task = entries(shares, args.kind), load_task("classification", args.data)
    settings = {key: getattr(args, key) for key in ("model", "kind", "epochs", "steps", "max_length")}
    settings |= {"data": task.source, "texts": task.sizes, "removed": list(shares), "threads": threads}
    study = Study(args.out, settings, origin)

    def config(contender: Contender, seed: int, threads: int | None = threads) -> Config:
        return config_of(args, lr=contender.lr, head_lr=1e-2, seed=seed, threads=threads)

    def run(contender: Contender, seed: int) -> None:
        def trained() -> Content:
            folder = folder_of(args.work, contender, seed)
            done: Content = in_fresh_process(train, contender, config(contender, seed), task, folder)
            what = f"{contender.name}, {done['removed']:.1%} removed, seed {seed}"
            print(f"{what}: test {done['test']:.4f}, {done['seconds']:.0f} s", flush=True)
            return done

        study.run({"name": contender.name, "asked": contender.removed, "seed": seed}, trained)

    for seed in seeds:
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(run, contender, seed) for contender in contenders]:
                future.result()
    gated = [contender for contender in contenders if contender.way == "gates"]
    folders = {report.label(c.name, c.removed): folder_of(args.work, c, seeds[0]) for c in gated}
    whole, content = config(contenders[0], seeds[0], threads=None), study.content
    content["latency"] = in_fresh_process(latencies, folders, whole, task, (32, 64), args.rounds)
    first = [next(c for c in contenders if c.name == name) for name in dict.fromkeys(c.name for c in contenders)]
    content["step_times"] = in_fresh_process(step_times, first, whole, task, 10 * math.ceil(args.rounds / 5))
    study.save()
    return content


main = program(
    "gates",
    __doc__,
    arguments,
    measure,
    report.markdown,
    report.draw,
    small=("--steps", "10", "--removed", "0.2", "--seed", "0", "--rounds", "2", "--work", "out/small/gates"),
)
