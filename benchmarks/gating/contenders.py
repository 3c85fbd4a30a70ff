"""The ways of fine-tuning that gates.py compares: each trains for the same steps, gated ones end smaller."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.common.names import default_head, default_targets

from ..finetuning.config import Config
from ..finetuning.methods import METHODS, Prepared
from ..finetuning.text_task import Batch, TextTask
from ..finetuning.training import Loaded, autocast, evaluate, load, progress_bar, to_device
from ..timing import beside, interleaved, seconds

RANK = 32  # of low-rank factors, in LoRA and beside gates
WARM_UP = 3


@dataclass(frozen=True)
class Contender:
    """A row of the table: `way` is dense, lora, or gates; `removed` and the rest are of gates."""

    way: str
    removed: float = 0.0
    granularity: str = "row+column"
    rank: int = 0
    kind: str = "stg"
    embedding: bool = False  # whether rows of the embedding train beside the gates, by sparse gradients

    @property
    def name(self) -> str:
        """As it is called in the table, without the share that is removed."""
        if self.way != "gates":
            return {"dense": "dense", "lora": "LoRA (PEFT)"}[self.way]
        what = {"row+column": "rows and columns", "head+mlp": "heads and neurons"}[self.granularity]
        return f"gates on {what}" + (" + low-rank" if self.rank else "") + (" + rows" if self.embedding else "")

    @property
    def lr(self) -> float:
        """Of all weights; of biases and norms, beside low-rank factors, which have half and four times it, or alone."""
        return {"dense": 3e-4, "lora": 1e-3}.get(self.way, 1e-3 if self.rank else 1e-2)


@dataclass
class Made(Prepared):
    """A model made ready to train, with its gates if it has any."""

    gates: sk.methods.gates.Gates | None = None


def prepare(contender: Contender, model: nn.Module, steps: int, config: Config) -> Made:
    head = set(default_head(model))
    if contender.way == "dense":
        done = METHODS["dense"].prepare(model, [], config)
        return Made(done.parameters, done.optimizer, head)
    if contender.way == "lora":
        return lora(model, head, config)
    gates = sk.methods.gates.attach(
        model,
        contender.removed,
        steps,
        kind=contender.kind,
        granularity=contender.granularity,
        lora_rank=contender.rank,
    )  # type: ignore[arg-type]
    found = gates.param_groups(config.lr, head_lr=config.head_lr, weight_decay=config.weight_decay)
    parameters = dict(gates.named_parameters())
    if not contender.embedding:
        return Made(parameters, torch.optim.AdamW(found, fused=True), head, gates=gates)
    table = next(m for m in model.modules() if hasattr(m, "get_input_embeddings")).get_input_embeddings()
    table.sparse = True
    parameters["embedding"] = table.weight.requires_grad_(True)
    found.append({"params": [table.weight], "lr": config.lr, "weight_decay": 0.0})
    return Made(parameters, sk.SparseAdamW(found), head, gates=gates)


def lora(model: nn.Module, head: set[str], config: Config) -> Made:
    """PEFT's LoRA on the same layers, with the biases, norms and learning rates that the gates have."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name.removesuffix(".weight") for name in default_targets(model)]
    trained = {
        name
        for name, p in model.named_parameters()
        if name in head or (p.dim() < 2 and any(part.isdigit() for part in name.split(".")))
    }
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), model)
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    parameters = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer", "")
        factor = {"lora_A": 0.5, "lora_B": 4.0}.get(name.split(".")[-3] if "lora_" in name else "", 1.0)
        parameter.requires_grad_("lora_" in name or plain in trained)
        if parameter.requires_grad:
            parameters[name] = parameter
            rate = config.head_lr if plain in head else config.lr * factor
            found.setdefault((rate, config.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    groups = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in found.items()]
    return Made(parameters, torch.optim.AdamW(groups, fused=True), head)


def step(model: nn.Module, made: Made, batch: Batch, config: Config) -> Tensor:
    """A whole training step; returns the loss, without the penalty."""
    with autocast(config):
        loss: Tensor = model(**batch).loss
    (loss if made.gates is None else loss + made.gates.penalty()).backward()
    ungated = [p for name, p in made.parameters.items() if ".gates." not in name or "lora" in name]
    sk.clip_grad_norm_(ungated, 1.0)
    made.optimizer.step()
    made.optimizer.zero_grad()
    if made.gates is not None:
        made.gates.step()
    return loss.detach()


def train(contender: Contender, config: Config, task: TextTask, folder: Path | None) -> dict[str, Any]:
    """Train, evaluate, compress, and keep what gates made in the folder."""
    from transformers import get_linear_schedule_with_warmup

    if config.threads:
        torch.set_num_threads(config.threads)
    loaded = load(config, task)
    model, epochs = (
        loaded.model,
        [loaded.batches(config, "train", seed=config.seed * 1000 + epoch) for epoch in range(config.epochs)],
    )
    steps = int(min(sum(map(len, epochs)), config.steps or math.inf))
    before = sum(p.numel() for p in model.parameters())
    validation, test = loaded.batches(config, "validation"), loaded.batches(config, "test")
    made = prepare(contender, model, steps, config)
    trained = sum(p.numel() for p in made.parameters.values())
    scheduler = get_linear_schedule_with_warmup(made.optimizer, math.ceil(config.warmup * steps), steps)
    torch.manual_seed(config.seed)
    model.train()
    started, curve = time.perf_counter(), []
    bar = progress_bar(steps, f"{contender.name} {contender.removed:.0%}", "step")
    for number, batch in zip(range(1, steps + 1), (batch for epoch in epochs for batch in epoch), strict=False):
        loss = step(model, made, to_device(batch, config.device), config)
        scheduler.step()
        bar.update()
        if number % 50 == 0 and made.gates is not None:
            curve.append([number, made.gates.schedule.wanted(number), made.gates.removed()])
    bar.close()
    result: dict[str, Any] = {
        "steps": steps,
        "loss": float(loss),
        "trained_weights": trained,
        "seconds": time.perf_counter() - started,
        "validation": evaluate(model, validation, config)["value"],
        "test": evaluate(model, test, config)["value"],
        "weights": before,
        "removed": 0.0,
    }
    if made.gates is not None:
        result |= {"curve": curve, "open": opened(made.gates)} | compressed(made.gates, loaded, config, folder)
    return result


def opened(gates: sk.methods.gates.Gates) -> dict[str, dict[str, list[float]]]:
    """Of each layer and side, how many gates are open, and how many of these are not fully open."""
    return {
        layer: {side: [int((z > 0).sum()), int(((z > 0) & (z < 1)).sum()), len(z)] for side, z in sides.items()}
        for layer, sides in gates.open_gates().items()
    }


@torch.no_grad()
def compressed(gates: sk.methods.gates.Gates, loaded: Loaded, config: Config, folder: Path | None) -> dict[str, Any]:
    """Compress; compare the outputs, in fp32, on the test split; keep the model."""
    model, test = gates.model.eval(), loaded.batches(config, "test")
    inputs = [{name: x for name, x in batch.items() if name != "labels"} for batch in test]
    gated = [model(**each).logits for each in inputs]
    small: Any = gates.compress()
    after = [small(**each).logits for each in inputs]
    gap = max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(gated, after, strict=True))
    if folder is not None:
        small.save_pretrained(folder)
    removed = small.cuts.removed / small.cuts.total
    return {"removed": removed, "weights": sum(p.numel() for p in model.parameters()), "gap": gap}


