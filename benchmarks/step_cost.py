"""Training steps of a language model: time, memory and file size of dense training, LoRA and selections.

    python -m benchmarks step-cost            4 x 128 tokens, about fifteen minutes on two cores
    python -m benchmarks step-cost --small    one round of 2 x 16 tokens

The model is SmolLM2-135M or another --model, in fp32. Every contender has a process of its own; the processes take one
step each on the same batch, in an order drawn anew every round, while the others wait. Not all of their models fit in
memory at once: they are measured in groups, and what they are set beside is in each. A ratio is formed within a round;
its median over the rounds counts. Frozen is a forward and a backward to the embeddings that trains nothing: no training
of the projections costs less. Kept for backward is what autograd saves in a forward beside the model itself, every
storage once. Peak memory is that of the process above the loaded model. How well each trains is not measured here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk

from . import study
from .finetuning.memory import PeakMemory
from .finetuning.plots import COLORS, pyplot, save_figure
from .models import MODEL_HELP, model_folder
from .study import MIB, Content, Refused, program
from .timing import quantiles, warn_if_busy

WARM_UP = 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The model to call, the optimizer, and how many bytes there are to ship where it is not every trained weight.
Trained = tuple[nn.Module, torch.optim.Optimizer | None, Callable[[], int] | None]


def frozen(model: nn.Module) -> Trained:
    model.requires_grad_(False)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return model, None, lambda: 0


def dense(model: nn.Module) -> Trained:
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), None


def lora(model: nn.Module) -> Trained:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS))
    model = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True), None


def shira(model: nn.Module) -> Trained:
    import peft

    model = peft.get_peft_model(model, peft.ShiraConfig(r=16, target_modules=list(PROJECTIONS)))  # type: ignore[arg-type]
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True), None


def projections(model: nn.Module, density: float, **units: Any) -> Trained:
    """Units of the projections, at random."""
    names = [name for name, _ in model.named_parameters() if name.split(".")[-2] in PROJECTIONS]
    return trained(model, sk.Selection.random(model, density, names=names, **units))


def embedding_rows(model: nn.Module) -> Trained:
    name = "model.embed_tokens.weight"
    shape = model.get_parameter(name).shape
    return trained(model, sk.Selection({name: sk.Index(torch.arange(100) * 490, shape, granularity="row")}))


def trained(model: nn.Module, selection: sk.Selection) -> Trained:
    tuned = sk.train_only(model, selection)
    return model, sk.SparseAdamW(tuned.parameters(), lr=1e-4), lambda: tuned.delta().nbytes


FROZEN, DENSE, LORA = "frozen", "dense, AdamW", "LoRA r=16 (PEFT), AdamW"
COLUMNS = "5 % of columns, SparseAdamW"
CONTENDERS: dict[str, Callable[[nn.Module], Trained]] = {
    FROZEN: frozen,
    DENSE: dense,
    LORA: lora,
    "SHiRA r=16 (PEFT), AdamW": shira,
    "1 % of elements, SparseAdamW": partial(projections, density=0.01),
    COLUMNS: partial(projections, density=0.05, granularity="column"),
    "5 % in blocks of 64 x 64, SparseAdamW": partial(projections, density=0.05, granularity="block", block=(64, 64)),
    "100 embedding rows, SparseAdamW": embedding_rows,
    "1 % of columns, SparseAdamW": partial(projections, density=0.01, granularity="column"),
    "5 % of rows, SparseAdamW": partial(projections, density=0.05, granularity="row"),
    "1 % of rows, SparseAdamW": partial(projections, density=0.01, granularity="row"),
    "1 % in blocks of 64 x 64, SparseAdamW": partial(projections, density=0.01, granularity="block", block=(64, 64)),
}
BESIDE = (FROZEN, DENSE, LORA)  # what every group has
GROUP = 4  # of others
PICTURED = (DENSE, LORA, "1 % of elements, SparseAdamW", COLUMNS, "100 embedding rows, SparseAdamW")


def language_model(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)
    return model.train()


def kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that the graph of a forward keeps beside the model and what its slots hold; every storage once."""
    slots = [slot for module in model.modules() for slot in module.__dict__.get("_sparse_slots", {}).values()]
    own = [*model.parameters(), *model.buffers(), *(slot.positions for slot in slots)]
    own += [slot.narrow.index.positions for slot in slots if slot.narrow is not None]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(kept.values())


def work(connection: Connection, base_model: str, name: str, threads: int) -> None:
    """One contender: a step for every batch that arrives, then what it cost."""
    torch.set_num_threads(threads)
    base = language_model(base_model)
    total = sum(p.numel() for p in base.parameters())
    peak = PeakMemory("cpu")
    peak.start()
    model, optimizer, shipped = CONTENDERS[name](base)
    parameters = [p for group in (optimizer.param_groups if optimizer else ()) for p in group["params"]]
    count = sum(p.numel() for p in parameters)
    vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    connection.send({"weights": total, "trained": count, "vocabulary": vocabulary})
    kept = None
    while (ids := connection.recv()) is not None:
        start = time.perf_counter()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if kept is None:
            del loss
            kept = kept_bytes(model, ids)
        connection.send(seconds)
    cost = {"kept_bytes": kept, "peak_bytes": peak.read()}  # before a delta is made
    connection.send({**cost, "shipped": shipped() if shipped else 4 * count})


