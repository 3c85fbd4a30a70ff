"""Two deltas on one base: trained one after the other, then swapped on one model while it serves.

Shows that each delta gives the outputs of the model it was trained in, bit for bit, that after the last one is reverted
the base is what it was, and what a swap costs. The model is MiniLM, the tasks: is this docstring from asyncio, or is it
from xml (or else from elsewhere in Python's library)?

    python examples/two_deltas.py
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import transformers
from offline import OUT, docstrings, minilm
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparsekernels as sk

TASKS = ("asyncio", "xml")


def batches_of(rows: list[tuple[str, str]], task: str, size: int = 16) -> list[dict[str, Tensor]]:
    """Batches of docstrings, labelled 1 where the package is that of the task."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    batches = []
    for start in range(0, len(rows), size):
        names, texts = zip(*rows[start : start + size], strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=24, padding=True, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([int(name.startswith(task)) for name in names])})
    return batches


@torch.no_grad()
def logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model(**batch).logits for batch in batches])


def main(epochs: int = 2) -> dict[str, Any]:
    rows = docstrings(("asyncio", "email", "xml"))
    random.Random(0).shuffle(rows)
    train, held_out = rows[100:420], rows[:100]
    transformers.set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}

    trained, accuracy = {}, {}
    for task in TASKS:
        batches, test = batches_of(train, task), batches_of(held_out, task)
        with sk.train_only(model, sk.methods.sift(model, batches, density=0.01)) as tuned:  # on leaving: the base again
            optimizer = sk.SparseAdamW(tuned.parameters(), lr=2e-3)
            for batch in batches * epochs:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            trained[task] = logits(model, test)
            tuned.delta().save(OUT / f"{task}.safetensors")
        answers = torch.cat([batch["labels"] for batch in test])
        accuracy[task] = (trained[task].argmax(-1) == answers).float().mean().item()
        most = max(answers.float().mean().item(), 1 - answers.float().mean().item())
        print(f"{task}: {accuracy[task]:.0%} of held-out docstrings right, {most:.0%} by always saying the same")

    deltas = {task: sk.Delta.load(OUT / f"{task}.safetensors") for task in TASKS}
    applied = deltas["asyncio"].apply(model)
    same, seconds = {}, []
    for task in ("xml", "asyncio") * 3:
        start = time.perf_counter()
        applied = applied.swap(deltas[task])
        seconds.append(time.perf_counter() - start)
        same[task] = torch.equal(logits(model, batches_of(held_out, task)), trained[task])
    applied.revert()
    restored = all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items())

    sizes = {task: (OUT / f"{task}.safetensors").stat().st_size for task in TASKS}
    whole = sum(weight.nbytes for weight in base.values())
    print("outputs equal those of the model each was trained in, bit for bit:", same)
    print("after revert() the base is what it was, bit for bit:", restored)
    print(f"a swap takes {sorted(seconds)[len(seconds) // 2] * 1e3:.1f} ms (median of {len(seconds)})")
    print(f"{deltas['asyncio'].overlap(deltas['xml'])} are in both")
    print(
        *(f"{task}: {size / 2**20:.2f} MiB" for task, size in sizes.items()),
        f"model: {whole / 2**20:.1f} MiB",
        sep=", ",
    )
    return {"accuracy": accuracy, "same": same, "restored": restored, "sizes": sizes, "whole": whole}


if __name__ == "__main__":
    main()
