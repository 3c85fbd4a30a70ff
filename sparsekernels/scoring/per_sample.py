"""Per-sample gradients of a model: checked on the first batch, then squared and summed over all batches.

Two assumptions are checked: that a module's tokens are laid out by sample, and that its parameters are used nowhere
else. Norms are compared with autograd's on one sample, and the shapes of every batch must fit. Parameters that disagree
take one backward per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..common.messages import listed, warn
from ..common.supported import refuse_unsupported_of
from ..index import Index
from ..structure.layers import kind_of
from .collector import Collector, Misfit, Target, Trust
from .losses import Batch, Loss, PerSampleLoss, batch_size, rows_of, to_device
from .own_forward import OwnForward

AGREES = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative, of squared norms
AGREES_HALF = 0.05  # the whole gradient that is compared with is rounded to half precision
# Where the tokens' parts cancel, as for the bias of keys, rounding remains. Relative to the norm without cancelling.
ROUNDING = {torch.float64: 1e-24, torch.float32: 1e-10}
ROUNDING_HALF = 1e-4


class PerSampleGradients:
    """Squares of each sample's own gradient, for some parameters of a model.

    Args:
        model: any torch model. batches: the first one is used for the check. loss, labels: as in `fisher_diagonal`.
        indices: name of a parameter -> the part of it that counts, or None for the whole.

    Attributes:
        outside: names of parameters that are used outside the forward of their module.
        fallback: name -> why this parameter takes one backward per sample.

    Raises:
        ValueError: no batch, inference mode, and what `fisher_diagonal` raises for a loss or a model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        indices: Mapping[str, Index | None],
        loss: Loss | None,
        labels: str,
    ) -> None:
        if not batches:
            raise ValueError("samples holds no batch")
        if torch.is_inference_mode_enabled():
            raise ValueError("there are no gradients inside torch.inference_mode(); call this outside it")
        refuse_unsupported_of(model, indices)
        sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]
        self.model, self.loss, self._trust = model, PerSampleLoss(loss, labels), Trust()
        with Collector(model, self.loss, indices, {}, self._trust) as collector, torch.enable_grad():
            first = to_device(batches[0], collector.device)
            self.loss.check(model, first)
            if not _check(collector, rows_of(first, torch.tensor([0, 0]), sizes[0])):
                raise ValueError("loss: no gradient of it reaches any of the chosen parameters")
        self.outside, self.fallback = self._trust.outside, self._trust.fallback

    def add_squares_(
        self,
        batches: Sequence[Batch],
        indices: Mapping[str, Index | None],
        totals: Mapping[str, Tensor],
        progress: bool,
    ) -> Tensor:
        """Add the squares of all samples to `totals`, which are zero; return the squared norm of each sample."""
        sizes = [batch_size(batch, number) for number, batch in enumerate(batches)]
        while True:
            known = set(self.fallback)
            try:
                with (
                    torch.enable_grad(),
                    Collector(self.model, self.loss, indices, totals, self._trust) as collector,
                    tqdm(total=sum(sizes), desc="Fisher", unit="sample", disable=not progress, leave=False) as bar,
                ):
                    norms = []
                    for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
                        norms.append(collector.add(batch, size, number))
                        bar.update(size)
                    return torch.cat(norms)
            except Misfit:
                self.warn_slow(name for name in self.fallback if name not in known)
                for total in totals.values():
                    total.zero_()

    def warn_slow(self, names: Iterable[str]) -> None:
        """Warn of those of the parameters that take one backward per sample, with the reason."""
        slow = [f"{name} ({self.fallback[name]})" for name in names if name in self.fallback]
        if slow:
            warn(f"fisher: {len(slow)} parameters take one backward per sample, exact but slow: {listed(slow)}")


def _check(collector: Collector, twin: Batch) -> bool:
    """Compare with autograd on a batch of one sample twice; parameters that disagree move to the fallback.

    For each parameter, both samples' norms must be equal, and a quarter of that of the whole gradient. Whole gradients
    exist one at a time. Parameters used outside their module's forward move there too, however small their gradients.
    Returns whether any parameter had a gradient.
    """
    expected: dict[str, float] = {}

    def freed(target: Target, parameter: Tensor) -> None:
        assert parameter.grad is not None
        grad = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        compute_dtype = torch.promote_types(grad.dtype, torch.float32)
        norm = float(torch.linalg.vector_norm(grad, dtype=compute_dtype))
        expected[target.name] = expected.get(target.name, 0.0) + norm**2 / 4
        parameter.grad = None

    collector.checking, collector.expanded = True, False
    targets = list(collector.targets.values())
    kept = [(target.index, target.total) for target in targets]
    hooks = []
    tables = [module for module in collector.owners if _may_be_sparse(module)]
    try:
        for table in tables:
            table.sparse = True  # type: ignore[assignment]  # a dense gradient would be mostly zeros
        for target in targets:
            target.index = target.total = None
            target.parameter.requires_grad_(True)
            hooks.append(target.parameter.register_post_accumulate_grad_hook(partial(freed, target)))
        with OwnForward(collector.model, {target.name: target.parameter for target in targets}) as collector.uses:
            while True:
                expected.clear()
                for target in targets:
                    target.uncancelled = 0.0
                    target.norms = target.parameter.new_zeros(
                        2, dtype=torch.promote_types(target.parameter.dtype, torch.float32)
                    )
                try:
                    collector.run(twin, 2)
                    break
                except Misfit:
                    continue  # with one parameter less to check
                except Exception:
                    if not collector.expanded or not collector.trust.expand:
                        raise
                    collector.trust.expand = False  # the model does not accept positions for each sample
    finally:
        collector.checking, collector.uses = False, None
        for table in tables:
            table.sparse = False  # type: ignore[assignment]
        for hook in hooks:
            hook.remove()
        for target, (target.index, target.total) in zip(targets, kept, strict=True):
            target.parameter.requires_grad_(False)
            target.parameter.grad = None
    autocast = torch.is_autocast_enabled(collector.device.type)
    for target in targets:
        assert target.norms is not None
        if target.name in collector.trust.outside:
            collector.fallback.setdefault(target.name, "used outside its module's forward")
        dtype = torch.bfloat16 if autocast else target.parameter.dtype
        own = expected.get(target.name, 0.0)
        allowed = AGREES.get(dtype, AGREES_HALF) * own + ROUNDING.get(dtype, ROUNDING_HALF) * target.uncancelled
        if target.name not in collector.fallback and float((target.norms - own).abs().max()) > allowed:
            collector.fallback[target.name] = "its module's activations do not give its whole gradient"
    return bool(expected)


def _may_be_sparse(module: nn.Module) -> bool:
    """Whether it is an embedding with dense gradients and no gradient hooks of the user."""
    if kind_of(module) != "embedding" or module.sparse:
        return False
    weight: Any = module.weight
    return not weight._backward_hooks and not weight._post_accumulate_grad_hooks
