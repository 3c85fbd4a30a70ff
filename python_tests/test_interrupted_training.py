"""Ctrl-C while transformers train: no Parameter is lost, and a parameter group is stepped whole or not at all.

SPARSEKERNELS_INTERRUPTS=1000 sends so many, over all models; 60 by default.
"""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Iterator

import pytest
import torch
from interrupting import interrupt, lines_of
from models import batch, transformer
from torch import Tensor

import sparsekernels as sk
from sparsekernels import Selection

COUNT = int(os.environ.get("SPARSEKERNELS_INTERRUPTS", "60"))
KINDS = ("gpt2", "llama", "bert")


class Run:
    """A model of its own, sparsified, with every kind of module selected, and one step made."""

    def __init__(self, kind: str) -> None:
        self.kind, self.base = kind, transformer(kind)
        self.model = copy.deepcopy(self.base)
        self.tuned = sk.sparsify(self.model, Selection.random(self.model, 0.2))
        named = list(self.tuned.named_parameters())
        norms = [p for name, p in named if "norm" in name.lower() or ".ln_" in name]
        groups = [{"params": [p for _, p in named if all(p is not q for q in norms)]}, {"params": norms, "lr": 1e-3}]
        self.optimizer = sk.SparseAdamW(groups, lr=1e-2)
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.step()

    def step(self) -> None:
        self.model(**batch(self.kind)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[dict[str, Tensor]]:
        """Of each group: weights, compact values, moments and counts of steps."""
        slots = {slot.values: slot for slot in self.tuned.slots.values()}
        found = []
        for group in self.optimizer.param_groups:
            mine: dict[str, Tensor] = {}
            for p in group["params"]:
                name = slots[p].label
                mine |= {f"{name}:{key}": value.clone() for key, value in self.optimizer.state[p].items()}
                mine |= {name: slots[p].weight.detach().clone(), f"{name}:values": p.detach().clone()}
            found.append(mine)
        return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_whole(run: Run) -> None:
    """Every Parameter is where it was, and what reads a weight reads the current one."""
    found = dict(run.model.named_parameters(remove_duplicate=False))
    assert found.keys() == run.parameters.keys()
    assert all(found[name] is p for name, p in run.parameters.items())
    for name, p in found.items():
        module, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(run.model.get_submodule(module), attribute), p)
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def check_restores(run: Run) -> None:
    run.tuned.restore()
    expected = run.base.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in run.model.state_dict().items())
    assert all(type(m) is type(n) for m, n in zip(run.model.modules(), run.base.modules(), strict=True))
    names = {name: id(p) for name, p in run.model.named_parameters(remove_duplicate=False)}
    assert names == {name: id(run.parameters[name]) for name in names}


@pytest.fixture(autouse=True)
def _python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", KINDS)
def test_no_interrupt_loses_anything(kind: str) -> None:
    """Afterwards the run goes on as if nothing had been, or the model is given back bit for bit."""
    reference = Run(kind)
    states = [reference.state()]
    lines = lines_of(reference.step)
    reference.model(**batch(kind)).loss.backward()
    optimizing = lines_of(reference.optimizer.step)
    reference = Run(kind)
    reference.step()
    for _ in range(2):
        states.append(reference.state())
        reference.step()
    chance = random.Random(kind)
    made = [0, 0]
    for number in range(-(-COUNT // len(KINDS))):
        run = Run(kind)
        assert all(map(same, run.state(), states[0]))
        first = 1 if number % 4 else lines - optimizing  # every fourth one in the optimizer's step
        assert interrupt(run.step, chance.randrange(first, lines + 1))
        check_whole(run)
        groups = run.state()
        after = [same(group, one) for group, one in zip(groups, states[1], strict=True)]
        before = [same(group, one) for group, one in zip(groups, states[0], strict=True)]
        assert all(a or b for a, b in zip(after, before, strict=True)), "a group is stepped in part"
        assert sorted(after, reverse=True) == after, "a later group is stepped before an earlier one"
        made[all(after)] += 1
        if number % 2:
            run.optimizer.zero_grad()
            run.step()
            expected = [states[1 + a] for a in after]
            if all(after) or not any(after):
                assert all(same(g, e[i]) for i, (g, e) in enumerate(zip(run.state(), expected, strict=True)))
            check_whole(run)
        check_restores(run)
    assert made[0] > 0
    print(f"\n{kind}: {lines} lines, {sum(made)} interrupts, {made[1]} of them after the optimizer's step")
