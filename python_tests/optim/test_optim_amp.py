"""What a training loop keeps on the device: GradScaler's scale and verdict, a tensor lr, and steps for a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekernels as sk
from sparsekernels.optim.state import step_device

SHAPE = (6, 5)
POSITIONS = torch.tensor([0, 3, 4, 11, 29])
FORMS = ("compact", "indexed", "dense")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Run:
    """One weight, trained at POSITIONS (or everywhere) to take given dense gradients."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> None:
        self.form, self.index = form, sk.Index(POSITIONS, SHAPE).to(device)
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        self.model = nn.ParameterDict({"w": nn.Parameter(weight)})
        self.weight = self.model["w"]
        if form == "compact":
            self.param = next(iter(sk.train_only(self.model, sk.Selection({"w": self.index})).parameters()))
            params: Any = [self.param]
        elif form == "indexed":
            self.param, params = self.weight, [{"params": [self.weight], "indices": [self.index]}]
        else:
            self.param, params = self.weight, [self.weight]
        if form in ("theirs", "dense"):
            options.setdefault("fused", True)
        cls = torch.optim.AdamW if form == "theirs" else sk.SparseAdamW
        self.optimizer = cls(params, **{"lr": 0.1, "weight_decay": 0.1, **options})

    def give(self, grad: Tensor) -> None:
        grad = grad.to(self.param.device)
        grad = grad.flatten()[self.index.positions.long()] if self.form == "compact" else grad
        self.param.grad = grad.to(self.param.dtype, copy=True)

    def selected(self) -> Tensor:
        return self.weight.detach().flatten()[self.index.positions.long()].clone()

    def everything(self) -> list[Tensor]:
        state = self.optimizer.state[self.param]
        return [x.detach().clone() for x in (self.weight, self.param, *(state[name] for name in sorted(state)))]


def gradient(step: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + step))


def scaled_run(run: Run, scaler: torch.amp.GradScaler, infinite: int = -1, steps: int = 4) -> list[float]:
    """Steps under a scaler, step `infinite` with an inf among the gradients; the scales after each of them."""
    scales = []
    for step in range(steps):
        grad = gradient(step) * scaler.scale(torch.ones(()))
        if step == infinite:
            grad[0, 3] = float("inf")
        run.give(grad)
        scaler.step(run.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def new_scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


@pytest.mark.parametrize("scale", [1024.0, 3.0])
@pytest.mark.parametrize("infinite", [-1, 0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_equal_to_fused_adamw_under_a_scaler(form: str, infinite: int, scale: float) -> None:
    ours, theirs = Run(form), Run("theirs")
    assert ours.optimizer._step_supports_amp_scaling
    scales = scaled_run(ours, new_scaler(scale), infinite)
    assert scales == scaled_run(theirs, new_scaler(scale), infinite)
    assert scales[-1] == (scale if infinite < 0 else scale / 2)
    assert torch.allclose(ours.selected(), theirs.selected(), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours.selected(), Run("theirs").selected(), atol=1e-2)
    assert float(ours.optimizer.state[ours.param]["step"]) == (4 if infinite < 0 else 3)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("form", ["compact", "indexed"])
def test_nothing_changes_where_a_gradient_is_infinite(form: str, options: dict[str, Any]) -> None:
    run, scaler = Run(form, **options), new_scaler()
    scaled_run(run, scaler, steps=2)
    before = run.everything()
    grad = gradient(9)
    grad[0, 3] = float("nan")
    run.give(grad)
    scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert len(before) >= 5
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["compact", "indexed"])
def test_other_dtypes_are_unscaled_where_they_are_computed(form: str, dtype: torch.dtype) -> None:
    """A power of two as scale leaves no trace: not even in fp16, whose gradients are widened before."""
    scaled, plain = Run(form, dtype), Run(form, dtype)
    scaled_run(scaled, new_scaler(2.0**-4), steps=3)
    for step in range(3):
        plain.give(gradient(step).to(plain.param.dtype))
        plain.optimizer.step()
    assert torch.equal(scaled.selected(), plain.selected())


def test_gradients_stay_as_they_came() -> None:
    for form in ("compact", "indexed"):
        run = Run(form)
        scaled_run(run, new_scaler(), steps=1)
        given = Run(form)
        given.give(gradient(0) * 1024)
        assert torch.equal(run.param.grad, given.param.grad)


@pytest.mark.parametrize("form", FORMS)
def test_unscaled_and_clipped_before(form: str) -> None:
    ours, theirs = Run(form), Run("theirs")
    for run in (ours, theirs):
        scaler = new_scaler()
        for step in range(3):
            run.give(gradient(step) * scaler.scale(torch.ones(())))
            scaler.unscale_(run.optimizer)
            run.param.grad.clamp_(-0.5, 0.5)
            scaler.step(run.optimizer)
            scaler.update()
    assert torch.allclose(ours.selected(), theirs.selected(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["not fused", "sparse gradient"])
def test_beside_others_the_scaler_unscales_by_itself(kind: str) -> None:
    """One parameter that cannot follow on the device: GradScaler's own way for all, and inf skips all."""
    run, scaler = Run("compact"), new_scaler()
    other = nn.Embedding(*SHAPE, sparse=kind != "not fused")
    run.optimizer.add_param_group({"params": list(other.parameters()), "fused": kind != "not fused"})
    alone = Run("compact")
    copied = torch.optim.AdamW([nn.Parameter(other.weight.detach().clone())], 0.1, weight_decay=0.1)
    for step in range(3):
        before = [*run.everything(), other.weight.detach().clone()] if step else []
        run.give(gradient(step) * 1024 * (float("inf") if step == 2 else 1))
        other.weight.grad = None
        scaler.scale(other(torch.arange(6)).square().sum()).backward()
        assert not run.optimizer._step_supports_amp_scaling
        scaler.step(run.optimizer)
        scaler.update()
        if step < 2:
            alone.give(gradient(step))
            alone.optimizer.step()
            assert torch.allclose(run.selected(), alone.selected(), rtol=1e-6)
            p = copied.param_groups[0]["params"][0]
            p.grad = 2 * p.detach()
            copied.step()
            assert torch.allclose(other.weight, p, rtol=1e-5, atol=1e-6)
        else:
            after = [*run.everything(), other.weight.detach()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_several_devices_may_have_found_it() -> None:
    """GradScaler adds up what the devices found; the step was counted once."""
    for form in FORMS:
        run = Run(form)
        scaled_run(run, new_scaler(), steps=1)
        before = run.everything()
        run.give(gradient(1))
        run.optimizer.grad_scale, run.optimizer.found_inf = None, torch.tensor(2.0)
        run.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True)), form


def test_a_scale_that_nobody_would_follow_is_an_error() -> None:
    run = Run("dense", fused=False)
    run.give(gradient(0))
    before = run.everything()
    run.optimizer.grad_scale = torch.tensor(8.0)
    with pytest.raises(RuntimeError, match="unscaled before step"):
        run.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))
    del run.optimizer.grad_scale
    run.optimizer.step()


