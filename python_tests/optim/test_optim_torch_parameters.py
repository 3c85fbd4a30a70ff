"""The cases of torch's optimizer suite about what a parameter is: strides, dtypes, sizes, differentiability.

As in test_optim_torch_cases.py each is held against torch.optim.AdamW.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_cases import (
    FORMS,
    Problem,
    assert_same,
    groups_of,
    optimizer_inputs,
    optimizer_of,
    parameters_of,
    together,
    train,
)

import sparsekernels as sk
from sparsekernels import Index, Selection


def test_weights_with_strides_are_stepped_as_in_torch(device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        runs = []
        for cls in (sk.SparseAdamW, torch.optim.AdamW):
            problem = Problem(device)
            problem.weight = nn.Parameter(torch.stack([problem.weight.detach()] * 2, dim=-1)[..., 0])
            assert not problem.weight.is_contiguous()
            train(problem, cls(problem.parameters(), **copy.deepcopy(options)), 5)
            runs.append(problem)
        assert_same(*runs, "dense", what)


def test_complex_parameters_are_two_real_ones_as_in_torch(device: torch.device) -> None:
    for what, options in optimizer_inputs(device, fused=False):
        start = torch.randn(3, 4, dtype=torch.complex64, device=device)
        z, twin = (nn.Parameter(start.clone()) for _ in range(2))
        real = nn.Parameter(torch.view_as_real(start).clone())
        kinds = (sk.SparseAdamW, torch.optim.AdamW, torch.optim.AdamW)
        optimizers = [cls([p], **copy.deepcopy(options)) for cls, p in zip(kinds, (z, twin, real), strict=True)]
        target = torch.randn_like(start)
        for _ in range(4):
            for optimizer in optimizers:
                (p,) = parameters_of(optimizer)
                optimizer.zero_grad()
                (p if p.is_complex() else torch.view_as_complex(p)).sub(target).abs().square().sum().backward()
                optimizer.step()
        assert torch.equal(z, twin), what
        assert not torch.equal(z, start), what
        if not options.get("amsgrad"):  # its maximum is taken over each part, and over the whole
            torch.testing.assert_close(torch.view_as_real(z.detach()), real.detach(), rtol=1e-5, atol=1e-6)


def test_complex_parameters_of_the_other_kinds_are_refused_by_name() -> None:
    z = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"params\[0\].*complex64"):
        sk.SparseAdamW([{"params": [z], "indices": [Index.full(z.shape)]}])
    named = [("w", nn.Parameter(torch.ones(2))), ("phase", z)]
    with pytest.raises(ValueError, match=r"params\[1\].*'phase'.*complex64"):
        sk.SparseAdamW([{"params": named, "indices": [Index.full((2,)), Index.full((3,))]}])
    module = nn.Module()
    module.phase = z
    with pytest.raises(ValueError, match=r"'phase'.*complex64"):
        sk.train_only(module, Selection({"phase": Index.full(z.shape)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("form", FORMS)
def test_implementations_agree(form: str, flag: str, dtype: torch.dtype, device: torch.device) -> None:
    """The flag picks torch's loop for dense parameters, bit for bit as in torch; for the others it changes no bit."""
    for what, options in optimizer_inputs(device):
        if options.get("fused") or options.get("foreach"):
            continue
        options = {**options, "eps": 1e-3}  # fp16 has nothing below 6e-8
        runs = []
        for cls, on in ((sk.SparseAdamW, True), (sk.SparseAdamW, False), (torch.optim.AdamW, True)):
            problem = Problem(device, dtype)
            kind = "dense" if cls is torch.optim.AdamW else form
            train(problem, cls(together(groups_of(kind, problem)), **{**copy.deepcopy(options), flag: on}), 7)
            runs.append(problem)
        ours, loop, theirs = runs
        if form == "dense":
            assert_same(ours, theirs, "dense", what)
        else:
            assert torch.equal(ours.weight, loop.weight), what
            assert torch.equal(ours.bias, loop.bias), what
            eps = max(torch.finfo(dtype).eps, 1e-6)  # of a half-precision weight: it is rounded once a step
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parameters_of_size_zero(form: str, shape: tuple[int, ...], device: torch.device) -> None:
    """Alone, and beside one that has elements, which is stepped as if it were alone."""
    for what, options in optimizer_inputs(device):
        module, alone = nn.ParameterDict(), nn.ParameterDict()
        for m in (module, alone):
            m["full"] = nn.Parameter(torch.linspace(-1, 1, 7, device=device))
        module["empty"] = nn.Parameter(torch.empty(shape, device=device))
        optimizer, other = optimizer_of(form, module, **options), optimizer_of(form, alone, **options)
        for p in parameters_of(optimizer) + parameters_of(other):
            p.grad = torch.ones_like(p)
        optimizer.step()
        other.step()
        assert torch.equal(module["full"], alone["full"]), what
        assert not torch.equal(module["full"], torch.linspace(-1, 1, 7, device=device)), what
        assert module["empty"].shape == shape
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        assert [float(state["step"]) for state in optimizer.state.values()] == [2.0, 2.0], what


@pytest.mark.parametrize("form", FORMS)
def test_under_a_default_dtype_of_double(form: str, device: torch.device) -> None:
    for what, options in optimizer_inputs(device):
        problem, other = Problem(device), Problem(device)
        torch.set_default_dtype(torch.float64)
        try:
            optimizer = optimizer_of(form, problem, **options)
            train(problem, optimizer, 5)
            train(other, torch.optim.AdamW(other.parameters(), **copy.deepcopy(options)), 5)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same(problem, other, form, what)
        assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values()), what


