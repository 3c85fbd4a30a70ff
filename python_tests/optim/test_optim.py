"""SparseAdamW is torch.optim.AdamW: over all positions on the tensor itself, over some of them on a compact copy."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from samples.case import put, take
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection

SHAPES = {"a": (7, 5), "b": (11,), "c": (3, 2, 4), "d": ()}
STEPS = 100

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.03},
    "lr=0": {"lr": 0.0},
    "tensor lr": {"lr": torch.tensor(0.02), "foreach": False},
    "betas": {"betas": (0.7, 0.95)},
    "betas=0": {"betas": (0.0, 0.0)},
    "eps": {"eps": 1e-2},
    "weight_decay": {"weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "everything": {
        "lr": 0.02,
        "betas": (0.8, 0.98),
        "eps": 1e-3,
        "weight_decay": 0.2,
        "amsgrad": True,
        "maximize": True,
    },
    "foreach": {"foreach": True},
    "not foreach": {"foreach": False},
    "fused": {"fused": True},
    "fused amsgrad": {"fused": True, "amsgrad": True},
}


class Weights(nn.Module):
    """Parameters without a forward; their gradients are given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


@functools.cache
def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Dense gradients of step number `step`, of very different sizes; some of them zero."""
    generator = torch.Generator().manual_seed(100 + step)
    out = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        grad = torch.randn(shape, generator=generator) * 10.0 ** (i - 1)
        out[name] = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, grad).to(dtype)
    return out


def selection(model: nn.Module, kind: str) -> Selection:
    if kind == "all":
        elements = Selection.random(model, 1.0)
        return Selection({n: Index.full(p.shape) if n in "ac" else elements[n] for n, p in model.named_parameters()})
    rows = Index(torch.tensor([0, 2]), SHAPES["c"], granularity="row")
    nothing = Index(torch.zeros(0, dtype=torch.int64), SHAPES["b"])
    return Selection({**Selection.random(model, 0.4), "c": rows, "b": nothing})


def compact_run(model: Weights, chosen: Selection, steps: int, options: dict[str, Any]) -> dict[str, Tensor]:
    tuned = sk.train_only(model, chosen)
    optimizer = sk.SparseAdamW(tuned.parameters(), **options)
    for step in range(steps):
        grads = gradients(step, model.a.dtype)
        for name, values in tuned.named_parameters():
            values.grad = take(grads[name], chosen[name]).to(values.dtype)
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters() if n in SHAPES}


def indexed_run(model: Weights, chosen: Selection, steps: int, options: dict[str, Any]) -> dict[str, Tensor]:
    optimizer = sk.SparseAdamW(chosen.param_groups(model), **options)
    for step in range(steps):
        for name, grad in gradients(step, model.a.dtype).items():
            model.get_parameter(name).grad = grad
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def dense_run(
    model: Weights, chosen: Selection, steps: int, options: dict[str, Any], cls: type = sk.SparseAdamW
) -> dict[str, Tensor]:
    optimizer = cls(model.parameters(), **options)
    for step in range(steps):
        for name, grad in gradients(step, model.a.dtype).items():
            model.get_parameter(name).grad = grad
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


FORMS = {"compact": compact_run, "indexed": indexed_run, "dense": dense_run}


@functools.cache
def wanted(name: str, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    options = dict(OPTIONS[name])
    if dtype == torch.float64 and "lr" in options:
        options["lr"] = float(options["lr"])  # a tensor lr would bring its fp32 rounding of 1 - lr * weight_decay along
    return oracle(Weights(dtype), selection(Weights(), kind), STEPS, options)


def oracle(model: Weights, chosen: Selection, steps: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """torch.optim.AdamW on compact copies, put back."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    copies = {n: nn.Parameter(take(weights[n], chosen[n])) for n in SHAPES}
    optimizer = torch.optim.AdamW(copies.values(), **options)
    for step in range(steps):
        for name, grad in gradients(step, model.a.dtype).items():
            copies[name].grad = take(grad, chosen[name])
        optimizer.step()
    return {n: put(weights[n], chosen[n], copies[n].detach()) for n in SHAPES}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """At most twice as far from the fp64 run `exact` as torch itself, and one rounding; in parts of the largest weight.

    torch's own error is taken over all tensors: that of a single weight may happen to be nothing.
    """

    def error(of: dict[str, Tensor], name: str) -> float:
        return float((of[name].double() - exact[name]).abs().max() / exact[name].abs().max())

    own = max(error(expected, name) for name in found)
    for name in found:
        assert error(found, name) <= 2 * own + 2e-7, f"{name}: {error(found, name):.3g}, torch's own {own:.3g}"


