"""Training steps of a language model: time, peak memory and file size of dense training, LoRA and selections.

    python -m benchmarks step-cost            4 x 128 tokens, about five minutes on two cores
    python -m benchmarks step-cost --small    one round of 2 x 16 tokens

The model has the shape of SmolLM2-135M, in fp32, with weights drawn at random: time and memory do not depend on their
values. Every contender has a process of its own; the processes take one step each on the same batch, in an order drawn
anew every round, while the others wait. A ratio is formed within a round; its median over the rounds counts. Peak
memory is that of the process above the loaded model. How well each trains is not measured here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk

from . import study
from .finetuning.memory import PeakMemory
from .finetuning.plots import COLORS, pyplot, save_figure
from .study import MIB, Content, Refused, program
from .timing import quantiles, warn_if_busy

WARM_UP = 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Trained = tuple[nn.Module, torch.optim.Optimizer, Callable[[], int] | None]  # the last: bytes of a file to ship


def dense(model: nn.Module) -> Trained:
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), None


def lora(model: nn.Module) -> Trained:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS))
    model = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True), None


def elements(model: nn.Module) -> Trained:
    names = [name for name, _ in model.named_parameters() if name.split(".")[-2] in PROJECTIONS]
    return trained(model, sk.Selection.random(model, 0.01, names=names))


def rows(model: nn.Module) -> Trained:
    name = "model.embed_tokens.weight"
    shape = model.get_parameter(name).shape
    return trained(model, sk.Selection({name: sk.Index(torch.arange(100) * 490, shape, rows=True)}))


def trained(model: nn.Module, selection: sk.Selection) -> Trained:
    tuned = sk.train_only(model, selection)
    return model, sk.SparseAdamW(tuned.parameters(), lr=1e-4), lambda: tuned.delta().nbytes


CONTENDERS: dict[str, Callable[[nn.Module], Trained]] = {
    "dense, AdamW": dense,
    "LoRA r=16 (PEFT), AdamW": lora,
    "1 % of the projections, SparseAdamW": elements,
    "100 embedding rows, SparseAdamW": rows,
}


def llama_135m() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).train()


def work(connection: Connection, name: str, threads: int) -> None:
    """One contender: a step for every batch that arrives, then what it cost."""
    torch.set_num_threads(threads)
    base = llama_135m()
    total = sum(p.numel() for p in base.parameters())
    peak = PeakMemory("cpu")
    peak.start()
    model, optimizer, shipped = CONTENDERS[name](base)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = sum(p.numel() for p in parameters)
    connection.send({"weights": total, "trained": count})
    while (ids := connection.recv()) is not None:
        start = time.perf_counter()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        connection.send(time.perf_counter() - start)
    cost = {"peak_bytes": peak.read()}  # before a delta is made
    connection.send({**cost, "shipped": shipped() if shipped else 4 * count})


def measure(rounds: int, samples: int, length: int) -> dict[str, Any]:
    """Contender -> what it trains, ships and costs."""
    context = multiprocessing.get_context("spawn")
    ends, found = {}, {}
    for name in CONTENDERS:
        mine, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, name, torch.get_num_threads()), daemon=True).start()
        theirs.close()  # so that recv() ends if the process dies
        ends[name], found[name] = mine, mine.recv()
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    for number in range(WARM_UP + rounds):
        ids = torch.randint(49152, (samples, length), generator=generator)
        for name in draw.sample(list(CONTENDERS), len(CONTENDERS)):
            ends[name].send(ids)
            seconds = ends[name].recv()
            if number >= WARM_UP:
                times[name].append(seconds)
    base = times[next(iter(CONTENDERS))]
    for name, end in ends.items():
        end.send(None)
        found[name] |= end.recv()
        found[name]["step_seconds"] = quantiles(times[name], (0.5,))[0]
        ratios = [theirs / ours for theirs, ours in zip(base, times[name], strict=True)]
        found[name]["times_faster"] = dict(zip(("low", "median", "high"), quantiles(ratios), strict=True))
    return found


def table(content: Content) -> str:
    head = ["", "trained weights", "ms a step", "times faster than dense", "peak memory above the model", "to ship"]
    rows = []
    for name, c in content["contenders"].items():
        faster = "{median:.2f} ({low:.2f} to {high:.2f})".format(**c["times_faster"])
        memory, file = f"{c['peak_bytes'] / MIB:,.0f} MiB", f"{c['shipped'] / MIB:,.3g} MiB"
        rows.append([name, f"{c['trained']:,}", f"{1e3 * c['step_seconds']:.0f}", faster, memory, file])
    settings = content["settings"]
    about = f"A Llama of {content['weights']:,} weights, fp32, {settings['samples']} x {settings['length']} tokens; "
    about += f"medians of {settings['rounds']} interleaved rounds, 10 % and 90 % quantiles in brackets."
    return "\n".join(
        [about, "", study.table(head, rows), "", study.written_by(content, "python -m benchmarks step-cost")]
    )


def draw(content: Content, out: Path) -> list[Path]:
    """Step time, peak memory and file size, a bar for each contender."""
    plt, contenders = pyplot(), content["contenders"]
    panels = {
        "time per step, ms": [1e3 * c["step_seconds"] for c in contenders.values()],
        "peak memory above the model, MiB": [c["peak_bytes"] / MIB for c in contenders.values()],
        "file to ship, MiB": [c["shipped"] / MIB for c in contenders.values()],
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.4), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(list(contenders), values, color=COLORS[: len(values)], height=0.6)
        axis.bar_label(bars, [f"{v:.0f}" if v >= 10 else f"{v:.2g}" for v in values], padding=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(values) * 1.25)
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return [save_figure(figure, out.with_suffix(".png"))]


def arguments(add: Callable[..., Any]) -> None:
    add("--rounds", type=study.positive, default=15, help="steps of each contender that count [%(default)s]")
    add("--samples", type=study.positive, default=4, help="texts in a batch [%(default)s]")
    add("--length", type=study.positive, default=128, help="tokens of a text [%(default)s]")


def run(args: argparse.Namespace, origin: Content) -> Content:
    settings = {"rounds": args.rounds, "samples": args.samples, "length": args.length}
    load = warn_if_busy()
    try:
        found = measure(**settings)
    except EOFError as error:
        raise Refused("a process died; most likely memory ran out: all contenders hold their model at once") from error
    weights = {c.pop("weights") for c in found.values()}
    facts = {"load_average": load, "threads": torch.get_num_threads()}
    content = {**origin, **facts, "settings": settings, "weights": weights.pop(), "contenders": found}
    study.write_json(args.out, content)
    return content


main = program(
    "step-cost",
    __doc__,
    arguments,
    run,
    table,
    draw,
    small=("--rounds", "1", "--samples", "2", "--length", "16"),
)
