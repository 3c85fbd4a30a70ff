"""A model with gates: its penalty and schedule during training, and the smaller model at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...common.messages import warn
from ...nn.gated import Gating, LayerGates, put_back, ungate
from ...ops import gate_values
from ...structure.pruning_plan import Planner, cut
from .measuring import check_measured, take_gradients
from .parts import OPEN, RATES, SHUT, Original, Vector, Wrong, distance
from .rounding import Dimensions
from .saving import mark_compressed
from .schedule import Importance, Schedule, closing_order, threshold

EVERY = 10  # steps between two updates of the threshold


class Gates:
    """The handle returned by `attach`: the gates of a model, what else trains, and how to undo or finish.

    Train the model as before, with `penalty()` added to the loss and `step()` called after the optimizer's. As a
    context manager it restores the model on exit, unless it was compressed.

    Attributes:
        model: the model.
        schedule: which share is to be removed when.
        steps: number of calls of `step`.
        threshold: gates of lower importance close; it rises during training.
        frozen: whether gates are fixed.

    Source: ours; see `attach` for the papers.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        >>> gates = sk.methods.gates.attach(model, pruning_ratio=0.3, total_steps=10)
        >>> for _ in range(10):
        ...     (model(torch.randn(8, 16)).square().mean() + gates.penalty()).backward()
        ...     gates.step()  # after optimizer.step(); optimizer.zero_grad()
        >>> model = gates.compress()
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LayerGates],
        vectors: list[Vector],
        planner: Planner,
        dimensions: Dimensions,
        elements: Tensor,
        gating: Gating,
        schedule: Schedule,
        found: Mapping[str, Original],
        head: set[str],
        named: bool,
        published: float | None = None,
    ) -> None:
        self.model, self.schedule = model, schedule
        self.steps, self.threshold, self.frozen = 0, 0.0, False
        self._layers, self._head = dict(layers), head
        self._vectors, self._planner, self._dimensions = vectors, planner, dimensions
        self._gating, self._found, self._named, self._published = gating, found, named, published
        self._left_out: set[str] = set()
        self._importance = Importance(elements)
        self._vector_of = torch.arange(len(vectors)).repeat_interleave(torch.tensor([v.count for v in vectors]))
        self._weights = torch.zeros_like(elements)
        self._fixed: list[Tensor] = []

    # Training.

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that trains: gates, low-rank factors, and the model's biases, norms and head."""
        self._check_in_use()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without names."""
        for _, parameter in self.named_parameters():
            yield parameter

    def param_groups(
        self, lr: float = 1e-3, *, gate_lr: float | None = None, head_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Make parameter groups for AdamW, one per learning rate.

        Args:
            lr: of biases and norms; `lora_A` gets half of it, `lora_B` four times it (LoRA+, Hayou et al., arXiv
                2402.12354).
            gate_lr: of the gates, whose logits move by up to 4 (stg); None: 0.1, finegates 0.08, hard_concrete 0.4;
                FineGates' code has 1e-3.
            head_lr: of the task head; None: lr.
            weight_decay: of low-rank factors and of matrices in the head; everything else has none.

        Examples:
            >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
            >>> gates = sk.methods.gates.attach(model, pruning_ratio=0.3, total_steps=100)
            >>> [(group["lr"], len(group["params"])) for group in gates.param_groups(lr=1e-3)]
            [(0.001, 2), (0.1, 4)]
            >>> len(dict(gates.named_parameters())), len(list(gates.parameters()))
            (6, 6)
            >>> sorted(gates.open_gates()), gates.removed()
            (['0', '2'], 0.0)
        """
        rate = RATES[self._gating.kind] if gate_lr is None else gate_lr
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            last = name.rpartition(".")[2]
            if name.endswith((".gates.rows", ".gates.columns")):
                key = (rate, 0.0)
            elif last in ("lora_A", "lora_B"):
                key = (lr * (0.5 if last == "lora_A" else 4), weight_decay)
            else:
                own = head_lr if head_lr is not None and name in self._head else lr
                key = (own, weight_decay if parameter.dim() > 1 else 0.0)
            found.setdefault(key, []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in found.items()]

    def penalty(self) -> Tensor:
        """Return the term to add to each batch's loss; 0 until gates are to close, and once they are frozen.

        A gate of importance s is to close if s is below the threshold (unless it makes a size a multiple of 8), and to
        stay open if s is above. The penalty is the sum over all gates of |(threshold - s) / (threshold + s)| times the
        probability of the opposite: nearly 0 once gates are where they should be. Ours; the papers use the sum of
        P(open) times a constant lambda. `step` raises the threshold until the gates below it make up the share wanted
        at that step.

        With `published_penalty`, that of FineGates' code: this factor times the mean over all vectors of gates, rows
        and columns of each layer, of |mean P(open) - (1 - pruning_ratio)|, where P(open) is that under a noise of 0.5.
        """
        self._check_in_use()
        logits = self._logits()
        if self._published is not None:
            if self.frozen:
                return logits[0].new_zeros(())
            used = [x for vector, x in zip(self._vectors, logits, strict=True) if vector.layer not in self._left_out]
            return self._published * distance(used, 1 - self.schedule.pruning_ratio)
        if self.frozen or self.threshold == 0:
            return logits[0].new_zeros(())
        result: Tensor = Wrong.apply(self._weights.to(logits[0].device), self._gating, *logits)
        return result

    @torch.no_grad()
    def step(self) -> None:
        """Advance the schedule by one step; call it after each `optimizer.step()`.

        Updates importance from the gates' gradients, clamps logits to their range, every 10 steps sets the threshold so
        that the wanted share is removed (counted as `compress` does), and freezes the gates in the end. Gates that no
        gradient ever reached stay open: their importance is unknown. With `published_penalty` it moves no gate, and
        freezes them after the last step.

        Raises:
            ValueError: a layer that `targets` names is also used outside its module's forward. Nothing has changed.
            RuntimeError: no gradient reached any gate since the last step, as in eval mode or without backward: nothing
                has changed then. Or the wanted share is out of reach without gates that no gradient ever reached: the
                step counts, and no more gates close.
        """
        self._check_in_use()
        if self.frozen:
            self.steps += 1
            for logits, fixed in zip(self._logits(), self._fixed, strict=True):
                logits.copy_(fixed)  # an optimizer's momentum continues
            return
        gradients = self._take_gradients()
        self.steps += 1
        if self._published is not None:
            if self.steps >= self.schedule.total_steps:
                self.freeze()
            return
        self._importance.add(gradients)
        kind = self._gating.kind
        for logits in self._logits():
            logits.clamp_(SHUT[kind], OPEN[kind])
        if self.schedule.freezes(self.steps):
            self.freeze()
        elif self.steps % min(EVERY, self.schedule.total_steps // 10) == 0:
            wanted = self.schedule.wanted(self.steps)
            if wanted > 0:
                scores = self._importance.values()
                self.threshold, stays = self._choose(scores, None, wanted)
                # If both are infinite the quotient is NaN; its limit is 1.
                share = ((self.threshold - scores) / (self.threshold + scores).clamp_min(1e-38)).abs().nan_to_num(1.0)
                self._weights = torch.where(stays, -share, share)

    @torch.no_grad()
    def freeze(self) -> None:
        """Fix the gates: shut as many as remove `pruning_ratio`; the others stay as open as they are.

        Gates that are shut already come first, then those of least importance. Gates shut beyond that share open again,
        and so do those that make the remaining sizes multiples of 8 (or of less, for sizes that were below 128). Noise
        ends, and gates no longer train. `step` calls this in time; the other parameters go on training and adapt to it.
        With `published_penalty` nothing is shut or opened.

        Raises:
            RuntimeError: the share is out of reach without gates that no gradient ever reached. Nothing has changed.

        Examples:
            >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
            >>> gates = sk.methods.gates.attach(model, pruning_ratio=0.3, total_steps=100)
            >>> model(torch.randn(8, 16)).square().mean().backward()
            >>> gates.step()
            >>> gates.freeze()
            >>> gates.removed() >= 0.3
            True
        """
        self._check_in_use()
        if self._published is not None:
            self._fix()
            return
        closed = torch.cat([gate_values(x, kind=self._gating.kind, noise=1.0)[0] for x in self._logits()]).cpu() == 0
        _, stays = self._choose(self._importance.values(), closed, self.schedule.pruning_ratio)
        kind = self._gating.kind
        for vector, logits in zip(self._vectors, self._logits(), strict=True):
            part = slice(vector.start, vector.start + vector.count)
            keep, was = stays[part].to(logits.device), closed[part].to(logits.device)
            logits[~keep] = SHUT[kind]
            logits[keep & was] = OPEN[kind]
        self._fix()

    def removed(self) -> float:
        """The share of the gated layers' parameters that `compress` would remove now."""
        return self._removed(self._open())

    def open_gates(self) -> dict[str, dict[str, Tensor]]:
        """Layer -> {"rows" or "columns": values in [0, 1] without noise}, on the CPU."""
        found: dict[str, dict[str, Tensor]] = {}
        for vector, logits in zip(self._vectors, self._logits(), strict=True):
            values, _ = gate_values(logits, kind=self._gating.kind, noise=self._gating.noise)
            found.setdefault(vector.layer, {})[vector.side] = values.cpu()
        return found

    # Undo or finish.

    @torch.no_grad()
    def compress(self) -> nn.Module:
        """Cut closed gates out and fold the others into the weights: the model, in place, becomes smaller and plain.

        Returns the model with two more attributes, which copies and pickles of it keep. `cuts` describes the cut:
        `cuts.removed` of `cuts.total` parameters of the gated layers are gone. `save_pretrained(folder)`, which
        replaces that of transformers if there is one, writes a folder for `load`.

        Neurons and heads are removed as a whole; single rows and columns leave a `PrunedLinear`. In eval mode the
        outputs are those of the gated model up to rounding. Gates that are not frozen are taken as they are, with a
        warning.

        Memory: the smaller layers beside the original ones, until all are made. The model is unchanged if that fails.
        """
        self._check_in_use()
        done = f"compressing after {self.steps} of {self.schedule.total_steps} steps: {self.removed():.1%}"
        if self._published is not None:
            if not self.frozen or not self.removed():
                warn(f"{done} will be removed; published_penalty has shut no more gates")
        elif not self.frozen:
            warn(f"{done} of {self.schedule.pruning_ratio:.1%} will be removed; freeze() removes the rest")
        rows, columns = self._masks(self._open())
        cuts = self._planner.plan(rows, columns)
        modules: dict[str, Any] = {name: self.model.get_submodule(name) for name in self._planner.names}
        taken = {name: ungate(modules[name]) for name in self._layers}

        def folded(name: str) -> tuple[Tensor, Tensor | None]:
            module = modules[name]
            if name in taken:
                return taken[name].folded(module.weight, module.bias)
            return (module.weight if isinstance(module, nn.Linear) else module.weight.T), module.bias

        try:
            cut(self.model, cuts, folded)
        except BaseException:
            for name, gates in taken.items():
                put_back(modules[name], gates)
            raise
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._found[name].trained if name in self._found else True)
        self._layers = {}
        mark_compressed(self.model, cuts)
        return self.model

    def restore(self) -> nn.Module:
        """Give the model back as it was found: no gates, all parameters bit for bit. Returns it."""
        if self._layers:
            for name in self._layers:
                ungate(self.model.get_submodule(name))
            for found in self._found.values():
                found.put_back()
            self._layers = {}
        return self.model

    def __enter__(self) -> Gates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save beside the model's state_dict (which has the gates): steps, importance, threshold.

        Examples:
            >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
            >>> gates = sk.methods.gates.attach(model, pruning_ratio=0.3, total_steps=100)
            >>> torch.save(gates.state_dict(), "gates.pt")
            >>> gates.load_state_dict(torch.load("gates.pt"))
            >>> model = gates.restore()
        """
        published = {} if self._published is None else {"published_penalty": self._published}
        return {
            **published,
            "steps": self.steps,
            "frozen": self.frozen,
            "threshold": self.threshold,
            "weights": self._weights.clone(),
            "squares": self._importance.squares.clone(),
            "seen": self._importance.seen.clone(),
            "left_out": sorted(self._left_out),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state.

        Args:
            state: of `state_dict()`; not changed.

        Raises:
            ValueError: the state is of other gates. Nothing has changed then.
        """
        self._check_in_use()
        if set(state) != set(self.state_dict()) or state["squares"].shape != self._importance.squares.shape:
            raise ValueError(f"state is not a state_dict() of {len(self._importance.squares)} gates, as in the model")
        if state.get("published_penalty") != self._published:
            raise ValueError(
                f"state is of published_penalty={state['published_penalty']}, and these gates have {self._published}"
            )
        if self.frozen and not state["frozen"]:
            raise ValueError("state is of gates that are not frozen, but these are; attach() again and load into that")
        if not set(state["left_out"]) <= set(self._layers):
            raise ValueError("state is of other gates: it leaves out layers that these do not have")
        self._check_left_out(state["left_out"])
        self._leave_out(state["left_out"])
        self.steps, self.threshold = int(state["steps"]), float(state["threshold"])
        self._weights = state["weights"].clone()
        self._importance.squares, self._importance.seen = state["squares"].clone(), state["seen"].clone()
        if state["frozen"]:
            self._fix()

    # Inside.

    def _check_in_use(self) -> None:
        if not self._layers:
            raise RuntimeError("the model no longer has gates: it was compressed or restored; attach() again")

    def _logits(self) -> list[Tensor]:
        self._check_in_use()
        return [getattr(self._layers[vector.layer], vector.side) for vector in self._vectors]

    def _open(self) -> Tensor:
        """[gates], bool, on the CPU: which are open in evaluation."""
        gating = self._gating
        values = [gate_values(logits, kind=gating.kind, noise=gating.noise)[0] for logits in self._logits()]
        return torch.cat(values).cpu() > 0

    def _masks(self, is_open: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By layer, the masks of open rows and of open columns."""
        found: dict[str, dict[str, Tensor]] = {"rows": {}, "columns": {}}
        for vector in self._vectors:
            mask = is_open[vector.start : vector.start + vector.count]
            found[vector.side][vector.layer] = mask.repeat_interleave(vector.group) if vector.group > 1 else mask
        return found["rows"], found["columns"]

    def _removed(self, is_open: Tensor) -> float:
        return self._planner.count(*self._masks(is_open)) / self._planner.total

    def _choose(self, scores: Tensor, first: Tensor | None, share: float) -> tuple[float, Tensor]:
        """The threshold at which the share is removed, and the mask [gates] of what stays open, sizes rounded."""
        order = closing_order(scores, self._vector_of, first)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        rounded = self._dimensions.rounding(place)
        found, stays = threshold(scores, order, lambda stays: self._removed(rounded(stays)), share)
        stays = rounded(stays)
        if (reach := self._removed(stays)) < share:
            check_measured(~scores.isinf())
            unknown = {self._vectors[i].layer for i in self._vector_of[scores.isinf()].unique()}
            raise RuntimeError(
                f"no gradient has reached the gates of {len(unknown)} layers, {min(unknown)!r} among them; the others "
                f"can remove {reach:.1%} of the wanted {share:.1%}: restore(), and attach() with targets that every "
                "training step runs"
            )
        return found, stays

    def _take_gradients(self) -> Tensor:
        """[gates], on the CPU: gradients by the values of gates since the last call, for `Importance.add`."""
        gradients, reached, outside = take_gradients(self._layers, self._vectors, self._logits()[0].device)
        left_out = [name for name, each in zip(self._layers, outside, strict=True) if each]
        self._check_left_out(left_out)
        check_measured(reached)
        self._leave_out(left_out)
        self._gating.watching = False
        kept = torch.tensor([vector.layer not in self._left_out for vector in self._vectors])
        return gradients.masked_fill(~(reached & kept)[self._vector_of], torch.nan)

    def _check_left_out(self, names: Sequence[str]) -> None:
        if names and (self._named or self._left_out.union(names) == set(self._layers)):
            raise ValueError(
                f"targets: {names[0]!r} is also used outside its module's forward, where gates have no effect and a "
                "smaller weight would not fit; restore(), and attach() without it"
            )

    def _leave_out(self, names: Sequence[str]) -> None:
        """Let layers compute as they would without gates, as if they had never been targets."""
        self._left_out.update(names)
        self._planner.leave_out(names)
        for name in names:
            self._layers[name].left_out = True

    def _fix(self) -> None:
        self.frozen = self._gating.frozen = True
        self._fixed = [logits.detach().clone() for logits in self._logits()]
