"""Per-sample gradients in one batched backward: hooks catch what reaches each module, and an op squares it per sample.

A weight's gradient is a sum over tokens of products of two activations. Hooks catch both; since each token belongs to
one sample, they determine the gradient of every sample. Two assumptions are checked: that a module's tokens are laid
out by sample, and that its parameters are used nowhere else. `Collector.check` compares norms with autograd on one
sample, and the shapes of every batch must fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
from .own_forward import OwnForward
from .pairs import Pair, add_squares_, pair_of, uncancelled

AGREES = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative, of squared norms
AGREES_HALF = 0.05  # the whole gradient that is compared with is rounded to half precision
# Where the tokens' parts cancel, as for the bias of keys, rounding remains. Relative to the norm without cancelling.
ROUNDING = {torch.float64: 1e-24, torch.float32: 1e-10}
ROUNDING_HALF = 1e-4

Terms = Callable[[], Iterable[Tensor]]  # runs the model; each term is [B], and their squares add up


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
        samples
    may be expanded to one copy per sample.
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
        model: any torch model.
        indices: parameter name -> the part of it to score, or None for all of it.
        totals: name -> tensor to add the squares to, summed over samples; names may be missing.
        trust: results of an earlier `check` of these parameters; shared and added to.
    """

    def __init__(
        self,
        model: nn.Module,
        indices: Mapping[str, Index | None],
        totals: Mapping[str, Tensor] | None = None,
        trust: Trust | None = None,
    ) -> None:
        self.model = model
        named = dict(model.named_parameters(remove_duplicate=False))
        self.targets: dict[int, Target] = {}
        for name, index in indices.items():
            if id(named[name]) in self.targets:
                raise ValueError(
                    f"{name!r} and {self.targets[id(named[name])].name!r} are one tied parameter; pass one name"
                )
            self.targets[id(named[name])] = Target(name, named[name], index, (totals or {}).get(name))
        if len({(t.parameter.device, t.parameter.dtype == torch.float64) for t in self.targets.values()}) > 1:
            raise ValueError(
                "the parameters are on several devices, or partly fp64: call this for each part separately"
            )
        self.trust = trust or Trust()
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
        self._catching = self._recomputing = self._checking = self._expanded = False
        self._inputs: dict[nn.Module, Tensor] = {}
        self._uses: OwnForward | None = None

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

    # ---- one batch

    def add(
        self, terms: Terms, one: Callable[[int], Iterable[Tensor]], size: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Add the squares for a batch of `size` samples of `length` tokens (0: unknown).

        `terms()` runs the batch; `one(b)` runs sample b alone, for parameters of the fallback.

        Returns:
            squared norms ([size]) over all targets, and whether all gradients of each sample were finite ([size],
            bool).

        Raises:
            Misfit: a parameter has just moved to the fallback; totals are void.
        """
        norms = torch.zeros(size, dtype=self._compute_dtype, device=self.device)
        for target in self.targets.values():
            target.norms = norms
        self._run(terms, size, length)
        targets = [target for target in self.targets.values() if target.name in self.fallback]
        for b in range(size if targets else 0):
            self._alone(targets, one(b), b)
        return norms, self._finite & norms.isfinite()

    def _run(self, terms: Terms, size: int, length: int) -> None:
        self.size, self.length = size, length
        self._finite = torch.ones(size, dtype=torch.bool, device=self.device)
        for target in self.targets.values():
            target.calls = 0
        try:
            self._catching = True
            for term, last in _with_last(terms()):
                if self._uses is not None:
                    self.trust.outside |= self._uses.outside(term)
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

    def _alone(self, targets: list[Target], terms: Iterable[Tensor], sample: int) -> None:
        parameters = [target.parameter.requires_grad_(True) for target in targets]
        try:
            for term, last in _with_last(terms):
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

    # ---- trust, but verify

    def check(self, terms: Terms, length: int) -> bool:
        """Compare with autograd on a batch of one sample twice; parameters that disagree move to the fallback.

        For each parameter, both samples' norms must be equal, and a quarter of that of the whole gradient. Whole
        gradients exist one at a time. Parameters used outside their module's forward move there too, however small
        their gradients. Returns whether any parameter had a gradient.
        """
        expected: dict[str, float] = {}

        def freed(target: Target, parameter: Tensor) -> None:
            assert parameter.grad is not None
            grad = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
            compute_dtype = torch.promote_types(grad.dtype, torch.float32)
            norm = float(torch.linalg.vector_norm(grad, dtype=compute_dtype))
            expected[target.name] = expected.get(target.name, 0.0) + norm**2 / 4
            parameter.grad = None

        self._checking, self._expanded = True, False
        targets = list(self.targets.values())
        kept = [(target.index, target.total) for target in targets]
        hooks = []
        tables = [module for module in self.owners if _may_be_sparse(module)]
        try:
            for table in tables:
                table.sparse = True  # type: ignore[assignment]  # a dense gradient would be mostly zeros
            for target in targets:
                target.index = target.total = None
                target.parameter.requires_grad_(True)
                hooks.append(target.parameter.register_post_accumulate_grad_hook(partial(freed, target)))
            with OwnForward(self.model, {target.name: target.parameter for target in targets}) as self._uses:
                while True:
                    expected.clear()
                    for target in targets:
                        target.uncancelled = 0.0
                        target.norms = target.parameter.new_zeros(
                            2, dtype=torch.promote_types(target.parameter.dtype, torch.float32)
                        )
                    try:
                        self._run(terms, 2, length)
                        break
                    except Misfit:
                        continue  # with one parameter less to check
                    except Exception:
                        if not self._expanded or not self.trust.expand:
                            raise
                        self.trust.expand = False  # the model does not accept positions for each sample
        finally:
            self._checking, self._uses = False, None
            for table in tables:
                table.sparse = False  # type: ignore[assignment]
            for hook in hooks:
                hook.remove()
            for target, (target.index, target.total) in zip(targets, kept, strict=True):
                target.parameter.requires_grad_(False)
                target.parameter.grad = None
        autocast = torch.is_autocast_enabled(self.device.type)
        for target in targets:
            assert target.norms is not None
            if target.name in self.trust.outside:
                self.fallback.setdefault(target.name, "used outside its module's forward")
            dtype = torch.bfloat16 if autocast else target.parameter.dtype
            own = expected.get(target.name, 0.0)
            allowed = AGREES.get(dtype, AGREES_HALF) * own + ROUNDING.get(dtype, ROUNDING_HALF) * target.uncancelled
            if target.name not in self.fallback and float((target.norms - own).abs().max()) > allowed:
                self.fallback[target.name] = "its module's activations do not give its whole gradient"
        return bool(expected)

    # ---- hooks

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
        if self._checking:
            self.trust.seen.add(module)
        elif module not in self.trust.seen:
            self._give_up(module, "was not used by the sample that was checked")
        x: Any = args[0] if args else kwargs.get("input", kwargs.get("hidden_states"))
        if not isinstance(x, Tensor):
            self._give_up(module, "has no tensor as its first argument")
        changed = x
        if kind_of(module) == "embedding" and x.dim() == 2 and len(x) == 1 < self.size and self.trust.expand:
            self._expanded = True
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
            if self._checking:
                target.uncancelled += uncancelled(pairs)
            add_squares_(pairs, target.parameter.shape, target.total, target.norms, target.index)


def _may_be_sparse(module: nn.Module) -> bool:
    """Whether it is an embedding with dense gradients and no gradient hooks of the user."""
    if kind_of(module) != "embedding" or module.sparse:
        return False
    weight: Any = module.weight
    return not weight._backward_hooks and not weight._post_accumulate_grad_hooks


def _with_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each item, and whether it is the last."""
    ahead = iter(items)
    item = next(ahead, None)
    while item is not None:
        following = next(ahead, None)
        yield item, following is None
        item = following
