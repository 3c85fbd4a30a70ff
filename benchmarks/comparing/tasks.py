"""What the studies train on: a language model and an encoder, each with a task."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from sparsekernels.common.names import default_head

from ..finetuning.config import Config
from ..finetuning.text_task import load_task
from ..finetuning.training import evaluate, load, load_model
from ..models import model_folder
from ..study import Content, Refused
from ..translating.parallel_text import Pair, from_packages
from ..translating.prompts import IGNORED, TRANSLATION, Batch, batches, translate
from .language_tasks import TASKS

SCORED = 128  # held-out pairs of a completion


class Task(Protocol):
    """A model, batches of each split, and a score. `higher` says which scores are better."""

    higher: bool
    autocast: bool  # to bf16, in training
    steps: int
    batch_size: int
    settings: Content
    checkable: bool  # whether an answer is right or wrong: `right` says how many are

    def model(self, seed: int) -> nn.Module:
        """The pre-trained model; what is new in it is drawn with the seed."""

    def head(self, model: nn.Module) -> list[str]:
        """The parameters that every contender trains densely beside the projections."""

    def train(self, seed: int) -> list[Batch]: ...

    def held_out(self, split: str) -> list[Batch]: ...

    def score(self, model: nn.Module, held_out: Sequence[Batch]) -> float: ...

    def right(self, model: nn.Module, held_out: Sequence[Batch]) -> float:
        """The share of answers that greedy decoding reproduces exactly, including the end token."""


class Completion:
    """A causal language model writes the answers to prompts; the mean loss of a token of the answers."""

    higher = False

    def __init__(
        self,
        model: str,
        pairs: Mapping[str, list[Pair]],
        form: str,
        batch_size: int | None,
        steps: int | None,
        autocast: bool = False,
        checkable: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        self.batch_size, self.steps, self.pairs, self.form = batch_size or 8, steps or 50, pairs, form
        if (most := math.ceil(len(pairs["train"]) / self.batch_size)) < self.steps:
            raise Refused(f"--steps is {self.steps}, but the task has texts for {most} steps of {self.batch_size}")
        self.folder, self.autocast, self.checkable = model_folder(model), autocast, checkable
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.settings: Content = {"scored": SCORED}

    def model(self, seed: int) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model

    def head(self, model: nn.Module) -> list[str]:
        return []

    def train(self, seed: int) -> list[Batch]:
        return batches(self.tokenizer, self.pairs["train"], self.batch_size, seed, self.form)[: self.steps]

    def held_out(self, split: str) -> list[Batch]:
        return batches(self.tokenizer, self.pairs[split], 16, form=self.form)

    @torch.no_grad()
    def score(self, model: nn.Module, held_out: Sequence[Batch]) -> float:
        total, count = 0.0, 0
        for batch in held_out:
            tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = model(**batch).loss
            total += float(loss) * tokens
            count += tokens
        return total / count

    def written(self, model: nn.Module, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """What the model writes to prompts, greedily: the first line of it."""
        texts = translate(model, self.tokenizer, prompts, max_new_tokens, form=self.form)
        return [next(iter(text.strip().splitlines()), "") for text in texts]

    @torch.no_grad()
    def right(self, model: nn.Module, held_out: Sequence[Batch]) -> float:
        right, count = 0, 0
        for batch in held_out:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                written = model(**batch).logits[:, :-1].argmax(-1)
            wanted = batch["labels"][:, 1:]
            # What stands before a token is right if the tokens before it are, so greedy decoding writes the same.
            right += int(((written == wanted) | (wanted == IGNORED)).all(1).sum())
            count += len(wanted)
        return right / count


def translation(args: argparse.Namespace) -> Completion:
    """SmolLM2-135M, strings of message catalogues, English to German; the first held-out ones in the alphabet."""
    (text,) = from_packages(["de"])
    pairs = {split: found if split == "train" else found[:SCORED] for split, found in text.pairs.items()}
    task = Completion("smollm2", pairs, TRANSLATION, args.batch_size, args.steps)
    task.settings |= {"language": text.language, "data": text.source, "texts": text.sizes}
    return task


def completion(args: argparse.Namespace) -> Completion:
    """The model and the task that the arguments name, in bf16 autocast; held-out pairs are drawn once and for all."""
    text = TASKS[args.task]()
    pairs = {split: found if split == "train" else drawn(found) for split, found in text.pairs.items()}
    how = {"autocast": True, "checkable": text.checkable}
    task = Completion(args.model, pairs, text.form, args.batch_size, args.steps, **how)
    task.settings |= {"model": args.model, "task": args.task, "data": text.source, "texts": text.sizes}
    task.settings |= {"left_out": text.left_out}
    return task


def drawn(found: Sequence[Pair]) -> list[Pair]:
    """Those that are scored, in the order of their lengths: little padding."""
    pairs = random.Random(0).sample(found, min(SCORED, len(found)))
    return sorted(pairs, key=lambda pair: sum(map(len, pair)))


class Classification:
    """MiniLM, 22M, names the subpackage that a docstring comes from, by a new head; the accuracy.

    In bf16 autocast; an epoch at most.
    """

    higher, autocast, checkable = True, True, False

    def __init__(self, args: argparse.Namespace) -> None:
        self.batch_size, self.task = args.batch_size or 32, load_task("classification")
        self.config = Config(
            "", model_folder("minilm"), batch_size=self.batch_size, max_length=16, autocast=self.autocast
        )
        self.loaded = load(self.config, self.task)
        epoch = len(self.loaded.batches(self.config, "train", seed=0))
        self.steps = min(args.steps or epoch, epoch)
        self.settings = {"data": self.task.source, "texts": self.task.sizes, "max_length": self.config.max_length}

    def model(self, seed: int) -> nn.Module:
        return load_model(replace(self.config, seed=seed), len(self.task.labels))[0]

    def head(self, model: nn.Module) -> list[str]:
        return default_head(model)

    def train(self, seed: int) -> list[Batch]:
        return self.loaded.batches(self.config, "train", seed=seed)[: self.steps]

    def held_out(self, split: str) -> list[Batch]:
        return self.loaded.batches(self.config, split)

    def score(self, model: nn.Module, held_out: Sequence[Batch]) -> float:
        return float(evaluate(model, held_out, self.config)["value"])
