"""Runs that stop and go on in another process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

STEPS = 6
RESELECT_AFTER = 2


class Small(nn.Module):
    """A tied embedding, a norm and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(23, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.head = nn.Linear(8, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.embed(ids)).tanh()))


@dataclass(frozen=True)
class Case:
    form: str  # compact, indexed or dense
    dtype: str = "float32"
    amsgrad: bool = False
    reselect: bool = False  # change the selection after RESELECT_AFTER steps
    restore: bool = True
    model_first: bool = True  # which of the two is loaded first
    stop: int = 3

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


def cases() -> Iterator[Case]:
    for form, dtype, amsgrad in product(("compact", "indexed", "dense"), ("float32", "bfloat16"), (False, True)):
        for stop in range(STEPS):
            yield Case(form, dtype, amsgrad, model_first=bool(stop % 2), stop=stop)
    for order in (True, False):
        yield Case("compact", "float16", model_first=order)
        yield Case("compact", "bfloat16", model_first=order)
    for form, dtype, stop in product(("compact", "indexed"), ("float32", "bfloat16"), range(1, STEPS)):
        for restore in (True, False) if form == "compact" else (True,):
            yield Case(form, dtype, True, reselect=True, restore=restore, stop=stop, model_first=bool(stop % 2))


def selection(number: int) -> Selection:
    """Two selections that share positions, drop a tensor and bring in another, in an order of their own."""
    shapes = {"up.weight": (8, 8), "up.bias": (8,), "norm.weight": (8,)}
    rows = Index(torch.tensor([[1, 2, 5], [2, 5, 6, 20]][number]), (23, 8), granularity="row")
    names = [["up.weight", "norm.weight"], ["up.bias", "up.weight"]][number]
    chosen = dict(Selection.random(shapes, 0.5, seed=number, names=names))
    return Selection({names[0]: chosen[names[0]], "embed.weight": rows, names[1]: chosen[names[1]]})


class Run:
    def __init__(self, case: Case, number: int = 0) -> None:
        self.case = case
        self.model = Small().to(getattr(torch, case.dtype))
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()}
        options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": case.amsgrad}
        self.tuned: sk.SparseModel | None = None
        if case.form == "compact":
            self.tuned = sk.train_only(self.model, selection(number))
            self.optimizer = sk.SparseAdamW(self.tuned.parameters(), **options)
        elif case.form == "indexed":
            self.optimizer = sk.SparseAdamW(selection(number).param_groups(self.model), **options)
        else:
            self.optimizer = sk.SparseAdamW(self.model.parameters(), **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def reselect(self) -> None:
        if self.tuned is not None:
            self.tuned.reselect(selection(1), self.optimizer, restore=self.case.restore)
        else:
            self.optimizer.reselect(selection(1), self.model)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            if self.case.reselect and step == RESELECT_AFTER:
                self.reselect()
            self.optimizer.zero_grad()
            ids = torch.randint(0, 23, (3, 5), generator=torch.Generator().manual_seed(step))
            self.model(ids).float().square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def checkpoint(self) -> dict[str, Any]:
        return {
            "case": asdict(self.case),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    @classmethod
    def resume(cls, checkpoint: dict[str, Any]) -> Run:
        """From the base weights, the selections or the last of them, and the checkpoint."""
        case = Case(**checkpoint["case"])
        reselected = case.reselect and case.stop > RESELECT_AFTER
        if reselected and case.restore and case.stop % 2:
            run = cls(case, 1)
        else:
            run = cls(case)
            if reselected:
                run.reselect()
        loads = [
            lambda: run.model.load_state_dict(checkpoint["model"]),
            lambda: run.optimizer.load_state_dict(checkpoint["optimizer"]),
        ]
        for load in loads if run.case.model_first else reversed(loads):
            load()
        run.scheduler.load_state_dict(checkpoint["scheduler"])
        return run

    def everything(self) -> dict[str, Tensor]:
        """Weights, values, state, the delta, and what restore() makes of it all: the run is over then."""
        found = {f"weight {name}": value.clone() for name, value in self.model.state_dict().items()}
        for number, group in enumerate(self.optimizer.param_groups):
            found[f"lr {number}"] = torch.tensor(group["lr"], dtype=torch.float64)
            for i, p in enumerate(group["params"]):
                found[f"parameter {number} {i}"] = p.detach().clone()
                found |= {f"{name} {number} {i}": value.clone() for name, value in self.optimizer.state[p].items()}
        if self.tuned is not None:
            for name, change in self.tuned.delta().changes.items():
                found |= {f"delta {name}": change.values, f"positions {name}": change.index.positions}
            found |= {f"base {name}": value.clone() for name, value in self.tuned.restore().state_dict().items()}
        return found


def resume_all(folder: Path) -> None:
    """Go on with every checkpoint in there."""
    for path in sorted(folder.glob("*.checkpoint")):
        run = Run.resume(torch.load(path, weights_only=True))
        run.train(run.case.stop, STEPS)
        torch.save(run.everything(), path.with_suffix(".result"))
