"""SIFT: the selection against brute force, the curve, the memory it needs, and what it leaves behind."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Zoo, ids
from torch import Tensor, nn

from sparsekernels import Selection
from sparsekernels.methods import sift

TARGETS = ("up.weight", "down.weight", "conv.weight", "experts.weight")


def zoo_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).square().sum()


def run(model: nn.Module, batches: Any, density: float = 0.05, **more: Any) -> Selection:
    return sift(
        model, batches, density, **{"targets": TARGETS, "head": (), "loss": zoo_loss, "progress": False, **more}
    )


def gradients(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    twin = copy.deepcopy(model).requires_grad_(True)
    twin.zero_grad()
    sum(zoo_loss(twin, tokens) for tokens in batches).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in twin.named_parameters()}


def largest(grad: Tensor, k: int) -> list[int]:
    """Offsets of the k largest |entries|; ties to the lower offset."""
    flat = grad.abs().flatten().tolist()
    return sorted(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k])


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("density", [1e-6, 0.05, 1.0])
def test_equals_brute_force(density: float, num_batches: int) -> None:
    model = Zoo().double()
    batches = [ids(4, 7, seed=seed) for seed in range(num_batches)]
    found = run(model, batches, density, num_batches=num_batches)
    grads = gradients(model, batches)
    assert list(found) == [name for name, _ in model.named_parameters() if name in TARGETS]
    for name, index in found.items():
        numel = grads[name].numel()
        k = min(int(density * numel) + 1, numel)
        assert index.positions.tolist() == largest(grads[name], k)
        assert index.granularity == "element"
        assert index.shape == grads[name].shape


@pytest.mark.parametrize(("density", "k"), [(1 / 512, 2), (0.01, 6), (0.0099, 6), (1e-9, 1), (0.999, 512), (1.0, 512)])
def test_the_rule_for_k(density: float, k: int) -> None:
    """k = min(int(density * numel) + 1, numel), for a weight of 512 entries."""
    assert len(run(Zoo(), [ids(4, 7)], density, targets="up.weight")["up.weight"]) == k


@pytest.mark.parametrize("limit", [1, 3000, 1 << 30])
def test_groups_make_no_difference(limit: int) -> None:
    batches = [ids(4, 7, seed=seed) for seed in range(3)]
    model = Zoo().double()
    found, expected = run(model, batches, num_batches=3, max_gradient_bytes=limit), run(model, batches, num_batches=3)
    assert dict(found) == dict(expected)
    assert torch.allclose(torch.tensor(found.report["curve"]), torch.tensor(expected.report["curve"]))


@pytest.mark.parametrize("batches_are", ["a list", "a generator"])
def test_only_the_first_batches_count(batches_are: str) -> None:
    taken: list[int] = []

    def stream() -> Iterator[Tensor]:
        for seed in range(10):
            taken.append(seed)
            yield ids(4, 7, seed=seed)

    model = Zoo().double()
    batches = stream() if batches_are == "a generator" else list(stream())
    taken.clear()
    found = run(model, batches, num_batches=2)
    assert len(taken) == (2 if batches_are == "a generator" else 0)
    assert dict(found) == dict(run(model, [ids(4, 7, seed=0), ids(4, 7, seed=1)], num_batches=2))


class TestMemory:
    def held(self, model: nn.Module, **more: Any) -> list[int]:
        """Bytes of dense gradients that exist, each time one is complete."""
        seen: list[int] = []

        def look(_: Tensor) -> None:
            seen.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

        flags = [(p, p.requires_grad) for p in model.parameters()]
        hooks = [p.requires_grad_(True).register_post_accumulate_grad_hook(look) for p in model.parameters()]
        for p, flag in flags:
            p.requires_grad_(flag)
        try:
            run(model, **more)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def test_one_batch_holds_one_gradient(self) -> None:
        model = Zoo()
        seen = self.held(model, batches=[ids(4, 7)])
        assert len(seen) == len(TARGETS), "nothing but the targets gets a gradient"
        assert max(seen) == model.get_parameter("experts.weight").nbytes, "the largest of them, alone"

    def test_several_batches_hold_one_group(self) -> None:
        model = Zoo()  # 2048, 2048, 1024 and 3072 bytes
        for limit, most in ((1, 3072), (3072, 3072), (4096, 4096), (1 << 20, 8192)):
            seen = self.held(
                model, batches=[ids(4, 7, seed=seed) for seed in range(2)], num_batches=2, max_gradient_bytes=limit
            )
            assert max(seen) == most

    def test_gradients_are_freed_while_backward_runs(self) -> None:
        """Not only taken off the parameters: the memory is free before the next one is made."""
        alive: list[weakref.ref] = []
        most = 0
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))

        def look(p: Tensor) -> None:
            nonlocal most
            alive.append(weakref.ref(p.grad.untyped_storage()))
            most = max(most, sum(reference() is not None for reference in alive))

        hooks = [p.register_post_accumulate_grad_hook(look) for p in model.parameters()]
        loss = lambda m, x: m(x).square().sum()  # noqa: E731
        sift(model, [torch.randn(3, 64)], targets="*", head=(), loss=loss, progress=False)
        for hook in hooks:
            hook.remove()
        assert len(alive) == 8
        assert most <= 2


def facts(model: nn.Module) -> list[Any]:
    """What a selection must leave alone: weights, gradients, flags, versions, hooks."""
    found: list[Any] = [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    for name, p in model.named_parameters():
        hooks = bool(p._backward_hooks), bool(getattr(p, "_post_accumulate_grad_hooks", None))
        grad = None if p.grad is None else (id(p.grad), p.grad.tolist())
        found.append((name, id(p), p.requires_grad, grad, p.tolist(), p._version, hooks))
    return found


def unusual() -> Zoo:
    """Frozen targets, a gradient left over on a target and on another parameter, a module in eval mode."""
    model = Zoo()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for p in (model.up.weight, model.head.bias):
        p.grad = torch.full_like(p, 3.0)
    model.norm.eval()
    return model


class Interrupt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyboardInterrupt


def interrupted(loss: Tensor) -> Tensor:
    return Interrupt.apply(loss)


class TestLeavesNothingBehind:
    @pytest.mark.parametrize("num_batches", [1, 2])
    def test_model_is_as_it_was(self, num_batches: int) -> None:
        model = unusual()
        before = facts(model)
        found = run(model, [ids(4, 7), ids(4, 7)], num_batches=num_batches)
        assert facts(model) == before
        model.zero_grad()
        clean = Zoo()
        clean.load_state_dict(model.state_dict())
        clean.norm.eval()
        assert dict(found) == dict(run(clean, [ids(4, 7), ids(4, 7)], num_batches=num_batches)), (
            "old gradients must not count"
        )

    @pytest.mark.parametrize("num_batches", [1, 2])
    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_after_an_exception_too(self, where: str, num_batches: int) -> None:
        model = unusual()
        before = facts(model)

        def loss(m: nn.Module, tokens: Tensor) -> Tensor:
            if where == "forward":
                raise KeyboardInterrupt
            return interrupted(zoo_loss(m, tokens))

        with pytest.raises(KeyboardInterrupt):
            run(model, [ids(4, 7)] * 2, num_batches=num_batches, loss=loss)
        assert facts(model) == before

    def test_works_under_no_grad(self) -> None:
        model = Zoo()
        expected = run(model, [ids(4, 7)])
        with torch.no_grad():
            assert dict(run(model, [ids(4, 7)])) == dict(expected)
