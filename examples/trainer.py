"""The Hugging Face Trainer: evaluation, checkpoints and resuming, with 1 % of the encoder and the head trained.

Shows that nothing of Trainer changes but `optimizers=`, that its checkpoints hold a plain model, and that a run resumed
from one ends with the same bits as the run that was not interrupted. The model is MiniLM, the task: from which package
of Python's library is this docstring?

    python examples/trainer.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from offline import OUT, docstrings, minilm
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import sparsekernels as sk

PACKAGES = ("asyncio", "email", "http", "logging", "unittest", "xml")


def dataset() -> tuple[list[Any], list[Any]]:
    """Rows to train on and to evaluate on: docstrings without the names of the packages, and their labels."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    rows = []
    for label, package in enumerate(PACKAGES):
        for _, text in docstrings([package]):
            for word in PACKAGES:
                text = text.replace(word, "")
            rows.append({**tokenizer(text, truncation=True, max_length=32), "labels": label})
    random.Random(0).shuffle(rows)
    return rows[100:], rows[:100]


def prepared(train: list[Any]) -> tuple[nn.Module, sk.SparseModel, sk.SparseAdamW]:
    """The base with a fresh head, what of it trains, and its optimizer: the same each time it is called."""
    transformers.set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(PACKAGES))
    loader = torch.utils.data.DataLoader(
        train[:32],
        batch_size=32,
        collate_fn=transformers.DataCollatorWithPadding(AutoTokenizer.from_pretrained(minilm())),
    )
    tuned = sk.train_only(model, sk.methods.sift(model, loader, density=0.01))
    return model, tuned, sk.SparseAdamW(tuned.parameters(), lr=2e-3)


def main(steps: int = 100) -> dict[str, Any]:
    train, evaluation = dataset()

    def trainer(model: nn.Module, optimizer: sk.SparseAdamW, folder: Path) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=50,
            eval_strategy="steps",
            eval_steps=steps // 2,
            save_steps=steps // 2,
            logging_steps=steps // 2,
            lr_scheduler_type="linear",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        return Trainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=AutoTokenizer.from_pretrained(minilm()),
            compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())},
            optimizers=(optimizer, None),  # None: Trainer makes the scheduler, for this optimizer
        )

    model, tuned, optimizer = prepared(train)
    print(tuned.selection)
    run = trainer(model, optimizer, OUT / "trainer")
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    print(f"accuracy {before['eval_accuracy']:.1%} before, {after['eval_accuracy']:.1%} after")

    again, _, optimizer = prepared(train)  # as in a new process: the base, the same selection, a new optimizer
    checkpoint = OUT / "trainer" / f"checkpoint-{steps // 2}"
    trainer(again, optimizer, OUT / "resumed").train(resume_from_checkpoint=str(checkpoint))
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    print(f"resumed from {checkpoint.name}: {'the same weights, bit for bit' if equal else 'OTHER WEIGHTS'}")

    plain = AutoModelForSequenceClassification.from_pretrained(OUT / "trainer" / f"checkpoint-{steps}")
    plain = all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    )
    print(f"from_pretrained(checkpoint-{steps}) {'is' if plain else 'is NOT'} the trained model")
    return {"before": before, "after": after, "resumed_equal": equal, "checkpoint_plain": plain}


if __name__ == "__main__":
    main()
