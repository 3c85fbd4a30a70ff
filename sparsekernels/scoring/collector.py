"""One batched backward, split by sample: hooks catch the two factors of each gradient, and an op squares it.

A weight's gradient is a sum over tokens of products of two activations. Each token belongs to one sample, so these
determine the gradients of all samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..index import Index
from ..ops import fisher_squares_, gather
from ..structure.layers import kind_of
from .eval_mode import in_eval_mode, only_trainable
from .losses import Batch, PerSampleLoss, rows_of, to_device
from .own_forward import OwnForward
from .pairs import Pair, add_squares_, pair_of, uncancelled


class Misfit(Exception):
    """A module that was split by sample got an input that cannot be split: everything collected so far is void."""


class _Hold(torch.autograd.Function):
    """The identity; saves its input the way autograd saves tensors, so that checkpointing recomputes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Start(torch.autograd.Function):
    """A copy of its input that requires a gradient and passes none on: where backward ends in a frozen model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class Target:
    """One parameter, and the total of its squares. This backward expects `calls` uses of it, and caught `pairs`."""

    def __init__(self, name: str, parameter: nn.Parameter, index: Index | None, total: Tensor | None) -> None:
        self.name, self.parameter, self.index, self.total = name, parameter, index, total
        self.norms: Tensor | None = None
        self.calls = 0
        self.uncancelled = 0.0
        self.pairs: list[Pair] = []


@dataclass
class Trust:
    """Results of checks: parameters that need a backward per sample, with the reason; modules that were checked.

    outside: parameters that are used outside the forward of their module. expand: whether positions shared by all
    samples may be expanded to one copy per sample.
    """

    outside: set[str] = field(default_factory=set)
    fallback: dict[str, str] = field(default_factory=dict)
    seen: set[nn.Module] = field(default_factory=set)
    expand: bool = True


class Collector:
    """Sums squares of per-sample gradients of some parameters of a model; a context manager.

    Inside it, the model is in eval mode and frozen except for what is being differentiated; on exit, modes,
    requires_grad and gradients are restored.

    Args:
        model: any torch model. loss: what to differentiate.
        indices: parameter name -> the part of it to score, or None for all of it.
        totals: name -> tensor to add the squares to, summed over samples; names may be missing.
        trust: results of the check of these parameters; shared and added to.

    Attributes:
        uses: set while parameters used outside their module's forward are to be found.
        checking: set while parameters are checked: modules that were never seen are accepted.
        expanded: whether positions shared by all samples were expanded to one copy per sample.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        indices: Mapping[str, Index | None],
        totals: Mapping[str, Tensor],
        trust: Trust,
    ) -> None:
        self.model = model
        named = dict(model.named_parameters(remove_duplicate=False))
        self.targets: dict[int, Target] = {}
        for name, index in indices.items():
            if id(named[name]) in self.targets:
                raise ValueError(
                    f"{name!r} and {self.targets[id(named[name])].name!r} are one tied parameter; pass one name"
                )
            self.targets[id(named[name])] = Target(name, named[name], index, totals.get(name))
        if len({(t.parameter.device, t.parameter.dtype == torch.float64) for t in self.targets.values()}) > 1:
            raise ValueError(
                "the parameters are on several devices, or partly fp64: call this for each part separately"
            )
        self.loss, self.trust = loss, trust
        self.owners: dict[nn.Module, dict[str, Target]] = {}
        for module in model.modules():
            mine = {n: self.targets[id(p)] for n, p in module._parameters.items() if id(p) in self.targets}
            if mine and kind_of(module) is not None:
                self.owners[module] = mine
        caught = {target.name for mine in self.owners.values() for target in mine.values()}
        for target in self.targets.values():
            if target.name not in caught:
                owner = model.get_submodule(target.name.rpartition(".")[0])
                self.fallback.setdefault(target.name, f"{type(owner).__name__} is not split by sample")
        self._catching = self._recomputing = self.checking = self.expanded = False
        self._inputs: dict[nn.Module, Tensor] = {}
        self.uses: OwnForward | None = None

    @property
    def fallback(self) -> dict[str, str]:
        """name -> why this parameter's gradient is computed one sample at a time."""
        return self.trust.fallback

    def __enter__(self) -> Collector:
        parameter = next(iter(self.targets.values())).parameter
        self.device, self._compute_dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        with ExitStack() as stack:
            stack.enter_context(only_trainable(self.model))
            stack.enter_context(in_eval_mode(self.model))
            for module in self.owners:
                stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after).remove)
            self._left = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def add(self, batch: Batch, size: int, number: int) -> Tensor:
        """Add the squares for a batch of `size` samples; return the squared norms ([size]) over all targets.

        Raises:
            Misfit: a parameter has just moved to the fallback; totals are void.
            ValueError: the gradient of a sample is not finite; the message names the sample.
        """
        batch = to_device(batch, self.device)
        norms = torch.zeros(size, dtype=self._compute_dtype, device=self.device)
        for target in self.targets.values():
            target.norms = norms
        self.run(batch, size)
        targets = [target for target in self.targets.values() if target.name in self.fallback]
        for b in range(size if targets else 0):
            self._alone(targets, rows_of(batch, torch.tensor([b]), size), b)
        finite = self._finite & norms.isfinite()
        if not bool(finite.all()):
            broken = int(finite.logical_not().nonzero()[0])
            raise ValueError(f"samples: the gradient of sample {broken} in batch {number} is not finite")
        return norms

    def run(self, batch: Batch, size: int) -> None:
        """One forward and backward of a batch; squares are added for all parameters that are not in the fallback."""
        self.size, self.length = size, _length(batch)
        self._finite = torch.ones(size, dtype=torch.bool, device=self.device)
        for target in self.targets.values():
            target.calls = 0
        try:
            self._catching = True
            for term, last in _with_last(self.loss.terms(self.model, batch, size)):
                if self.uses is not None:
                    self.trust.outside |= self.uses.outside(term)
                self._recomputing = True  # any forward from here on is recomputation by checkpointing
                if term.requires_grad:
                    term.sum().backward(retain_graph=not last)
                for target in self.targets.values():
                    self._finish(target)  # those with a use without a gradient
        finally:
            self._catching = self._recomputing = False
            self._inputs.clear()
            for target in self.targets.values():
                target.pairs = []

    def _alone(self, targets: list[Target], batch: Batch, sample: int) -> None:
        parameters = [target.parameter.requires_grad_(True) for target in targets]
        try:
            for term, last in _with_last(self.loss.terms(self.model, batch, 1)):
                if not term.requires_grad:
                    continue  # none of them is used
                grads = torch.autograd.grad(term.sum(), parameters, allow_unused=True, retain_graph=not last)
                for target, grad in zip(targets, grads, strict=True):
                    if grad is not None:
                        self._square(target, grad, sample)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _square(self, target: Target, grad: Tensor, sample: int) -> None:
        grad = grad.to_dense() if grad.is_sparse else grad.contiguous()
        grad = grad if target.index is None else gather(grad, target.index)
        if target.total is not None:
            fisher_squares_([target.total], [grad])
        assert target.norms is not None
        target.norms[sample] += torch.linalg.vector_norm(grad, dtype=target.norms.dtype).square()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._catching or not self._caught(module):
            return None
        if not torch.is_grad_enabled():
            if self._recomputing:
                return None  # _normalised calls a norm's forward
            name = next(iter(self._caught(module).values())).name
            raise ValueError(
                f"the module of {name!r} runs without gradients; with gradient checkpointing pass use_reentrant=False, "
                "otherwise leave the parameter out"
            )
        if self.checking:
            self.trust.seen.add(module)
        elif module not in self.trust.seen:
            self._give_up(module, "was not used by the sample that was checked")
        x: Any = args[0] if args else kwargs.get("input", kwargs.get("hidden_states"))
        if not isinstance(x, Tensor):
            self._give_up(module, "has no tensor as its first argument")
        changed = x
        if kind_of(module) == "embedding" and x.dim() == 2 and len(x) == 1 < self.size and self.trust.expand:
            self.expanded = True
            changed = x.expand(self.size, -1)  # positions shared by all samples: each sample gets its own gradient
        elif x.requires_grad:
            changed = _Hold.apply(x)
        self._inputs[module] = changed
        if args:
            return (changed, *args[1:]), kwargs
        return args, {key: changed if value is x else value for key, value in kwargs.items()}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        x = self._inputs.pop(module, None)
        if x is None:
            return None
        lead = x.shape if kind_of(module) == "embedding" else x.shape[:-1]
        by_sample = len(lead) > 0 and lead[0] == self.size
        flattened = len(lead) == 1 and lead[0] == self.size * self.length > 0  # samples and tokens in one dimension
        if not (by_sample or flattened) or not isinstance(output, Tensor) or output.shape[:-1] != lead:
            self._give_up(module, f"has input {list(x.shape)}, which is not split into {self.size} samples")
        targets = self._caught(module)
        if not self._recomputing:
            for target in targets.values():
                target.calls += 1
        started = output if output.requires_grad else _Start.apply(output, self._anchor)
        node = x.grad_fn  # not x itself, which checkpointing frees
        saved = x if node is None or node.name() != "_HoldBackward" else node
        started.register_hook(partial(self._arrived, module, targets, saved))
        return started

    def _caught(self, module: nn.Module) -> dict[str, Target]:
        return {n: t for n, t in self.owners[module].items() if t.name not in self.fallback}

    def _give_up(self, module: nn.Module, reason: str) -> None:
        self.fallback.update({t.name: f"{type(module).__name__} {reason}" for t in self._caught(module).values()})
        raise Misfit

    def _arrived(self, module: nn.Module, targets: dict[str, Target], saved: Any, grad: Tensor) -> None:
        x = saved if isinstance(saved, Tensor) else saved.saved_tensors[0]
        grad = grad.detach().reshape(self.size, -1, grad.shape[-1])
        bias = targets.get("bias")
        if bias is None or bias.index is not None:  # else the norm of its gradient, the same sum, shows it
            self._finite &= grad.flatten(1).sum(1, dtype=self._compute_dtype).isfinite()
        for attribute, target in targets.items():
            target.pairs.append(pair_of(module, attribute, grad, x.detach()))
            if len(target.pairs) >= target.calls:
                self._finish(target)

    def _finish(self, target: Target) -> None:
        pairs, target.pairs = target.pairs, []
        if pairs:
            if self.checking:
                target.uncancelled += uncancelled(pairs)
            add_squares_(pairs, target.parameter.shape, target.total, target.norms, target.index)


def _length(batch: Batch) -> int:
    """Number of tokens of each sample; 0: unknown."""
    ids = batch.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else 0


def _with_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each item, and whether it is the last."""
    ahead = iter(items)
    item = next(ahead, None)
    while item is not None:
        following = next(ahead, None)
        yield item, following is None
        item = following
