"""One fine-tuning run: load, prepare a method, train, evaluate, and count what it cost.

A method is one entry of `METHODS`: it decides which parameters train and with which optimizer. Data, batches, schedule,
clipping, weight decay and the loop are the same for all of them.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from tqdm import tqdm

import sparsekernels as sk

from ..study import write_atomically
from .config import Config, ModelError
from .memory import PeakMemory, count_bytes
from .methods import METHODS, Prepared, name_of
from .text_task import Batch, TextTask, make_batches

EVAL_BATCH = 64


@dataclass
class Loaded:
    """A pre-trained model and the encoded task."""

    model: nn.Module
    encoded: dict[str, list[tuple[list[int], int]]]
    pad: int

    def batches(
        self, config: Config, split: str, *, seed: int | None = None, limit: int | None = None, draw: int = 0
    ) -> list[Batch]:
        """Batches to train on (with a seed) or to evaluate; with a limit, of so many texts, the same for one `draw`."""
        rows = self.encoded[split]
        if limit is not None and limit < len(rows):
            rows = random.Random(draw).sample(rows, limit)
        size = config.batch_size if seed is not None else EVAL_BATCH
        return make_batches(rows, size, self.pad, causal=config.task == "causal-lm", seed=seed)


def silence() -> None:
    """Keep transformers from reporting what is expected here, such as a head that is new."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_model(config: Config, num_labels: int) -> tuple[nn.Module, Any]:
    """Return the model, its head new where the checkpoint has none for the task, and the tokenizer.

    A sentence-transformers folder says how its model is to be read: one that pools by the mean gets a classifier over
    the mean, everything else the head that transformers has for it.
    """
    silence()
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from .pooling import MeanPooledClassifier, is_mean_pooled

    if Path(config.model).is_dir() and not (Path(config.model) / "config.json").is_file():
        raise ModelError(f"--model: the folder {config.model} holds no config.json, so it is not a saved model")
    if not Path(config.model).is_dir() and (config.model.startswith((".", "/", "~")) or config.model.count("/") > 1):
        raise ModelError(f"--model: there is no folder {config.model}")
    torch.manual_seed(config.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        if config.task == "classification" and is_mean_pooled(config.model):
            model: Any = MeanPooledClassifier(config.model, num_labels)
        elif config.task == "classification":
            model = AutoModelForSequenceClassification.from_pretrained(
                config.model, dtype=torch.float32, ignore_mismatched_sizes=True, num_labels=num_labels
            )
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                config.model, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"--model: cannot load {config.model} for {config.task}: {first_line}") from None
    if config.task == "causal-lm" and (missing := sorted(info["missing_keys"])):
        raise ModelError(f"--model: {config.model} is no causal language model: it lacks {', '.join(missing[:3])}")
    if tokenizer.pad_token_id is None:  # padding is masked, so any token can stand for it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    return model.to(config.device), tokenizer


def load(config: Config, task: TextTask) -> Loaded:
    """Load the model and tokenise every split, cut to ``max_length`` tokens."""
    model, tokenizer = load_model(config, len(task.labels))
    shortest = 2 if config.task == "causal-lm" else 1  # one token has no next token
    encoded = {}
    for split, rows in task.rows.items():
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=config.max_length)["input_ids"]
        encoded[split] = [(row, label) for row, (_, label) in zip(ids, rows, strict=True) if len(row) >= shortest]
    return Loaded(model, encoded, tokenizer.pad_token_id)


def progress_bar(total: int, what: str, unit: str) -> tqdm:
    """A bar that vanishes when done, and that fills no log file."""
    interval = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True, mininterval=interval)