class HostReads(TorchDispatchMode):
    """Refuses every read of a tensor by the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "item", "nonzero", "equal.default", "is_nonzero")):
            raise AssertionError(f"the host reads: {name}")
        return function(*args, **(kwargs or {}))


def on_device(run: Run) -> None:
    run.give(gradient(0) * 8)
    run.optimizer.grad_scale, run.optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)


@pytest.mark.parametrize("form", ["compact", "indexed"])
def test_a_capturable_step_reads_nothing(form: str) -> None:
    run = Run(form, capturable=True, lr=torch.tensor(0.1))
    plain = Run(form)
    for _ in range(2):  # state is made in the first step
        on_device(run)
        with HostReads():
            run.optimizer.step()
        plain.give(gradient(0))
        plain.optimizer.step()
    assert torch.allclose(run.selected(), plain.selected(), rtol=1e-6, atol=1e-7)


def test_reads_by_the_host_are_seen() -> None:
    run = Run("compact", capturable=False, lr=torch.tensor(0.1))
    on_device(run)
    with HostReads(), pytest.raises(AssertionError, match="the host reads"):
        run.optimizer.step()


@pytest.mark.parametrize("form", ["compact", "indexed"])
def test_a_tensor_lr_is_followed(form: str) -> None:
    lr = torch.tensor(0.125)
    run, plain = Run(form, capturable=True, lr=lr), Run(form, lr=0.125)
    for step in range(4):
        lr.fill_(0.125 / 2**step)
        plain.optimizer.param_groups[0]["lr"] = 0.125 / 2**step
        for each in (run, plain):
            each.give(gradient(step))
            each.optimizer.step()
    assert torch.equal(run.selected(), plain.selected())


@pytest.mark.compatibility("CUDA graphs", "capturing without `capturable=True`", "refused")
@pytest.mark.parametrize("form", FORMS)
def test_capturing_without_capturable_is_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, theirs = Run(form), Run("theirs")
    for each in (run, theirs):
        each.give(gradient(0))
    before = run.everything()

    class Stream:
        def is_capturing(self) -> bool:
            return True

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: Stream())
    with pytest.raises(RuntimeError, match="capturable is False") as expected:
        theirs.optimizer.step()
    with pytest.raises(RuntimeError, match="capturable is False") as found:
        run.optimizer.step()
    assert str(found.value) == str(expected.value).replace("AdamW", "SparseAdamW")
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))


def test_steps_are_counted_where_torch_counts_them() -> None:
    p = torch.zeros(1, device="meta")
    for capturable, fused, place in ((False, None, "cpu"), (True, False, "meta"), (False, True, "meta")):
        assert step_device(p, {"capturable": capturable, "fused": fused}) == torch.device(place)


@needs_gpu
@pytest.mark.parametrize("form", ["compact", "indexed"])
def test_a_graph_follows_lr_and_verdict(form: str) -> None:
    """Captured once, replayed with another lr, and once with found_inf: as the same steps one by one."""
    lr = torch.tensor(0.1, device="cuda")
    run, plain = Run(form, device="cuda", capturable=True, lr=lr), Run(form, device="cuda")
    for each in (run, plain):
        each.give(gradient(0))
    run.optimizer.grad_scale = torch.tensor(1.0, device="cuda")
    run.optimizer.found_inf = found_inf = torch.zeros((), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run.optimizer.step()  # makes the state
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.optimizer.step()
    for rate, verdict in ((0.1, 0.0), (0.05, 0.0), (0.05, 1.0), (0.2, 0.0)):
        lr.fill_(rate)
        found_inf.fill_(verdict)
        graph.replay()
    plain.optimizer.step()
    for rate in (0.1, 0.05, 0.2):
        plain.optimizer.param_groups[0]["lr"] = rate
        plain.optimizer.step()
    assert torch.allclose(run.selected(), plain.selected(), rtol=1e-6, atol=1e-7)
    assert float(run.optimizer.state[run.param]["step"]) == 4
