"""Training under fully_shard (FSDP2): bytes communicated, bytes a rank holds, peak memory and the time of a step.

    python -m benchmarks sharded            1, 2 and 4 processes, about fifteen minutes on two cores
    python -m benchmarks sharded --small    2 processes, a tiny model

The model is a Llama of random weights, in fp32; each block is sharded by itself, then the rest. The processes are a
gloo group on this machine, with one thread each whatever --threads says. Every process holds all contenders at once.
One after the other takes three steps; their peak memory is read, and the bytes of the last one are counted. Then they
are interleaved to be timed.

Bytes communicated are those of the tensors that collectives are called with: the whole output of an all-gather, the
whole input of a reduce-scatter or an all-reduce. A rank sends or receives (ranks - 1) / ranks of that. FSDP2 gathers
frozen weights and values of a block in one call: the all-gathers of a contender that trains nothing, but runs backward
to the embeddings, count as those of the weights, and the difference as what is beyond. The bar is for what is beyond,
in one step: 4.4 times the 4 bytes of each selected element. Values are gathered in forward, in backward and after the
step, gradients are reduced: four times, and a tenth for padding, because FSDP2 cuts dimension 0 of a tensor into chunks
of equal length. That padding shrinks with the size of the tensors: blocks of 64 x 64 miss the bar in small models,
where a matrix has few of them, as --small shows. One process communicates nothing but what is gathered after the step.

Bytes held are counted between backward and optimizer, on the rank that holds most. Each rank has all positions,
and those in its own rows a second time; all else is sharded. Peak memory is that of a process above
its sharded model, over the steps before timing. Time is from all ranks being ready until the last one is done: on one
machine, with its memory as the network.

The second part is computed from shapes, for models and numbers of GPUs that are not here: sharding/paper.py says how.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import Any

from . import study
from .gpu_training.llama import Shape
from .sharding import paper, ranks
from .sharding.processes import in_group
from .step_cost import COLUMNS, DENSE, FROZEN, LORA
from .study import MIB, Content, program
from .timing import warn_if_busy

SPARSE = (
    "1 % of elements, SparseAdamW",
    "5 % of rows, SparseAdamW",
    COLUMNS,
    "5 % in blocks of 64 x 64, SparseAdamW",
)
CONTENDERS = (FROZEN, DENSE, LORA, *SPARSE)
BAR = 4.4  # times the bytes of the selected values
LIMIT = 3600.0  # seconds for all processes of one group
GATHERED, REDUCED = "all_gather", "reduce_scatter"


def merged(found: list[Content]) -> Content:
    """Contender -> its costs, of what each rank found: the most of what is held, and what all of them communicate."""
    costs: Content = {name: dict(each) for name, each in found[0].items()}
    for name, cost in costs.items():
        others = [rank[name] for rank in found]
        if any(other["communicated"] != cost["communicated"] for other in others):
            raise RuntimeError(f"{name}: ranks do not communicate the same")
        cost["held"] = {part: max(other["held"][part] for other in others) for part in cost["held"]}
        cost["peak_bytes"] = max(other["peak_bytes"] for other in others)
    floor = costs[FROZEN]["communicated"]
    for name, cost in costs.items():
        cost["beyond"] = beyond(cost["communicated"], floor)
        if name in SPARSE:
            cost["bar"] = BAR * 4 * cost["trained"]
            cost["met"] = sum(cost["beyond"].values()) <= cost["bar"]
    return costs


def beyond(communicated: Content, floor: Content) -> dict[str, int]:
    """Bytes beyond those of the model with everything frozen; its all-gathers are those of the weights."""
    more = {phase: {k: v - floor[phase][k] for k, v in kinds.items()} for phase, kinds in communicated.items()}
    return {
        "forward": more["forward"][GATHERED],
        "backward": more["backward"][GATHERED],
        "step": more["step"][GATHERED],
        "reduced": sum(kinds[REDUCED] for kinds in more.values()),
        "all_reduced": sum(kinds["all_reduce"] for kinds in more.values()),
    }


def arguments(add: Callable[..., Any]) -> None:
    add("--processes", type=study.positive, nargs="+", default=[1, 2, 4], help="sizes of groups [%(default)s]")
    add("--rounds", type=study.positive, default=7, help="steps of each contender that count [%(default)s]")
    add("--samples", type=study.positive, default=1, help="texts in the batch of a process [%(default)s]")
    add("--length", type=study.positive, default=128, help="tokens of a text [%(default)s]")
    add("--hidden", type=study.positive, default=1024, help="width of the model, a multiple of 64 [%(default)s]")
    add("--intermediate", type=study.positive, default=2816, help="width of its MLPs [%(default)s]")
    add("--layers", type=study.positive, default=4, help="its blocks [%(default)s]")
    add("--vocab", type=study.positive, default=8192, help="rows of its embedding, and of its head [%(default)s]")
    add("--gbytes-per-second", type=float, default=50.0, help="network of a GPU, for the second part [%(default)s]")


def shape_of(args: argparse.Namespace) -> Shape:
    """Heads of 64, a quarter as many of keys and values."""
    heads = args.hidden // 64
    if args.hidden % 64 or heads % max(1, heads // 4):
        raise study.Refused(f"--hidden must be 64 times 1, 2, 3 or a multiple of 4, got {args.hidden}")
    sizes = (args.hidden, args.intermediate, args.layers)
    return Shape("Llama", *sizes, heads=heads, kv_heads=max(1, heads // 4), vocab=args.vocab, tied=False)


def run(args: argparse.Namespace, origin: Content) -> Content:
    shape, load, groups = shape_of(args), warn_if_busy(), []
    settings = {"rounds": args.rounds, "samples": args.samples, "length": args.length}
    for count in args.processes:
        given = (shape, CONTENDERS, *settings.values())
        groups.append({"processes": count, "contenders": merged(in_group(ranks.measure, given, count, LIMIT))})
        print(f"measured with {count} processes", flush=True)
    sizes = {key: getattr(args, key) for key in ("hidden", "intermediate", "layers", "vocab")}
    content = {
        **origin,
        "load_average": load,
        "settings": {**settings, **sizes, "gbytes_per_second": args.gbytes_per_second},
        "weights": shape.weights,
        "groups": groups,
        "computed": paper.computed(args.gbytes_per_second),
    }
    study.write_json(args.out, content)
    return content


# ---- tables


def mib(count: float) -> str:
    return f"{count / MIB:,.2f}" if count else "0"


def gb(count: float) -> str:
    return f"{count / 1e9:,.3g}" if count < 1e11 else f"{count / 1e9:,.0f}"


def communicated_table(contenders: Content) -> str:
    head = ["MiB a step", "trained", "all-gathers of frozen weights", "values: forward", "backward", "after the step"]
    head += [
        "gradients: reduce-scatter",
        "all-reduces",
        "all beyond the weights",
        "times 4 bytes of the trained",
        "bar",
    ]
    floor = contenders[FROZEN]["communicated"]
    weights = sum(kinds[GATHERED] for kinds in floor.values())
    rows = []
    for name, c in contenders.items():
        total = sum(c["beyond"].values())
        ratio = f"{total / (4 * c['trained']):.3f}" if c["trained"] else ""
        bar = f"{mib(c['bar'])}: {'met' if c['met'] else 'not met'}" if "bar" in c else ""
        parts = [mib(c["beyond"][part]) for part in ("forward", "backward", "step", "reduced", "all_reduced")]
        rows.append([name, f"{c['trained']:,}", mib(weights), *parts, mib(total), ratio, bar])
    return study.table(head, rows)


def held_table(contenders: Content) -> str:
    head = ["MiB on a rank", "weights", "values or adapters", "moments", "gradients"]
    head += ["positions", "all", "peak above the sharded model", "ms a step"]
    rows = []
    for name, c in contenders.items():
        held = c["held"]
        more = [mib(sum(held.values())), mib(c["peak_bytes"]), f"{1e3 * c['step_seconds']:.0f}"]
        rows.append([name, *map(mib, held.values()), *more])
    return study.table(head, rows)


def computed_table(record: Content) -> str:
    head = ["GB on a GPU", "weights", "fp32 values or adapters", "moments", "gradients", "positions"]
    head += ["all", "a step: weights gathered", "beyond them", "seconds"]
    rows = []
    for c in record["contenders"]:
        held = [c["held"][part] for part in ("weights", "values", "moments", "gradients", "positions")]
        costs = [*held, sum(held), c["weights_gathered"], c["beyond"]]
        rows.append([c["name"], *map(gb, costs), f"{c['seconds']:.2f}"])
    return study.table(head, rows)


def table(content: Content) -> str:
    s = content["settings"]
    text = [
        f"A Llama of {s['layers']} blocks of {s['hidden']} x {s['intermediate']} and a vocabulary of {s['vocab']:,} "
        f"({content['weights']:,} weights), fp32, {s['samples']} x {s['length']} tokens a process, each block and then "
        f"the rest under `fully_shard`, one thread a process, gloo on this machine; times are medians of {s['rounds']} "
        "interleaved rounds. Communicated is the whole output of an all-gather, and the whole input of a "
        "reduce-scatter: a rank sends or receives (ranks - 1) / ranks of it. The bar for what is communicated beyond "
        f"the frozen weights is {BAR} times the 4 bytes of each selected element.",
    ]
    for group in content["groups"]:
        many = f"{group['processes']} process{'es' if group['processes'] > 1 else ''}"
        text += [f"**{many}**", communicated_table(group["contenders"]), held_table(group["contenders"])]
    text.append(
        "**Computed from shapes, not measured**: bf16 weights; FSDP2 of every block and then the rest over all GPUs, "
        "the rest gathered once, blocks again in backward; fp32 values or adapters, moments and gradients. Seconds are "
        f"those of the bytes alone at {s['gbytes_per_second']:g} GB/s for each GPU, with nothing overlapped. LoRA's "
        "A has 16 rows, which FSDP2 pads to one for each GPU."
    )
    for record in content["computed"]:
        text += [f"{record['model']}, {record['weights']:,} weights, {record['gpus']} GPUs:", computed_table(record)]
    return "\n\n".join([*text, study.written_by(content, "python -m benchmarks sharded")])


main = program(
    "sharded",
    __doc__,
    arguments,
    run,
    table,
    small=shlex.split("--processes 2 --rounds 1 --length 16 --hidden 128 --intermediate 320 --layers 2 --vocab 511"),
)
