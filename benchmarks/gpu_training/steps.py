"""Whole training steps: forward, backward, step of the optimizer, zero_grad; by dense AdamW, LoRA, and ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sparsekernels as sk

from ..kernels.case import WrongResult
from ..timing import DEVICE, synchronized
from .llama import Shape, causal_loss, make_batches, make_model

LR = 1e-4
RANK = 16  # of LoRA
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Run:
    """A contender, ready to be timed.

    Attributes:
        call: what is timed, and counted in the peak.
        check: raises WrongResult for what the calls returned.
        before: what had to be done once, before the first call: name -> seconds and peak memory.
    """

    call: Callable[[], Any]
    check: Callable[[list[Any]], None]
    before: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One batch that every step trains on."""

    shape: Shape
    size: int
    length: int
    checkpointing: bool

    @property
    def tokens(self) -> int:
        return self.size * self.length

    def make(self, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model, in train mode, and the batch."""
        model: Any = make_model(self.shape, dtype)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model, make_batches(self.shape, 1, self.size, self.length)[0]


def once(call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What the call returns, and its seconds and peak memory."""
    found: list[Any] = []
    reset_peak()
    begin = time.perf_counter()
    synchronized(lambda: found.append(call()))()
    return found[0], {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most memory that tensors took since `reset_peak`; not measured on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


def finite(losses: Sequence[Tensor]) -> None:
    """The check of a loss for each call."""
    if not bool(torch.stack(list(losses)).isfinite().all()):
        raise WrongResult("a loss is not finite")


def step(
    model: nn.Module, batch: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], autocast: bool = False
) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss = causal_loss(model, batch)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def dense(task: Task) -> Run:
    model, batch = task.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return Run(lambda: step(model, batch, [optimizer]), finite)


def dense_master(task: Task) -> Run:
    """fp32 weights, gradients and moments; matmuls in bf16 by autocast."""
    model, batch = task.make(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return Run(lambda: step(model, batch, [optimizer], autocast=True), finite)


def lora(task: Task) -> Run:
    """As peft makes it by default: adapters in fp32."""
    from peft import LoraConfig, get_peft_model

    model, batch = task.make()
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules=list(LORA_TARGETS)))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR, fused=True)
    return Run(lambda: step(model, batch, [optimizer]), finite)


def units(task: Task, density: float, **units: Any) -> Run:
    """Train rows, columns or blocks of the projections, chosen at random."""
    model, batch = task.make()
    names = [name for name, _ in model.named_parameters() if name.split(".")[-2] in LORA_TARGETS]
    selection, selecting = once(lambda: sk.Selection.random(model, density, names=names, **units))
    optimizer = sk.SparseAdamW(sk.train_only(model, selection).parameters(), lr=LR)
    name, index = next(iter(selection.items()))
    original = model.get_parameter(name).detach().cpu().clone()

    def check(losses: list[Tensor]) -> None:
        finite(losses)
        check_weight(model.get_parameter(name).detach().cpu(), original, index)

    return Run(lambda: step(model, batch, [optimizer]), check, {"selection": selecting})


def sift(
    task: Task,
    density: float,
    *,
    indices: bool = False,
    in_backward: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Run:
    """Select by SIFT, then train the selection.

    Args:
        indices: step dense Parameters at indices, instead of compact ones.
        in_backward: step each tensor as soon as it has its gradient, by an optimizer of its own.
        state_dtype: of the moments; where one is named, they are rounded stochastically, and so are dense Parameters.
    """
    model, batch = task.make()
    selection, selecting = once(lambda: sk.methods.sift(model, [batch], density, loss=causal_loss, progress=False))
    parameters: dict[str, nn.Parameter]
    if indices:
        parameters = selection.check(model)
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    else:
        parameters = dict(sk.train_only(model, selection).named_parameters())

    def optimizer(chosen: sk.Selection, seed: int) -> sk.SparseAdamW:
        compact = [{"params": [parameters[name] for name in chosen]}]
        return sk.SparseAdamW(
            chosen.param_groups(model) if indices else compact,
            lr=LR,
            state_dtype=state_dtype,
            stochastic_rounding=state_dtype is not None,
            seed=seed,
        )

    optimizers = [] if in_backward else [optimizer(selection, 0)]
    if in_backward:
        for seed, (name, index) in enumerate(selection.items()):
            own = optimizer(sk.Selection({name: index}), seed)
            parameters[name].register_post_accumulate_grad_hook(_stepping(own))

    name, index = next(iter(selection.items()))
    original = model.get_parameter(name).detach().cpu().clone()

    def check(losses: list[Tensor]) -> None:
        finite(losses)
        check_weight(model.get_parameter(name).detach().cpu(), original, index)

    return Run(lambda: step(model, batch, optimizers), check, {"selection": selecting})


def _stepping(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def run(parameter: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return run


def check_weight(weight: Tensor, original: Tensor, index: sk.Index) -> None:
    """Raise WrongResult unless most of the selected elements of a bf16 weight changed, and no bit of any other."""
    changed = weight.view(torch.int16) != original.view(torch.int16)
    selected = changed[index.mask().cpu()]
    if int(changed.sum()) != int(selected.sum()):
        raise WrongResult("weights changed that are not selected")
    if 2 * int(selected.sum()) < len(selected):
        raise WrongResult(f"of {len(selected)} selected weights, steps changed {int(selected.sum())} only")