def _differentiable_step(cls: type, p: Tensor, grad: Tensor, state: dict[str, Tensor], options: dict) -> list[Tensor]:
    p = p.clone()
    p.grad = grad
    optimizer = cls([p], differentiable=True, **options)
    optimizer.state[p].update({key: value.clone() for key, value in state.items()})
    optimizer.step()
    return [p, *(value for value in optimizer.state[p].values() if value.requires_grad)]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.3}], ids=str)
def test_differentiable_steps_have_gradients(options: dict[str, Any]) -> None:
    p, grad, *moments = (torch.rand(10, dtype=torch.float64, requires_grad=True) for _ in range(5))
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + options.get("amsgrad", False)]

    def run(cls: type, p: Tensor, grad: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        state = {"step": torch.tensor(10.0), **dict(zip(names, moments, strict=True))}
        return tuple(_differentiable_step(cls, p, grad, state, {"lr": 0.9, **options}))

    moments = moments[: len(names)]
    found, expected = (run(cls, p, grad, *moments) for cls in (sk.SparseAdamW, torch.optim.AdamW))
    assert len(found) == len(expected) == 1 + len(names)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.autograd.gradcheck(lambda *args: run(sk.SparseAdamW, *args), (p, grad, *moments))


def test_a_differentiable_lr_gets_its_gradient() -> None:
    p, grad = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    state = {"step": torch.tensor(10.0), "exp_avg": torch.rand_like(p), "exp_avg_sq": torch.rand_like(p)}
    grads = []
    for cls in (sk.SparseAdamW, torch.optim.AdamW):
        lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        _differentiable_step(cls, p, grad, state, {"lr": lr})[0].sum().backward()
        grads.append(lr.grad)
    assert torch.equal(*grads)
    assert grads[0] != 0


def _indexed(change: str) -> tuple[sk.SparseAdamW, nn.Parameter]:
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = sk.SparseAdamW(
        [{"params": [("w", p)], "indices": [Index(torch.tensor([1, 3]), (6, 4), granularity="row")]}]
    )
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    if change == "strides":
        p.data = p.data.T.contiguous().T
    elif change == "shape":
        p.data = p.data[:3].contiguous()
    else:
        p.data = p.data.double()
    p.grad = torch.ones_like(p)
    return optimizer, p


def _compact(change: str) -> tuple[sk.SparseAdamW, nn.Parameter]:
    model = nn.Sequential(nn.Linear(4, 3))
    tuned = sk.train_only(model, Selection.random(model, 0.5, names=["0.weight"]))
    optimizer = sk.SparseAdamW(tuned.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.to(torch.float64 if change == "double" else torch.float16)
    (values,) = tuned.parameters()
    values.grad = torch.ones_like(values)
    return optimizer, model[0].weight


@pytest.mark.parametrize(
    ("make", "change", "words"),
    [
        (_indexed, "strides", r"'w' became .*strides \[1, 6\]"),
        (_indexed, "shape", r"'w' became .*shape \[3, 4\].*shape \[6, 4\]"),
        (_indexed, "double", r"'w' became torch.float64.*state of torch.float32"),
        (_compact, "double", r"'0.weight' became torch.float64.*state of torch.float32"),
        (_compact, "half", r"'0.weight' became torch.float16"),
    ],
)
def test_a_parameter_that_changed_is_named_and_nothing_else_changes(make: Any, change: str, words: str) -> None:
    optimizer, weight = make(change)
    before, state = weight.detach().clone(), copy.deepcopy(list(optimizer.state.values()))
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert torch.equal(weight, before)
    for entry, kept in zip(optimizer.state.values(), state, strict=True):
        assert all(torch.equal(entry[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("params", "kind", "words"),
    [
        (lambda p: [3], TypeError, "optimizer can only optimize Tensors"),
        (lambda p: {p}, TypeError, "ordered collections"),
        (lambda p: [p * 2], ValueError, "non-leaf"),
    ],
)
def test_what_is_no_parameter_is_refused_in_the_words_of_torch(params: Any, kind: type[Exception], words: str) -> None:
    given = params(nn.Parameter(torch.ones(3)))
    for group in ({"params": given}, {"params": given, "indices": [Index.full((3,))]}):
        with pytest.raises(kind, match=words):
            sk.SparseAdamW([group])


ADAM = importlib.import_module("torch.optim.adam")  # torch.optim deletes it from itself
IMPLEMENTATIONS = ("_single_tensor_adam", "_multi_tensor_adam", "_fused_adam")


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_the_implementation_is_the_one_torch_picks(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in IMPLEMENTATIONS:
        own = getattr(ADAM, name)
        monkeypatch.setattr(ADAM, name, lambda *a, name=name, own=own, **k: (called.append(name), own(*a, **k)))
    picked = []
    for cls in (sk.SparseAdamW, torch.optim.AdamW):
        problem = Problem(device)
        train(problem, cls(problem.parameters(), **options), 1)
        picked.append(list(called))
        called.clear()
    assert picked[0] == picked[1]
    assert len(picked[0]) == 1


def test_fused_refuses_parameters_on_meta(device: torch.device) -> None:
    """As torch does, and works once they are somewhere."""
    messages = []
    for cls in (sk.SparseAdamW, torch.optim.AdamW):
        p = nn.Parameter(torch.empty(2, 3, device="meta"))
        optimizer = cls([p], fused=True)
        p.grad = torch.empty_like(p)
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        messages.append(str(error.value))
        real = nn.Parameter(torch.ones(2, 3, device=device))
        real.grad = torch.ones_like(real)
        optimizer.param_groups[0]["params"] = [real]
        optimizer.step()
        assert (real < 1).all()
    assert messages[0] == messages[1]
