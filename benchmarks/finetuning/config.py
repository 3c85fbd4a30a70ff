"""What decides a run, and the arguments of the experiments on the text task."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models import MODEL_HELP, model_folder
from ..study import Refused, positive


class ModelError(Refused):
    """The model cannot be used; the message says why."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Workers receive it, so it holds plain values only."""

    method: str
    model: str
    task: str = "classification"
    density: float = 0.01
    samples: int = 1024
    lr: float = 1e-4
    head_lr: float = 3e-3
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    max_length: int = 32
    seed: int = 0
    weight_decay: float = 0.01
    warmup: float = 0.06
    evaluations: int = 5
    validation_texts: int | None = 512
    threads: int | None = None
    device: str = "cpu"
    autocast: bool = False


def add_text_arguments(add: Callable[..., Any], epochs: int, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Those of every experiment that fine-tunes a model on the text task."""
    add("--model", default="minilm", help=f"{MODEL_HELP} [%(default)s]")
    add("--data", type=Path, help=".jsonl or .csv with columns text and label [docstrings of scipy and sympy]")
    add("--epochs", type=positive, default=epochs, help="[%(default)s]")
    add("--steps", type=positive, help="at most [all]")
    add("--max-length", type=positive, default=16, help="tokens of a text that are read [%(default)s]")
    add("--seed", type=int, action="append", help=f"repeatable [{', '.join(map(str, seeds))}]")


def config_of(args: argparse.Namespace, **more: Any) -> Config:
    """The settings that those experiments share: bf16 autocast, every text of the validation split."""
    return Config(
        **{
            "method": "dense",
            "model": model_folder(args.model),
            "epochs": args.epochs,
            "steps": args.steps,
            "max_length": args.max_length,
            "autocast": True,
            "validation_texts": None,
            "threads": args.threads,
            **more,
        }
    )