def latencies(
    folders: dict[str, Path], config: Config, task: TextTask, shape: tuple[int, int], rounds: int
) -> dict[str, Any]:
    """Forward times of the original and of compressed models, interleaved; medians, and medians of ratios."""
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load(config, task).model.eval()
    models = {"original": model}
    for name, folder in folders.items():
        models[name] = sk.methods.gates.load(folder, copy.deepcopy(model)).eval()
    generator = torch.Generator().manual_seed(0)
    settings: Any = model.config
    texts, tokens = shape[0], min(shape[1], settings.max_position_embeddings)
    ids = torch.randint(settings.vocab_size, (texts, tokens), generator=generator)
    inputs = to_device({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config.device)

    def forward(name: str, done: int) -> float:
        with torch.no_grad():
            return seconds(lambda: models[name](**inputs))

    return beside(_after_warm_up({name: partial(forward, name) for name in models}, rounds), "original")


def _after_warm_up(samples: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    return {name: times[WARM_UP:] for name, times in interleaved(samples, least=rounds + WARM_UP).items()}


def step_times(contenders: list[Contender], config: Config, task: TextTask, rounds: int) -> dict[str, Any]:
    """Training steps, interleaved, on the same batches: the first is what the others are compared with.

    Gates are in the middle of closing. What they do every tenth step counts: times are means over ten steps.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    samples: dict[str, Callable[[int], float]] = {}
    for contender in contenders:
        loaded = load(config, task)
        loaded.model.train()
        config = replace(config, lr=contender.lr)
        made = prepare(contender, loaded.model, 10 * (rounds + WARM_UP), config)
        if made.gates is not None:
            made.gates.steps = 2 * (rounds + WARM_UP)  # in the middle of closing
        batches = loaded.batches(config, "train", seed=config.seed)
        samples[contender.name] = partial(_step_seconds, loaded.model, made, batches, config)
    times = _after_warm_up(samples, rounds)
    tens = {name: [sum(mine[i : i + 10]) / 10 for i in range(0, rounds, 10)] for name, mine in times.items()}
    return beside(tens, contenders[0].name)


def _step_seconds(model: nn.Module, made: Made, batches: list[Batch], config: Config, done: int) -> float:
    batch = to_device(batches[done % len(batches)], config.device)
    return seconds(lambda: step(model, made, batch, config))
