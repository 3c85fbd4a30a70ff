"""What people do around `optimizer.step()`: the same lines with SparseAdamW give the numbers of torch.optim.AdamW.

Every kind of parameter, over all positions: dense ones to the last bit, the others to a few roundings.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch_cases import FORMS, Problem, assert_same, groups_of, optimizer_of, parameters_of, together

import sparsekernels as sk
from sparsekernels import Selection

Loop = Callable[[Problem, torch.optim.Optimizer], Any]


def assert_as_adamw(form: str, loop: Loop, device: torch.device, **options: Any) -> None:
    """The loop, once with SparseAdamW and once with torch.optim.AdamW: the same weights, and the same results."""
    problem, other, before = Problem(device), Problem(device), Problem(device)
    found = loop(problem, optimizer_of(form, problem, **options))
    expected = loop(other, torch.optim.AdamW(other.parameters(), **copy.deepcopy(options)))
    assert_same(problem, other, form, "against torch.optim.AdamW")
    assert not torch.equal(problem.weight, before.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def micro_batch(problem: Problem, seed: int) -> Tensor:
    x = torch.randn(5, generator=torch.Generator().manual_seed(seed)).to(problem.input)
    return problem(lambda weight, bias: (weight @ x + bias).tanh().sum())


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_clip_grad_norm(form: str, norm_type: float, device: torch.device) -> None:
    def loop(problem: Problem, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        norms = []
        for seed in range(5):
            optimizer.zero_grad()
            micro_batch(problem, seed).backward()
            norms.append(clip_grad_norm_(parameters_of(optimizer), 0.3 + seed / 10, norm_type, error_if_nonfinite=True))
            optimizer.step()
        return norms

    assert_as_adamw(form, loop, device, lr=0.1, eps=0.1)  # a large eps, or Adam would not notice the clipping


@pytest.mark.parametrize("form", FORMS)
def test_clip_grad_value(form: str, device: torch.device) -> None:
    def loop(problem: Problem, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        for seed in range(5):
            optimizer.zero_grad()
            micro_batch(problem, seed).backward()
            clip_grad_value_(problem.parameters(), 0.2)  # frozen weights have no gradient: all parameters may be given
            optimizer.step()
        return [p.grad.abs().max() for p in parameters_of(optimizer)]

    assert_as_adamw(form, loop, device, lr=0.1, eps=0.1)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_zero_grad(form: str, set_to_none: bool, device: torch.device) -> None:
    """Zeros are gradients, and momentum goes on; None is none, and nothing moves, nor is a step counted."""

    def loop(problem: Problem, optimizer: torch.optim.Optimizer) -> list[float]:
        kept: list[Tensor | None] = []
        for seed in range(6):
            optimizer.zero_grad(set_to_none=set_to_none)
            if seed % 3 != 2:
                micro_batch(problem, seed).backward()
            elif seed == 5:
                parameters_of(optimizer)[1].grad = None  # beside one of zeros
            optimizer.step()
            kept.append(parameters_of(optimizer)[0].grad)
        assert (kept[0] is kept[1] is kept[5]) == (not set_to_none)
        return [float(state["step"]) for state in optimizer.state.values()]

    assert_as_adamw(form, loop, device, lr=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_accumulation(form: str, device: torch.device) -> None:
    def loop(problem: Problem, optimizer: torch.optim.Optimizer) -> None:
        for step in range(4):
            for seed in range(3):
                (micro_batch(problem, 10 * step + seed) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_as_adamw(form, loop, device, lr=0.1)


@pytest.mark.compatibility("torch", "an optimizer step inside backward", "works")
@pytest.mark.parametrize("form", FORMS)
def test_a_step_per_parameter_inside_backward(form: str, device: torch.device) -> None:
    """An optimizer for each parameter, stepped by a hook as soon as its gradient is there, which is freed then."""
    problem, other = Problem(device), Problem(device)
    for p, cls, kind in ((problem, sk.SparseAdamW, form), (other, torch.optim.AdamW, "dense")):
        optimizers = {}
        for group in groups_of(kind, p):
            optimizers[group["params"][0]] = cls([group], lr=0.1)

        def step(values: Tensor, optimizers: dict[Tensor, Any] = optimizers) -> None:
            optimizers[values].step()
            optimizers[values].zero_grad()

        for values in optimizers:
            values.register_post_accumulate_grad_hook(step)
        for seed in range(4):
            micro_batch(p, seed).backward()
            assert all(values.grad is None for values in optimizers)
    assert_same(problem, other, form, "inside backward")


@pytest.mark.parametrize("form", FORMS)
def test_options_changed_between_steps(form: str, device: torch.device) -> None:
    def loop(problem: Problem, optimizer: torch.optim.Optimizer) -> None:
        changes = {"lr": 0.02, "betas": (0.5, 0.6), "weight_decay": 0.4, "eps": 0.01, "maximize": True}
        for seed, (name, value) in enumerate([("lr", 0.1), *changes.items()]):
            optimizer.param_groups[0][name] = value
            optimizer.zero_grad()
            micro_batch(problem, seed).backward()
            optimizer.step()

    assert_as_adamw(form, loop, device, lr=0.1)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 0.8**epoch),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.5, 9), lrs.ExponentialLR(o, 0.7)], [3]),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 3), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, 0.1, step_size_up=3),  # momentum too: it sets betas
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 5, power=2.0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.compatibility("torch", "every learning-rate scheduler", "works")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("form", FORMS)
def test_schedulers(form: str, name: str, device: torch.device) -> None:
    def loop(problem: Problem, optimizer: torch.optim.Optimizer) -> list[Any]:
        scheduler, seen = SCHEDULERS[name](optimizer), []
        for seed in range(8):
            optimizer.zero_grad()
            micro_batch(problem, seed).backward()
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append((optimizer.param_groups[0]["lr"], *optimizer.param_groups[0]["betas"]))
        assert len(set(seen)) > 1
        return seen

    assert_as_adamw(form, loop, device, lr=0.03)


def test_every_scheduler_of_torch_is_tried() -> None:
    assert set(lrs.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("form", FORMS)
def test_a_scheduler_sees_whether_the_optimizer_stepped(form: str, device: torch.device) -> None:
    """torch warns of schedulers that go first, and only of those: it wraps `step` of the instance to know."""
    for steps in (1, 0):
        problem = Problem(device)
        optimizer = optimizer_of(form, problem)
        scheduler = lrs.StepLR(optimizer, 1)
        problem.loss().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if steps:
                optimizer.step()
            scheduler.step()
        assert ["before `optimizer.step()`" in str(warning.message) for warning in caught] == [True] * (1 - steps)


@pytest.mark.parametrize("form", FORMS)
def test_a_profile_names_the_step(form: str, device: torch.device) -> None:
    problem = Problem(device)
    optimizer = optimizer_of(form, problem)
    problem.loss().backward()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#SparseAdamW.step") == 1
    assert names.count("Optimizer.zero_grad#SparseAdamW.zero_grad") == 1


def compiled_step(loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer) -> Callable[[int], Tensor]:
    """Zero gradients, forward, backward and step as one compiled function."""

    def step(*args: Any) -> Tensor:
        optimizer.zero_grad()
        value = loss(*args)
        value.backward()
        optimizer.step()
        return value

    return torch.compile(step, backend="aot_eager")


@pytest.mark.compatibility("torch.compile", "around `SparseAdamW.step`: one graph break, runs uncompiled", "works")
@pytest.mark.parametrize("what", ["step", "training step"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled(form: str, what: str, device: torch.device) -> None:
    """The step is one break of the graph, warns of nothing, is not compiled anew at each step, and calls its hooks."""
    x = torch.randn(4, 6, device=device)
    nets, losses, optimizers = [], [], []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
        optimizer = sk.SparseAdamW(together(groups_of(form, net)), lr=0.05)
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))

        def loss(net: nn.Module = net) -> Tensor:
            return net(x).square().sum()

        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        whole = compiled_step(loss, optimizer) if compiled and what == "training step" else None
        found = []
        for number in range(5):
            if number == 2:
                counters.clear()
            if whole is not None:
                found.append(whole().detach())
                continue
            optimizer.zero_grad()
            value = loss()
            value.backward()
            step()
            found.append(value.detach())
        assert len(calls) == 5
        if compiled:
            assert not counters["frames"], "compiled anew"
            breaks = " ".join(counters["graph_break"])
            assert not breaks, f"compiled anew: {breaks}"
        nets.append(net)
        losses.append(found)
        optimizers.append(optimizer)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [float(s["step"]) for o in optimizers for s in o.state.values()] == [5.0] * 8


@pytest.mark.compatibility("torch.compile", "`fullgraph=True` around `SparseAdamW.step`", "refused")
def test_a_full_graph_is_refused_with_the_reason() -> None:
    problem = Problem(torch.device("cpu"))
    optimizer = optimizer_of("compact", problem)
    problem.loss().backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="SparseAdamW"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


@pytest.mark.compatibility("torch", "AveragedModel (SWA, EMA)", "works")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", ["swa", "ema"])
@pytest.mark.parametrize("form", FORMS)
def test_averaged_model(form: str, average: str, use_buffers: bool, dtype: torch.dtype, device: torch.device) -> None:
    """The average is that of the weights along the way, forward reads it, and the model that trains is left alone."""
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device, dtype)
    chosen = Selection.random(net, 0.5)
    if form == "compact":
        params: Any = sk.train_only(net, chosen).parameters()
    else:
        params = chosen.param_groups(net) if form == "indexed" else net.parameters()
    optimizer = sk.SparseAdamW(params, lr=0.05)
    averaged = AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(0.6) if average == "ema" else None, use_buffers=use_buffers
    )
    expected: dict[str, Tensor] = {}
    for step in range(4):
        optimizer.zero_grad()
        net(torch.randn(4, 6, device=device, dtype=dtype)).square().sum().backward()
        optimizer.step()
        before = copy.deepcopy(net.state_dict())
        averaged.update_parameters(net)
        for name, now in net.state_dict().items():
            assert torch.equal(now, before[name]), f"{name} of the model changed"
            old, share = expected.get(name, now.double()), 1 / (step + 1) if average == "swa" else 0.4
            expected[name] = old + (now.double() - old) * share
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    x = torch.randn(4, 6, device=device, dtype=dtype)
    averaged(x)  # a compact copy writes its values through here
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], **tolerance)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device, dtype)
    plain.load_state_dict(averaged.module.state_dict())
    torch.testing.assert_close(averaged(x), plain(x))