def to_device(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def autocast(config: Config) -> torch.autocast:
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.autocast)


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def training_step(model: nn.Module, prepared: Prepared, batch: Batch, config: Config) -> tuple[float, list[float]]:
    """Do one step, all but the freeing of gradients; return the loss and seconds for forward, backward, optimizer."""
    device = config.device
    start = clock(device)
    with autocast(config):
        loss = model(**batch).loss
    middle = clock(device)
    loss.backward()
    end = clock(device)
    nn.utils.clip_grad_norm_(prepared.parameters.values(), 1.0)
    prepared.optimizer.step()
    return loss.item(), [middle - start, end - middle, clock(device) - end]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], config: Config) -> dict[str, Any]:
    """Accuracy over texts, or the mean next-token loss over tokens."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        batch = to_device(batch, config.device)
        with autocast(config):
            output = model(**batch)
        if config.task == "classification":
            total += (output.logits.argmax(-1) == batch["labels"]).sum().item()
            count += len(batch["labels"])
        else:
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += output.loss.item() * tokens
            count += tokens
    model.train(was_training)
    metric = "accuracy" if config.task == "classification" else "loss"
    result = {"metric": metric, "value": total / count}
    return result if metric == "accuracy" else {**result, "perplexity": math.exp(min(total / count, 700))}


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module, batches: Iterable[Batch], device: str) -> float:
    """Largest absolute difference between the logits of two models; infinite where either is not a number."""
    one.eval(), other.eval()
    worst = 0.0
    for batch in batches:
        inputs = {name: tensor for name, tensor in to_device(batch, device).items() if name != "labels"}
        gap = (one(**inputs).logits - other(**inputs).logits).abs().max().item()
        worst = max(worst, math.inf if math.isnan(gap) else gap)
    return worst


def train(
    config: Config, task: TextTask, out: Path | None = None, *, test: bool = True, keep: Path | None = None
) -> dict[str, Any]:
    """Train once and return everything measured; with ``out``, also ship the result there and check the file.

    With ``keep``, the whole trained model is saved there, for another program to continue from.
    """
    from transformers import get_linear_schedule_with_warmup

    if config.threads:
        torch.set_num_threads(config.threads)
    loaded = load(config, task)
    model = loaded.model
    model_weights = sum(p.numel() for p in model.parameters())
    epochs = [loaded.batches(config, "train", seed=config.seed * 1000 + epoch) for epoch in range(config.epochs)]
    steps = int(min(sum(map(len, epochs)), config.steps or math.inf))
    validation = loaded.batches(config, "validation", limit=config.validation_texts)
    memory = PeakMemory(config.device)
    memory.start()

    started = time.perf_counter()
    model.train()
    try:
        prepared = METHODS[config.method].prepare(model, epochs[0], config)
    except ValueError as error:  # a model that the method does not fit; the message says how
        raise ModelError(f"{name_of(config)}: {error}") from None
    preparing = time.perf_counter() - started
    scheduler = get_linear_schedule_with_warmup(prepared.optimizer, math.ceil(config.warmup * steps), steps)
    losses: list[float] = []
    parts: list[list[float]] = []
    curve: list[dict[str, float]] = []
    evaluate_at = {math.ceil(steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    torch.manual_seed(config.seed)  # the same dropout for every method, whatever preparing drew
    bar = progress_bar(steps, name_of(config), "step")
    for batch in (batch for epoch in epochs for batch in epoch):
        loss, split = training_step(model, prepared, to_device(batch, config.device), config)
        losses.append(loss)
        scheduler.step()
        last = len(losses) == steps
        if last:
            counted = count_bytes(prepared)
        before = clock(config.device)
        prepared.optimizer.zero_grad()
        split[2] += clock(config.device) - before
        parts.append(split)
        bar.update()
        if len(losses) in evaluate_at:
            seen = sum(map(sum, parts))
            point = evaluate(model, validation, config)
            curve.append({"step": len(losses), "epoch": len(losses) / len(epochs[0]), "seconds": seen, **point})
            bar.set_postfix_str(f"validation {point['metric']} {point['value']:.3f}")
        if last:
            break
    bar.close()
    if not all(map(math.isfinite, losses)):
        raise ModelError(f"{name_of(config)}: the loss is no longer finite; lower --lr {config.method}={config.lr}")
    result = {
        "name": name_of(config),
        "method": config.method,
        "density": config.density if prepared.tuned else None,
        "lr": config.lr,
        "seed": config.seed,
        "steps": steps,
        "peak_memory_bytes": memory.read(),
        "prepare_seconds": preparing,
        "train_seconds": sum(map(sum, parts)),
        "step_ms": 1e3 * statistics.median(map(sum, parts)),
        "split_ms": [1e3 * statistics.median(column) for column in zip(*parts, strict=True)],
        "bytes": counted,
        "model_weights": model_weights,
        "tensors": len(prepared.parameters),
        "trained_weights": sum(p.numel() for p in prepared.parameters.values()),
        "head_weights": sum(p.numel() for n, p in prepared.parameters.items() if n in prepared.head),
        "losses": losses,
        "validation": curve,
        "gradient_curve": prepared.gradient_curve,
        "shrinking": prepared.shrinking,
    }
    if test:
        result["test"] = evaluate(model, loaded.batches(config, "test"), config)
    if keep is not None:
        write_atomically(keep, lambda partial: save_model(model, str(partial)))
    if out is not None:
        result |= ship(config, loaded, prepared, task, out)
    return result


def ship(config: Config, loaded: Loaded, prepared: Prepared, task: TextTask, out: Path) -> dict[str, Any]:
    """Save what a user would ship; load it into a fresh copy of the base model and compare the predictions.

    The fresh copy starts with another random head, so that only what the file holds can make the predictions agree.
    Dense training ships the whole model: its size is measured, nothing is kept.
    """
    model: Any = loaded.model
    if config.method == "dense":
        with tempfile.TemporaryDirectory(dir=out) as folder:
            whole = Path(folder) / "model.safetensors"
            save_model(model, str(whole))
            return {"ship_bytes": whole.stat().st_size, "reload": None}
    suffix = "" if config.seed == 0 else f"-seed{config.seed}"
    fresh, _ = load_model(replace(config, seed=config.seed + 1_000_003), len(task.labels))
    if prepared.tuned:
        path = out / f"delta-{name_of(config).replace(' ', '-').replace('%', 'pct')}{suffix}.safetensors"
        prepared.tuned.delta().save(path)
        sk.Delta.load(path).apply(fresh)
    else:
        path = out / f"{config.method}{suffix}.safetensors"
        save_file({name: p.detach().cpu() for name, p in prepared.parameters.items()}, path)
        if config.method == "lora":  # the file is for a model with adapters
            METHODS["lora"].prepare(fresh, [], config)
        fresh.load_state_dict(load_file(path), strict=False)
    difference = largest_difference(model, fresh, loaded.batches(config, "test"), config.device)
    return {"ship_bytes": path.stat().st_size, "reload": {"file": path.name, "largest_difference": difference}}
