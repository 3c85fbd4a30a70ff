"""What large models would hold and communicate under fully_shard, from shapes alone. Nothing here is measured.

Weights are bf16 and each block is sharded by itself, as in the measured part. Selected values and adapters are fp32,
with fp32 moments and gradients, and gathered as they are; what is written into the weights after a step is gathered in
bf16. Dense training is counted both ways: all in bf16, moments too, and with fp32 weights, moments and gradients, of
which the weights are gathered in bf16. All is that of the first rank, whose chunks are full.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..gpu_training.llama import Shape
from ..study import Content
from .counting import beyond, chunk, frozen_elements, padded

MODELS = (
    Shape("Llama-3 70B", 8192, 28_672, 80, heads=64, kv_heads=8, vocab=128_256, tied=False),
    Shape("Llama-3 405B", 16_384, 53_248, 126, heads=128, kv_heads=8, vocab=128_256, tied=False),
)
GPUS = (64, 512)
RANK = 16  # of LoRA
Sizes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """How a contender trains.

    Attributes:
        added: shapes of its tensors beside the weights of the model.
        positions: how many a rank keeps, given the number of ranks.
        written: bytes an element that are gathered after the step.
    """

    name: str
    added: Sizes
    positions: Callable[[int], int] = lambda ranks: 0
    written: int = 0


def recipes(shape: Shape) -> list[Recipe]:
    """Those that leave the weights frozen."""
    lora: Sizes = [size for m, n in shape.matrices for size in ((RANK, n), (m, RANK))]
    columns: Sizes = [(m, math.ceil(n / 20)) for m, n in shape.matrices]
    elements: Sizes = [(math.ceil(m * n / 100),) for m, n in shape.matrices]
    k = padded(elements, 1)
    return [
        Recipe(f"LoRA r={RANK}", lora),
        # Twice: as selected, and within what backward keeps of an input.
        Recipe("5 % of columns", columns, lambda ranks: 2 * sum(c for _, c in columns)),
        # Twice: all of them, and those in the rows of this rank.
        Recipe("1 % of elements", elements, lambda ranks: k + k // ranks, written=2),
    ]


def blocks_and_root(shape: Shape) -> tuple[Sizes, Sizes]:
    """Shapes of the weights in blocks, and of the rest."""
    hidden = (shape.hidden,)
    return [*shape.matrices, *[hidden] * (2 * shape.layers)], [*[(shape.vocab, shape.hidden)] * 2, hidden]


def dense(shape: Shape, ranks: int) -> list[Content]:
    blocks, root = blocks_and_root(shape)
    held = sum(chunk(size, ranks) for size in blocks + root)
    gathered, reduced = 2 * frozen_elements(blocks, root, ranks), padded(blocks + root, ranks)

    def one(name: str, weights: int, moments: int, gradients: int) -> Content:
        parts = {"weights": weights * held, "moments": moments * held, "gradients": gradients * held}
        return {
            "name": name,
            "trained": shape.weights,
            "held": {**parts, "values": 0, "positions": 0},
            "weights_gathered": gathered,
            "beyond": gradients * reduced,
        }

    return [one("dense AdamW, all bf16", 2, 4, 2), one("dense AdamW, fp32 weights gathered in bf16", 4, 8, 4)]


def sparse(shape: Shape, ranks: int, recipe: Recipe) -> Content:
    blocks, root = blocks_and_root(shape)
    values = sum(chunk(size, ranks) for size in recipe.added)
    return {
        "name": recipe.name,
        "trained": padded(recipe.added, 1),
        "held": {
            "weights": 2 * sum(chunk(size, ranks) for size in blocks + root),
            "values": 4 * values,
            "moments": 8 * values,
            "gradients": 4 * values,
            "positions": 4 * recipe.positions(ranks),
        },
        "weights_gathered": 2 * frozen_elements(blocks, root, ranks),
        "beyond": sum(beyond(recipe.added, ranks, written=recipe.written).values()),
    }


def computed(gbytes_per_second: float) -> list[Content]:
    """A record for each model and number of GPUs."""
    found = []
    for shape in MODELS:
        for ranks in GPUS:
            contenders = [*dense(shape, ranks), *(sparse(shape, ranks, recipe) for recipe in recipes(shape))]
            for each in contenders:
                moved = (each["weights_gathered"] + each["beyond"]) * (ranks - 1) / ranks
                each["seconds"] = moved / (1e9 * gbytes_per_second)
            found.append({"model": shape.name, "weights": shape.weights, "gpus": ranks, "contenders": contenders})
    return found