@pytest.mark.parametrize(
    ("form", "kind"), [(f, k) for f in FORMS for k in ("all", "some") if (f, k) != ("dense", "some")]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_is_adamw(name: str, form: str, kind: str) -> None:
    options, chosen = OPTIONS[name], selection(Weights(), kind)
    before = {n: p.detach().clone() for n, p in Weights().named_parameters()}
    found = FORMS[form](Weights(), chosen, STEPS, options)
    assert_close(found, wanted(name, kind, torch.float32), wanted(name, kind, torch.float64))
    for n, out in found.items():
        assert torch.equal(put(out, chosen[n], take(before[n], chosen[n])), before[n]), f"{n} changed outside"
    if options.get("lr") != 0:
        assert not torch.equal(found["a"], before["a"])


@pytest.mark.parametrize("name", ["defaults", "everything", "tensor lr"])
def test_dense_form_is_adamw_to_the_last_bit(name: str) -> None:
    chosen = selection(Weights(), "all")
    ours = dense_run(Weights(), chosen, 20, OPTIONS[name])
    theirs = dense_run(Weights(), chosen, 20, OPTIONS[name], torch.optim.AdamW)
    assert all(torch.equal(ours[n], theirs[n]) for n in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["all", "some"])
def test_compact_form_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    """fp64 is exact; a half-precision weight is the fp32 master, rounded."""
    options = OPTIONS["everything"]
    chosen = selection(Weights(dtype), kind)
    found = compact_run(Weights(dtype), chosen, 30, options)
    if dtype == torch.float64:
        for n, expected in oracle(Weights(dtype), chosen, 30, options).items():
            assert torch.allclose(found[n], expected, rtol=1e-12, atol=1e-13)
        return
    start = Weights(dtype)
    wide = start.float()
    grads = [{n: g.float() for n, g in gradients(step, dtype).items()} for step in range(30)]
    tuned = sk.train_only(wide, chosen)
    optimizer = sk.SparseAdamW(tuned.parameters(), **options)
    for step in range(30):
        for name, values in tuned.named_parameters():
            values.grad = take(grads[step][name], chosen[name])
        optimizer.step()
    for n in SHAPES:
        assert found[n].dtype == dtype
        assert torch.equal(found[n], wide.get_parameter(n).detach().to(dtype)), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_indexed_form_rounds_once_a_step(dtype: torch.dtype) -> None:
    chosen = selection(Weights(dtype), "some")
    model = Weights(dtype)
    optimizer = sk.SparseAdamW(chosen.param_groups(model), lr=0.1)
    copies = {n: nn.Parameter(take(p.detach(), chosen[n]).float()) for n, p in model.named_parameters()}
    other = torch.optim.AdamW(copies.values(), lr=0.1)
    for step in range(10):
        for name, grad in gradients(step, dtype).items():
            model.get_parameter(name).grad = grad
            copies[name].grad = take(grad, chosen[name]).float()
        optimizer.step()
        other.step()
        for name, parameter in model.named_parameters():
            ours, theirs = take(parameter.detach(), chosen[name]), copies[name].detach()
            # An fp32 difference in the last place may tip a rounding: one unit is free, and few may use it.
            assert torch.allclose(ours.float(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert (ours != theirs.to(dtype)).float().sum() <= 1
            copies[name].data = ours.float()
    states = [state for p, state in optimizer.state.items()]
    assert all(state["exp_avg"].dtype == torch.float32 for state in states)


def test_state_has_the_size_of_the_selection() -> None:
    model = Weights(torch.bfloat16)
    chosen = selection(model, "some")
    optimizer = sk.SparseAdamW(chosen.param_groups(model), amsgrad=True)
    for name, grad in gradients(0, torch.bfloat16).items():
        model.get_parameter(name).grad = grad
    optimizer.step()
    for name, index in chosen.items():
        state = optimizer.state[model.get_parameter(name)]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert all(state[key].shape == index.compact_shape for key in state if key != "step")
        assert (float(state["step"]), state["step"].dtype, state["step"].shape) == (1.0, torch.float32, ())


@pytest.mark.parametrize(
    "options", [{"capturable": True}, {"foreach": True}, {"fused": True}, {"differentiable": False}], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_accepted_options_change_nothing(form: str, options: dict[str, Any]) -> None:
    if options.get("capturable") and form == "dense":
        pytest.skip("torch itself wants dense capturable parameters on a GPU")
    chosen = selection(Weights(), "all")
    found = FORMS[form](Weights(), chosen, 5, options)
    expected = FORMS[form](Weights(), chosen, 5, {})
    assert all(torch.allclose(found[n], expected[n], rtol=1e-6, atol=1e-7) for n in SHAPES)


BAD = [
    {"lr": -1.0},
    {"eps": -1.0},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"weight_decay": -1.0},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_options_are_errors_as_in_torch(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch.optim.AdamW(Weights().parameters(), **options)
    with pytest.raises(theirs.type) as ours:
        sk.SparseAdamW(Weights().parameters(), **options)
    assert str(ours.value) == str(theirs.value)


def test_the_signature_is_that_of_adamw() -> None:
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (sk.SparseAdamW, torch.optim.AdamW))
    signature = [[(p.name, p.default, p.kind) for p in parameters.values()] for parameters in (ours, theirs)]
    assert signature[0][: len(theirs)] == signature[1]
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, _, kind in signature[0][len(theirs) :])
