"""What decides a run."""

from __future__ import annotations

from dataclasses import dataclass


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
