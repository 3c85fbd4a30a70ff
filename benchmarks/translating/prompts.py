"""Prompts, batches, greedy decoding, and scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .parallel_text import Pair

IGNORED = -100
POOL = 16
TRANSLATION = "en: {}\n:"  # a line, and the beginning of one whose language is not said
Batch = dict[str, Tensor]


def prompt_ids(tokenizer: Any, source: str, form: str = TRANSLATION) -> list[int]:
    """The tokens of `form` with the source filled in."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *tokenizer(form.format(source), add_special_tokens=False)["input_ids"]]


def batches(
    tokenizer: Any, pairs: Sequence[Pair], batch_size: int, seed: int | None = None, form: str = TRANSLATION
) -> list[Batch]:
    """Prompts with their answers, loss on the answer and its end alone.

    With a seed, texts are shuffled, then sorted by length within pools of `POOL` batches, and the batches shuffled:
    little padding, which stands on the right, outside the loss.
    """
    rows = []
    for source, target in pairs:
        prompt = prompt_ids(tokenizer, source, form)
        answer = [*tokenizer(f" {target}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt, answer))
    draw, pool = random.Random(seed), POOL * batch_size
    if seed is not None:
        draw.shuffle(rows)
        starts = range(0, len(rows), pool)
        rows = [row for i in starts for row in sorted(rows[i : i + pool], key=lambda row: len(row[0]) + len(row[1]))]
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if seed is not None:
        draw.shuffle(groups)
    return [_collate(group, tokenizer.pad_token_id) for group in groups]


def _collate(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    shape = (len(rows), max(len(prompt) + len(answer) for prompt, answer in rows))
    ids, mask, labels = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def translate(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 128,
    form: str = TRANSLATION,
) -> list[str]:
    """Continue every prompt greedily, until the end token or ``max_new_tokens``; return what was written."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    prompts = [prompt_ids(tokenizer, source, form) for source in sources]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in group)
        ids = torch.full((len(group), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(group):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        for i, text in zip(group, texts, strict=True):
            written[i] = text
    model.train(was_training)
    return written


def score(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """chrF and BLEU of the whole output and of its first line, and the share of outputs that are one line."""
    import sacrebleu

    whole = [" ".join(text.split()) for text in written]
    first = [text.strip().split("\n")[0] for text in written]
    scores = {}
    for name, texts in (("", whole), ("_first_line", first)):
        scores["chrf" + name] = sacrebleu.corpus_chrf(texts, [references]).score
        scores["bleu" + name] = sacrebleu.corpus_bleu(texts, [references]).score
    scores["one_line"] = sum("\n" not in text.strip() for text in written) / len(written)
    return scores
