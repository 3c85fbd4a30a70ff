"""Put gates on a model's projections."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...common.names import default_head, default_targets, matching
from ...common.supported import refuse_unsupported_of
from ...nn.gated import Gating, LayerGates, gate
from ...ops.gates.checks import Kind
from ...structure.layers import kind_of, weight_size
from ...structure.pruning_plan import Planner
from ...training.layers import refuse_train_only
from .parts import OPEN, Original, Vector
from .rounding import Dimensions
from .saving import is_compressed
from .schedule import Schedule
from .training import Gates

GRANULARITIES = ("row+column", "head", "mlp", "head+mlp")
NOISES = {"stg": 0.5, "finegates": 0.5, "hard_concrete": 2 / 3}
PUBLISHED_NOISE, PUBLISHED_LOGITS = 0.1, (1.0, 0.1)  # standard deviation; mean and standard deviation at first


def attach(
    model: nn.Module,
    pruning_ratio: float,
    total_steps: int,
    *,
    kind: Kind = "stg",
    noise: float | None = None,
    granularity: str = "row+column",
    targets: Iterable[str] | None = None,
    head: Iterable[str] | None = None,
    lora_rank: int = 0,
    lora_scale: float = 1.0,
    published_penalty: float | None = None,
) -> Gates:
    """Freeze a model and add stochastic gates to its projections; training them ends in a smaller model.

        gates = sk.methods.gates.attach(model, pruning_ratio=0.3, total_steps=len(loader))
        optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
        model.train()
        for batch in loader:
            (model(**batch).loss + gates.penalty()).backward()
            optimizer.step(); optimizer.zero_grad(); gates.step()
        gates.compress().save_pretrained(folder)

    Trained are the gates, low-rank factors if requested, biases and norms of the blocks, and the head. If you clip
    gradients, clip those of the other parameters only: the penalty moves all gates at once, and its gradient is large.
    An in-place operation on the output of a gated layer raises in backward, because the output is saved.

    A layer whose weight or bias is also used outside its module's forward, as by a Mamba mixer, cannot be cut. That is
    detected up to the first `Gates.step`: the layer is then left ungated and no longer counted in the share; if
    `targets` names it, `step` raises. Uses in eval mode, under no_grad, or only in later steps are not detected.

    Args:
        model: any torch model; changed in place, undone by `restore()`.
        pruning_ratio: share of the parameters of the targets (weights and biases) to remove, in (0, 1).
        total_steps: number of optimizer steps of the whole training; gates close between 10 % and 50 % of them, and are
            frozen from 80 % on.
        kind: "stg", clamp(mu + 0.5 + noise * normal, 0, 1); "finegates", the same with mu = tanh(l); "hard_concrete".
        noise: sigma of the first two, temperature of the last; None: 0.5, 0.5, 2/3; with published_penalty 0.1.
        granularity: "row+column", gates on all rows and columns of the targets; "head", a gate on each attention head,
            or on each key/value head with its query heads; "mlp", one on each neuron; "head+mlp".
        targets: patterns (as in `fnmatch`) of names of weights; None: attention and MLP projections in numbered blocks.
        head: patterns of parameters to train densely; None: classifier, score, pooler and the like.
        lora_rank: r of low-rank factors B A added to every target, inside its gates; 0: none.
        lora_scale: factor of B A.
        published_penalty: the factor of FineGates' own penalty (in their code 50), to be used in place of ours; for
            kind="finegates" and granularity="row+column". The initial logits are then normally distributed, importance
            is not used, and gates close as the penalty drives them; they are fixed after the last step. pruning_ratio
            is the target for the mean probability of being closed, for the rows and for the columns of each layer: the
            share that is removed in the end can be smaller, even 0.

    Returns:
        Gates, the handle of the gated model.

    Numerics: noise comes from torch's generator, one integer per layer and forward: `torch.manual_seed` makes it
    reproducible, and checkpointing repeats it. With published_penalty, the initial logits come from the same generator.
    Cost: a forward, and a backward by the input of each layer without weight gradient; each copies the weight, one
    layer at a time. Saved for backward: a layer's input and its output.

    Raises:
        ValueError: arguments out of range, or published_penalty for another kind or granularity; targets that are not
            weights of Linear or Conv1D modules; heads or neurons of a model whose structure is unknown; a pruning_ratio
            that these gates cannot reach; a model that has gates, was compressed, or is under train_only. The model is
            unchanged then.

    Source: FineGates (Svirsky et al., arXiv 2412.12951), its code (github.com/jsvir/FineGates, 5ab6421) for which
    parameters train and for published_penalty; STG (Yamada et al., arXiv
    1810.04247); hard concrete (Louizos et al., arXiv 1712.01312). Ours: one noise for sampling and P(open), limits of
    the logits at which noise rarely changes a gate, norms that train, which gates close when (see `Gates.penalty`), and
    sizes rounded to multiples of 8 (see `Gates.freeze`).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        >>> gates = sk.methods.gates.attach(model, pruning_ratio=0.3, total_steps=100)
        >>> [(name, p.shape) for name, p in gates.named_parameters() if name.startswith("0.gates")]
        [('0.gates.rows', torch.Size([32])), ('0.gates.columns', torch.Size([16]))]
        >>> model = gates.restore()
    """
    if not 0 < pruning_ratio < 1:
        raise ValueError(f"pruning_ratio must lie in (0, 1), the share to remove, got {pruning_ratio}")
    if total_steps < 10:
        raise ValueError(f"total_steps must be at least 10, the steps of the whole training, got {total_steps}")
    if kind not in NOISES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, NOISES))}, got {kind!r}")
    if noise is None:
        noise = NOISES[kind] if published_penalty is None else PUBLISHED_NOISE
    if not noise > 0:
        raise ValueError(f"noise must be above 0, got {noise}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(map(repr, GRANULARITIES))}, got {granularity!r}")
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 or more, got {lora_rank}")
    if published_penalty is not None:
        if kind != "finegates" or granularity != "row+column":
            raise ValueError(
                'published_penalty is for kind="finegates" and granularity="row+column", '
                f"got {kind!r} and {granularity!r}"
            )
        if not 0 < published_penalty < math.inf:
            raise ValueError(f"published_penalty must be above 0 and finite, got {published_penalty}")
    refuse_train_only(model)
    refuse_unsupported_of(model)
    if any(isinstance(module, LayerGates) for module in model.modules()):
        raise ValueError("the model already has gates; call restore() or compress() on its Gates first")
    if is_compressed(model):
        raise ValueError("the model is already compressed: its cuts could not be saved together with new ones")
    if hasattr(model, "cuts"):
        raise ValueError("the model has an attribute `cuts` of its own, which compress() would overwrite; rename it")
    planner = _planner(model, targets)
    names = planner.names
    places = _Places(model, planner)
    vectors = places.vectors(granularity)
    elements = places.elements(vectors)
    dimensions = Dimensions(vectors, places.attentions, places.mlps)
    parameters = dict(model.named_parameters())
    dense = set(matching(parameters, head, "head") if head is not None else default_head(model))
    gating = Gating(kind, noise, probing=True, watching=True)
    if len({p.device for p in parameters.values()}) > 1:
        raise ValueError("the model is on several devices; gates need it on one")
    _check_reach(planner, vectors, pruning_ratio)

    train = {
        name
        for name, p in parameters.items()
        if p.is_floating_point()
        and (name in dense or (p.dim() < 2 and any(part.isdigit() for part in name.split("."))))
    }
    found = {
        name: Original(p, p.requires_grad, p.detach().clone() if name in train else None)
        for name, p in parameters.items()
    }
    for name, p in parameters.items():
        p.requires_grad_(name in train)
        p.grad = None
    layers = {}
    for name in names:
        sides: dict[str, Any] = {}
        for vector in vectors:
            if vector.layer == name:
                sides[vector.side] = torch.full((vector.count,), OPEN[kind])
                if published_penalty is not None:
                    sides[vector.side].normal_(*PUBLISHED_LOGITS)
                if vector.side == "columns":
                    sides["column_group"] = vector.group
        if sides or lora_rank:
            module = model.get_submodule(name)
            gate(module, gating, **sides, lora_rank=lora_rank, lora_scale=lora_scale)
            layers[name] = module.gates
    schedule, named = Schedule(total_steps, pruning_ratio), targets is not None
    parts = (planner, dimensions, elements, gating, schedule, found, dense, named, published_penalty)
    return Gates(model, layers, vectors, *parts)  # type: ignore[arg-type]


def _planner(model: nn.Module, targets: Iterable[str] | None) -> Planner:
    """A planner of the modules whose weights are targets, except those that cannot be cut."""
    parameters = dict(model.named_parameters())
    chosen = matching(parameters, targets, "targets") if targets is not None else default_targets(model)
    names = []
    for name in chosen:
        module, _, attribute = name.rpartition(".")
        if attribute == "weight" and kind_of(model.get_submodule(module)) in ("linear", "conv1d"):
            names.append(module)
        elif targets is not None:
            raise ValueError(f"targets: {name!r} is not the weight of a plain Linear or Conv1D; leave it out")
    planner = Planner(model, names)
    uncut = bool(planner.uncut)
    if uncut and targets is not None:
        raise ValueError(
            f"targets: {min(planner.uncut)!r} shares its weight, has hooks, or is also used outside its module's "
            "forward; leave it out"
        )
    planner.only_cuttable()
    if not planner.names:
        why = "all of them share weights, have hooks, or are read by other modules" if uncut else "pass targets"
        raise ValueError(f"targets: the model has no Linear or Conv1D in numbered blocks that can be cut; {why}")
    return planner


class _Places:
    """Where gates can be: sizes of the layers, and the heads and neurons whose layers are all targets."""

    def __init__(self, model: nn.Module, planner: Planner) -> None:
        self.sizes = {name: weight_size(model.get_submodule(name)) for name in planner.names}
        self.biases = {name: model.get_submodule(name).bias is not None for name in planner.names}
        self.attentions, self.mlps = planner.attentions, planner.mlps

    def vectors(self, granularity: str) -> list[Vector]:
        """The vectors of gates, one after another."""
        wanted: list[tuple[str, str, int, int]] = []
        if granularity == "row+column":
            for name, (m, n) in self.sizes.items():
                wanted += [(name, "rows", m, 1), (name, "columns", n, 1)]
        for part, there in (("head", self.attentions), ("mlp", self.mlps)):
            if part in granularity and not there:
                raise ValueError(
                    f'granularity {granularity!r}: the targets have no {part} of a known structure; use "row+column"'
                )
        if "head" in granularity:
            wanted += [(a.output, "columns", a.groups, a.query_rows) for a in self.attentions]
        if "mlp" in granularity:
            wanted += [(mlp.output, "columns", mlp.neurons, 1) for mlp in self.mlps]
        vectors, start = [], 0
        for layer, side, count, group in wanted:
            vectors.append(Vector(layer, side, start, count, group))
            start += count
        return vectors

    def elements(self, vectors: list[Vector]) -> Tensor:
        """[gates]: the number of parameters removed with each gate, if only that one is closed."""
        rows = {name: torch.full((m,), float(n + self.biases[name])) for name, (m, n) in self.sizes.items()}
        columns = {name: torch.full((n,), float(m)) for name, (m, n) in self.sizes.items()}
        found = {"rows": {k: x.clone() for k, x in rows.items()}, "columns": {k: x.clone() for k, x in columns.items()}}
        heads = {}
        for a in self.attentions:
            q, k, v = (rows[p.module][p.places].view(a.groups, -1) for p in (a.query, a.key, a.value))
            out = columns[a.output].view(a.groups, -1, a.kv_rows)
            heads[a.output] = torch.stack([x.flatten(1).sum(1) for x in (q, k, v, out)]).sum(0)
            found["rows"][a.value.module][a.value.places] = (v + out.sum(1)).flatten()
            if out.shape[1] == 1:  # else other columns read the same dimension of the value
                found["columns"][a.output] = (v + out[:, 0]).flatten()
                if not a.rotary:
                    for part in (a.query, a.key):
                        found["rows"][part.module][part.places] = (q + k).flatten()
        for mlp in self.mlps:
            whole = columns[mlp.output] + sum(rows[part.module][part.places] for part in mlp.inputs)
            found["columns"][mlp.output] = whole
            for part in mlp.inputs:
                found["rows"][part.module][part.places] = whole
        return torch.cat(
            [heads[v.layer] if v.layer in heads and v.group > 1 else found[v.side][v.layer] for v in vectors]
        )


def _check_reach(planner: Planner, vectors: list[Vector], pruning_ratio: float) -> None:
    rows = {v.layer: torch.zeros(v.count, dtype=torch.bool) for v in vectors if v.side == "rows"}
    columns = {v.layer: torch.zeros(v.count * v.group, dtype=torch.bool) for v in vectors if v.side == "columns"}
    reach = planner.count(rows, columns) / planner.total
    if reach < pruning_ratio:
        raise ValueError(
            f"pruning_ratio is {pruning_ratio:.1%}, but these gates can remove {reach:.1%} of the targets' parameters"
        )
