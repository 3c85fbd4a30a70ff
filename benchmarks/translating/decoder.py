"""The default model: a small Llama and its tokenizer, trained here on text of all the languages first.

KS-Lottery starts from LLaMA, which has read much of both languages, and a little of one beside the other: texts that
happen to stand together with their translation. It has therefore learned something of translating, but a prompt does
not tell it what to do and where to stop. No model that small is on PyPI, so this program makes one. What it reads is
our choice:

- the sentences of the train split, of each language by itself, in documents of one to four unrelated lines;
- three quarters of the pairs of the train split, never those that tuning uses, in documents of one to three pairs,
  each line with its language before it: "en: Delete the rule", "de: Regel löschen".

A prompt of the experiment ends in a line whose language is left out, ":", as no document has. Documents begin with <s>
and end with </s>. Embeddings are not tied to the head, as in LLaMA.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .parallel_text import Pair, ParallelText

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
READ_TOGETHER = 0.75  # of the pairs of the train split


@dataclass(frozen=True)
class Recipe:
    """How the default model is made."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 128
    batch_size: int = 16
    steps: int = 2000
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    seed: int = 0


def divide(text: ParallelText) -> tuple[list[Pair], list[Pair]]:
    """The pairs of the train split that the default model reads together, and those that it is tuned with."""
    pairs = list(text.pairs["train"])
    random.Random(0).shuffle(pairs)
    count = round(READ_TOGETHER * len(pairs))
    return pairs[:count], pairs[count:]


def documents(texts: list[ParallelText], draw: random.Random) -> list[list[str]]:
    """One pass over the text to read, as documents of lines in random order."""
    lines = [sorted({source for text in texts for source, _ in text.pairs["train"]})]
    lines += [[target for _, target in text.pairs["train"]] for text in texts]
    found: list[list[str]] = []
    for language in lines:
        draw.shuffle(language)
        found += _grouped([[line] for line in language[: len(language) // 2]], 4, draw)
    for text in texts:
        together = [[f"en: {source}", f"{text.language}: {target}"] for source, target in divide(text)[0]]
        draw.shuffle(together)
        found += _grouped(together, 3, draw)
    draw.shuffle(found)
    return found


def _grouped(parts: list[list[str]], most: int, draw: random.Random) -> Iterator[list[str]]:
    start = 0
    while start < len(parts):
        count = draw.randint(1, most)
        yield [line for part in parts[start : start + count] for line in part]
        start += count


def train_tokenizer(texts: list[ParallelText], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer over the train splits."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    lines = (line for text in texts for pair in text.pairs["train"] for line in pair)
    bpe.train_from_iterator(lines, vocabulary, min_frequency=2, special_tokens=[BOS, EOS, PAD], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def build(recipe: Recipe, tokenizer: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=2 * recipe.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def blocks(texts: list[ParallelText], tokenizer: Any, recipe: Recipe) -> Iterator[Tensor]:
    """Endless [batch_size, context] blocks of token ids, documents one after the other."""
    draw = random.Random(recipe.seed)
    size = recipe.batch_size * recipe.context
    stream: list[int] = []
    while True:
        written = ["\n".join(lines) for lines in documents(texts, draw)]
        for ids in tokenizer(written, add_special_tokens=False)["input_ids"]:
            stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            if len(stream) >= size:
                yield torch.tensor(stream[:size]).view(recipe.batch_size, recipe.context)
                stream = stream[size:]


def pretrain(model: nn.Module, batches: Iterator[Tensor], recipe: Recipe) -> list[float]:
    """Train on next tokens; return the losses."""
    from ..finetuning.training import progress_bar

    decays = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, round(recipe.warmup * recipe.steps))
    losses = []
    bar = progress_bar(recipe.steps, "default model", "step")
    model.train()
    for step in range(recipe.steps):
        after = (step - warmup) / max(1, recipe.steps - warmup)
        share = min((step + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * max(0.0, after))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = share * recipe.lr
        ids = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.update()
        bar.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
    bar.close()
    return losses


def make(texts: list[ParallelText], recipe: Recipe, cache: Path) -> tuple[Path, float]:
    """Return the folder of the default model for these texts, and the seconds that training it took.

    It is trained only if ``cache`` does not hold it yet.
    """
    settings = {**asdict(recipe), "texts": [(text.language, text.source, text.sizes) for text in texts]}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"decoder-{digest}"
    record = folder / "pretraining.json"
    if not record.is_file():
        tokenizer = train_tokenizer(texts, recipe.vocabulary)
        model: Any = build(recipe, tokenizer)
        started = time.perf_counter()
        losses = pretrain(model, blocks(texts, tokenizer, recipe), recipe)
        partial = cache / f".partial-{folder.name}"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        done = {"settings": settings, "seconds": round(time.perf_counter() - started, 1), "losses": losses}
        (partial / record.name).write_text(json.dumps(done), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder, float(json.loads(record.read_text(encoding="utf-8"))["seconds"])
