"""What the tests that follow torch's own optimizer suite share: its inputs, and one small problem in three forms."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

FORMS = ("compact", "indexed", "dense")

# In a process of its own: the module freezes torch's global flags and loads a hypothesis profile when it is imported,
# which every other test of this session would feel. It needs expecttest for a base class only.
_FETCH = """
import pickle, sys, types, unittest
try:
    import expecttest
except ImportError:
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase
import torch
from torch.testing._internal import common_optimizers as theirs
(info,) = [info for info in theirs.optim_db if info.optim_cls is torch.optim.AdamW]
every = theirs._get_optim_inputs_including_global_cliquey_kwargs
plain = every("DEVICE", torch.float32, info, skip=("differentiable",))
errors = [
    (e.optimizer_error_input.desc, e.optimizer_error_input.params, e.optimizer_error_input.kwargs, e.error_type)
    for e in info.optim_error_inputs_func("DEVICE", torch.float32)
    if e.error_on is theirs.OptimizerErrorEnum.CONSTRUCTION_ERROR
]
with open(sys.argv[1], "wb") as file:
    pickle.dump(([(i.desc, i.kwargs) for i in plain], errors, list(info.not_og_supported_flags)), file)
"""


@functools.cache
def _fetched(device: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases"
        done = subprocess.run(
            [sys.executable, "-c", _FETCH.replace("DEVICE", device), str(path)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this torch has no optimizer cases that can be read: {done.stderr.strip().splitlines()[-1]}")
        return path.read_bytes()


def optimizer_inputs(device: torch.device, fused: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(description, options) of AdamW in torch's suite, foreach and fused on and off, not differentiable."""
    inputs, _, _ = pickle.loads(_fetched(device.type))
    assert len(inputs) >= 10
    for description, options in inputs:
        if fused or not options.get("fused"):
            yield description, options


def error_inputs(device: torch.device) -> list[tuple[str, Any, dict[str, Any], type[Exception]]]:
    """(description, params or None, options, error) of AdamW in torch's suite."""
    _, errors, _ = pickle.loads(_fetched(device.type))
    return errors


def later_flags(device: torch.device) -> list[str]:
    """Options that the first AdamW did not have yet, so that old state_dicts lack them."""
    _, _, flags = pickle.loads(_fetched(device.type))
    assert {"maximize", "foreach", "capturable"} <= set(flags)
    return flags


class Problem(nn.Module):
    """Two parameters; `problem(f)` is f(weight, bias), inside a forward, where `train_only` takes part."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (10, 5)):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        self.bias = nn.Parameter(torch.randn(shape[:1], generator=generator).to(device, dtype))
        self.input = torch.randn(shape[1:], generator=generator).to(device, dtype)

    def forward(self, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return f(self.weight, self.bias)

    def loss(self) -> Tensor:
        return self(lambda weight, bias: (weight @ self.input + bias).square().sum())


def groups_of(form: str, problem: nn.Module) -> list[dict[str, Any]]:
    """One group for each parameter, over all of its positions."""
    dense = dict(problem.named_parameters())
    index = {name: Index.full(p.shape) if i % 2 == 0 else elements(p) for i, (name, p) in enumerate(dense.items())}
    if form == "compact":
        tuned = sk.train_only(problem, Selection(index))
        return [{"params": [tuned.slots[name].values]} for name in dense]
    if form == "indexed":
        return [{"params": [p], "indices": [index[name].to(p.device)]} for name, p in dense.items()]
    return [{"params": [p]} for p in dense.values()]


def elements(of: Tensor) -> Index:
    return Index(torch.arange(of.numel()), of.shape)


def together(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All of them as one group."""
    return [{key: [x for group in groups for x in group[key]] for key in groups[0]}]


def optimizer_of(form: str, problem: nn.Module, **options: Any) -> sk.SparseAdamW:
    return sk.SparseAdamW(together(groups_of(form, problem)), **copy.deepcopy(options))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(problem: Problem, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()


def assert_same(problem: Problem, other: Problem, form: str, what: str) -> None:
    """The weights agree: to the last bit where torch's own code steps, else to a few roundings."""
    for name in ("weight", "bias"):
        ours, theirs = getattr(problem, name).detach(), getattr(other, name).detach()
        if form == "dense":
            assert torch.equal(ours, theirs), f"{what}: {name}"
        else:
            eps = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=20 * eps, atol=20 * eps, msg=lambda m: f"{what}: {name}: {m}")  # noqa: B023