def measure_group(names: Sequence[str], model: str, rounds: int, samples: int, length: int) -> dict[str, Any]:
    """Contender -> what it trains, ships and costs."""
    context = multiprocessing.get_context("spawn")
    ends, found = {}, {}
    for name in names:
        mine, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, model, name, torch.get_num_threads()), daemon=True).start()
        theirs.close()  # so that recv() ends if the process dies
        ends[name], found[name] = mine, mine.recv()
    times: dict[str, list[float]] = {name: [] for name in names}
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    vocabulary = {each.pop("vocabulary") for each in found.values()}.pop()
    for number in range(WARM_UP + rounds):
        ids = torch.randint(vocabulary, (samples, length), generator=generator)
        for name in draw.sample(list(names), len(names)):
            ends[name].send(ids)
            seconds = ends[name].recv()
            if number >= WARM_UP:
                times[name].append(seconds)
    for name, end in ends.items():
        end.send(None)
        found[name] |= end.recv()
        found[name]["step_seconds"] = quantiles(times[name], (0.5,))[0]
        for base in BESIDE:
            ratios = [theirs / ours for theirs, ours in zip(times[base], times[name], strict=True)]
            found[name][f"faster_than_{base}"] = dict(zip(("low", "median", "high"), quantiles(ratios), strict=True))
    return found


def measure(model: str, rounds: int, samples: int, length: int) -> dict[str, Any]:
    """The same for all contenders, in groups."""
    others = [name for name in CONTENDERS if name not in BESIDE]
    found: dict[str, Any] = {}
    for first in range(0, len(others), GROUP):
        group = measure_group([*BESIDE, *others[first : first + GROUP]], model, rounds, samples, length)
        found |= {name: cost for name, cost in group.items() if name not in found}
        print(f"{len(found)} of {len(CONTENDERS)} contenders measured", flush=True)
    return {name: found[name] for name in CONTENDERS}


def table(content: Content) -> str:
    head = [
        "",
        "trained weights",
        "ms a step",
        *(f"times faster than {name.split(' ')[0].strip(',')}" for name in BESIDE),
    ]
    head += ["floats a token kept for backward", "peak memory above the model", "to ship"]
    settings = content["settings"]
    tokens, rows = settings["samples"] * settings["length"], []
    for name, c in content["contenders"].items():
        faster = ["{median:.2f} ({low:.2f} to {high:.2f})".format(**c[f"faster_than_{base}"]) for base in BESIDE]
        memory, file = f"{c['peak_bytes'] / MIB:,.0f} MiB", f"{c['shipped'] / MIB:,.3g} MiB"
        kept = f"{c['kept_bytes'] / 4 / tokens / 1e3:,.1f}k"
        rows.append([name, f"{c['trained']:,}", f"{1e3 * c['step_seconds']:.0f}", *faster, kept, memory, file])
    about = f"{settings['model']}, {content['weights']:,} weights, fp32, "
    about += f"{settings['samples']} x {settings['length']} tokens; "
    about += f"medians of {settings['rounds']} interleaved rounds, 10 % and 90 % quantiles in brackets."
    return "\n".join(
        [about, "", study.table(head, rows), "", study.written_by(content, "python -m benchmarks step-cost")]
    )


def draw(content: Content, out: Path) -> list[Path]:
    """Step time, peak memory and file size, a bar for each contender."""
    plt, contenders = pyplot(), {name: content["contenders"][name] for name in PICTURED}
    panels = {
        "time per step, ms": [1e3 * c["step_seconds"] for c in contenders.values()],
        "peak memory above the model, MiB": [c["peak_bytes"] / MIB for c in contenders.values()],
        "file to ship, MiB": [c["shipped"] / MIB for c in contenders.values()],
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.7), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(list(contenders), values, color=COLORS[: len(values)], height=0.6)
        axis.bar_label(bars, [f"{v:.0f}" if v >= 10 else f"{v:.2g}" for v in values], padding=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(values) * 1.25)
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return [save_figure(figure, out.with_suffix(".png"))]


def arguments(add: Callable[..., Any]) -> None:
    add("--model", default="smollm2", help=f"{MODEL_HELP}, of a causal language model [%(default)s]")
    add("--rounds", type=study.positive, default=15, help="steps of each contender that count [%(default)s]")
    add("--samples", type=study.positive, default=4, help="texts in a batch [%(default)s]")
    add("--length", type=study.positive, default=128, help="tokens of a text [%(default)s]")


def run(args: argparse.Namespace, origin: Content) -> Content:
    settings = {"model": args.model, "rounds": args.rounds, "samples": args.samples, "length": args.length}
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
