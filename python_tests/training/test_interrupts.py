"""Ctrl-C in the middle of a training step: no Parameter is lost, and a parameter group is stepped or is not.

SPARSEKERNELS_INTERRUPTS=1000 throws that many at the transformers, in place of the few of every run, and one at
every line of a step.
"""

import copy
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from interrupting import interrupt, lines_of
from models import Zoo, batch, full_names, ids, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection
from sparsekernels.optim import batch as batches

INTERRUPTS = int(os.environ.get("SPARSEKERNELS_INTERRUPTS", "30"))


def everything(model: nn.Module) -> Selection:
    return Selection.random(model, density=0.3, names=full_names(model))


def held(model: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters()}


def test_an_interrupt_of_forward_or_backward_loses_no_parameter() -> None:
    model = Zoo()
    before = copy.deepcopy(model.state_dict())
    tuned = sk.train_only(model, everything(model))
    parameters = held(model)

    def train() -> None:
        for values in tuned.parameters():
            values.grad = None
        model(ids(2, 3)).square().sum().backward()

    train()
    expected = [values.grad.clone() for values in tuned.parameters()]
    lines = lines_of(train)
    assert lines > 200, "a poor test"
    for line in range(1, lines + 1, 5):
        assert interrupt(train, line)
        assert held(model) == parameters, line
        train()
        assert all(torch.equal(p.grad, g) for p, g in zip(tuned.parameters(), expected, strict=True)), line
    assert interrupt(train, lines // 2)
    tuned.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(getattr(module, name) is p for module in model.modules() for name, p in module._parameters.items())


class Breaking(nn.Module):
    """Interrupted as long as it has to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))
        self.interrupted = True

    def forward(self, x: Tensor) -> Tensor:
        if self.interrupted:
            raise KeyboardInterrupt
        return x * self.weight


def broken() -> tuple[Breaking, sk.SparseModel]:
    model = Breaking()
    tuned = sk.train_only(model, Selection.random(model, density=0.5))
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 5))
    model.interrupted = False
    return model, tuned


def of_its_own(model: Breaking) -> bool:
    return model.weight is model._parameters["weight"]


@pytest.mark.parametrize(
    "clean",
    [
        lambda model, _: model(torch.ones(5)),
        lambda model, _: model.state_dict(),
        lambda model, _: model.load_state_dict(model.state_dict(), assign=True),
        lambda _, tuned: tuned.restore(),
        lambda _, tuned: tuned.merge(),
    ],
    ids=["forward", "state_dict", "assign", "restore", "merge"],
)
def test_what_is_read_after_an_interrupt(clean: Callable[[Breaking, sk.SparseModel], Any]) -> None:
    """Until something takes the view away it is current: steps write its storage."""
    model, tuned = broken()
    assert model.weight.data_ptr() == model._parameters["weight"].data_ptr()
    with torch.no_grad():
        next(tuned.parameters()).fill_(7)
    tuned.sync_()
    assert model.weight.eq(7).any()
    clean(model, tuned)
    assert of_its_own(model)


@pytest.mark.parametrize("change", [nn.Module.double, lambda model: model.to(torch.float64)], ids=["double", "to"])
def test_forward_after_an_interrupt_and_a_move(change: Callable[[nn.Module], nn.Module]) -> None:
    model, tuned = broken()
    change(model)
    (values,) = tuned.parameters()
    model(torch.ones(5, dtype=torch.float64)).sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    assert of_its_own(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_after_an_interrupt(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = broken()
    other = copied(model)
    other(torch.ones(5)).sum().backward()
    assert of_its_own(other)
    assert torch.equal(other.weight_values.grad, torch.ones_like(other.weight_values))
    assert model.weight_values.grad is None


@pytest.mark.parametrize("interrupted", [False, True])
def test_compiled(interrupted: bool) -> None:
    """One graph, whatever an interrupt left before it was made, and the right gradients from the first call on."""
    torch._dynamo.reset()
    model, tuned = broken()
    if not interrupted:
        model.state_dict()
    (values,) = tuned.parameters()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        values.grad = None
        run(torch.ones(5)).sum().backward()
        assert torch.equal(values.grad, torch.ones_like(values))
        assert of_its_own(model)


Groups = list[dict[str, Any]]


def compact() -> tuple[Groups, list[Tensor]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    tuned = sk.train_only(model, everything(model))
    first, *rest = tuned.parameters()
    return [{"params": [first]}, {"params": rest, "weight_decay": 0.1}], list(model.parameters())


def indexed() -> tuple[Groups, list[Tensor]]:
    p = nn.Parameter(torch.randn(6, 4))
    return [{"params": [p], "indices": [Index(torch.tensor([1, 3]), (6, 4), granularity="row")]}], []


def rows() -> tuple[Groups, list[Tensor]]:
    return [{"params": [nn.Parameter(torch.randn(6, 4)) for _ in range(2)], "sparse_decay": "catch_up"}], []


def dense() -> tuple[Groups, list[Tensor]]:
    return [{"params": [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]}], []


def mixed() -> tuple[Groups, list[Tensor]]:
    """Compact Parameters and an ordinary one in one group, two kinds in others."""
    (first, second), weights = compact()
    return [{"params": [*first["params"], *dense()[0][0]["params"]]}, second, *indexed()[0], *rows()[0]], weights


def give_gradients(optimizer: Any, make: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
            if group["sparse_decay"] == "catch_up":
                chosen = torch.randint(0, 6, (3,), generator=generator)
                p.grad = torch.sparse_coo_tensor(chosen[None], p.grad[:3], p.shape, check_invariants=True)


def made(make: Any) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    groups, weights = make()
    optimizer = sk.SparseAdamW(groups, lr=0.1)
    give_gradients(optimizer, make, 1)
    optimizer.step()
    give_gradients(optimizer, make, 2)
    return optimizer, weights


def stepped(optimizer: Any) -> list[list[Tensor]]:
    """For each group all that a step changes, versions included."""
    found = []
    for group in optimizer.param_groups:
        tensors: list[Tensor] = []
        for p in group["params"]:
            written = [p] + ([p._sparse_slot.weight] if hasattr(p, "_sparse_slot") else [])
            tensors += [*written, *optimizer.state[p].values(), torch.tensor([x._version for x in written])]
        found.append([x.detach().clone() for x in tensors])
    return found


@pytest.mark.parametrize("way", ["native", "python", "mode"])
@pytest.mark.parametrize("make", [compact, indexed, rows, dense, mixed], ids=lambda make: make.__name__)
def test_a_group_is_stepped_or_is_not(make: Any, way: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python runs whose every line could be interrupted: an op implemented in it, or a mode of torch."""
    if way == "python":
        monkeypatch.setattr(batches, "has_native", lambda *_: False)
    if way == "mode":
        torch.set_default_device("cpu")
        request.addfinalizer(lambda: torch.set_default_device(None))
    optimizer, _ = made(make)
    before = stepped(optimizer)
    lines = lines_of(optimizer.step)
    after = stepped(optimizer)
    assert lines > 20, "a poor test"
    assert not any(same(a, b) for a, b in zip(before, after, strict=True)), "a poor test"
    outcomes = set()
    for line in range(1, lines + 1, 1 if INTERRUPTS >= 1000 else 1 + lines // 80):
        optimizer, weights = made(make)
        assert interrupt(optimizer.step, line), "an interrupt that came is raised"
        assert torch.is_grad_enabled()
        found = stepped(optimizer)
        outcome = tuple((same(a, x), same(b, x)) for a, b, x in zip(before, after, found, strict=True))
        assert all(any(each) for each in outcome), line
        outcomes.add(outcome)
        for x, expected in zip(weights, copies_of(weights, optimizer), strict=True):
            assert torch.equal(x, expected), "weights are those of the values"
    assert len(outcomes) > 1, "a poor test"


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copies_of(weights: list[Tensor], optimizer: Any) -> list[Tensor]:
    """The weights after a write of all compact values into them."""
    copies = {id(x): x.detach().clone() for x in weights}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if hasattr(p, "_sparse_slot"):
                slot = p._sparse_slot
                sk.ops.scatter_(copies[id(slot.weight)], slot.index, p.detach())
    return list(copies.values())


def test_an_interrupt_of_another_thread_or_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another handler gets the signal once the step is whole; a thread that cannot be interrupted just steps."""
    optimizer, _ = made(dense)
    seen: list[list[list[Tensor]]] = []
    ours = signal.signal(signal.SIGINT, lambda *_: seen.append(stepped(optimizer)))
    try:
        assert not interrupt(optimizer.step, lines_of(made(dense)[0].step) - 20)
        assert callable(signal.getsignal(signal.SIGINT))
        assert len(seen) == 1
        assert same(seen[0][0], stepped(optimizer)[0])
    finally:
        signal.signal(signal.SIGINT, ours)
    before = stepped(optimizer)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    assert not same(before[0], stepped(optimizer)[0])


def test_an_interrupt_within_the_closure_is_raised_at_once() -> None:
    optimizer, _ = made(dense)
    before = stepped(optimizer)

    def closure() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same(before[0], stepped(optimizer)[0])
    assert torch.is_grad_enabled()


class Run:
    """A transformer of which every kind of weight is trained a little, and another to compare it with."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, transformer(kind)
        self.originals = copy.deepcopy(self.model.state_dict())
        self.flags = [p.requires_grad for p in self.model.parameters()]
        self.selection = everything(self.model)
        self.begin()

    def begin(self) -> None:
        self.tuned = sk.train_only(self.model, self.selection)
        self.optimizer = sk.SparseAdamW(self.tuned.parameters(), lr=1e-2)
        self.held = held(self.model)

    def train(self, seed: int = 0) -> None:
        self.optimizer.zero_grad()
        self.model(**batch(self.kind, seed=seed)).loss.backward()
        self.optimizer.step()

    def restore(self) -> None:
        self.tuned.restore()
        found = self.model.state_dict()
        assert all(torch.equal(value, self.originals[name]) for name, value in found.items())
        assert found.keys() == self.originals.keys()
        assert [p.requires_grad for p in self.model.parameters()] == self.flags
        assert all(getattr(m, name) is p for m in self.model.modules() for name, p in m._parameters.items())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_train_on_or_restore(kind: str) -> None:
    """At random lines of whole training steps, one after another in the same model."""
    run, twin, draw = Run(kind), Run(kind), random.Random(kind)
    run.train()
    lines = lines_of(run.train)
    raised = 0
    for i in range(-(-INTERRUPTS // 3)):
        raised += interrupt(partial(run.train, seed=i), draw.randint(1, lines))
        assert held(run.model) == run.held
        assert torch.is_grad_enabled()
        if draw.random() < 0.5:
            run.restore()
            run.begin()
            continue
        twin.model.load_state_dict(run.model.state_dict())
        twin.optimizer.load_state_dict(run.optimizer.state_dict())
        for each in (run, twin):
            each.train(seed=i)
        for (name, a), (_, b) in zip(run.model.named_parameters(), twin.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name
    assert raised > INTERRUPTS // 4, "a poor test"
    run.restore()
    print(f"{kind}: {raised} interrupts of {lines} lines, 0 lost Parameters, restored bit for bit")
