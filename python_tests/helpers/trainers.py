"""A Trainer of transformers on a few tiny texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from models import batch
from torch import Tensor, nn


class Lines(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in batch("bert", rows=1, seed=i).items()}


def trainer(
    model: nn.Module,
    folder: Path,
    optimizer: torch.optim.Optimizer | None,
    *,
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    **more: Any,
) -> transformers.Trainer:
    arguments = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "save_steps": 3,
        "save_strategy": "steps",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "max_steps": 6,
        "lr_scheduler_type": "linear",
        "logging_strategy": "no",
        **more,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=Lines(),
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )
