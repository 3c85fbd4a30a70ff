"""What tests of gates share: gates whose importance is known without training, and what a model gives."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from models import batch, transformer
from torch import Tensor, nn

import sparsekernels as sk

BERT = transformer("bert")  # made once by the server that forks savers; the import of its code takes a second


def measure(gates: sk.methods.gates.Gates, seed: int = 0) -> None:
    """Give every gate an importance, at random, as steps of training do."""
    importance = gates._importance
    generator = torch.Generator().manual_seed(seed)
    importance.squares = torch.rand(len(importance.squares), generator=generator) * importance.elements
    importance.seen = torch.ones_like(importance.squares)


@torch.no_grad()
def outputs(model: nn.Module, kind: str) -> Tensor:
    return model.eval()(**batch(kind, seed=9)).logits


class Saver:
    """A compressed model, as `killing` saves it."""

    def __init__(self, folder: Path) -> None:
        self.model = sk.methods.gates.load(folder, copy.deepcopy(BERT))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
