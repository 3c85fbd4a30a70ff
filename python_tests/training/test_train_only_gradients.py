"""The gradient of every compact Parameter is the gathered dense gradient of the model as it was before train_only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import TRANSFORMERS, WIDTH, Zoo, batch, ids, transformer
from samples.case import take
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsekernels as sk
from sparsekernels import Index, Selection

Loss = Callable[[nn.Module], Tensor]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def energy(*inputs: Tensor) -> Loss:
    """A loss whose gradients are of order one."""
    return lambda model: sum((model(x).double() ** 2).sum() for x in inputs)  # type: ignore[return-value]


def assert_gathered(
    model: nn.Module, selection: Selection, loss: Loss, tolerance: float | None = None
) -> sk.SparseModel:
    """Sparsify `model`; loss and gradients must be those of a dense copy of it."""
    dense = copy.deepcopy(model)
    expected_loss = loss(dense)
    expected_loss.backward()
    parameters = dict(dense.named_parameters(remove_duplicate=False))

    tuned = sk.train_only(model, selection)
    found_loss = loss(model)
    assert torch.equal(found_loss, expected_loss), "the forward is that of the dense model, to the last bit"
    found_loss.backward()
    for name, values in tuned.named_parameters():
        grad = parameters[name].grad
        assert grad is not None, f"{name} takes no part in the loss: a poor test"
        index = selection[name]
        expected = take(grad, index).double()
        assert values.grad is not None, f"{name} got no gradient"
        assert values.grad.dtype == values.dtype
        allowed = (tolerance or TOLERANCE[grad.dtype]) * float(grad.double().abs().max())
        assert values.grad.shape == expected.shape
        assert torch.allclose(values.grad.double(), expected, rtol=0, atol=allowed), name
    trained = {id(values) for values in tuned.parameters()}
    for name, parameter in model.named_parameters():
        assert id(parameter) in trained or parameter.grad is None, f"{name} is frozen, but has a gradient"
    return tuned


def rows_of(model: nn.Module, every: int = 2) -> Selection:
    return Selection(
        {n: Index(torch.arange(0, p.shape[0], every), p.shape, granularity="row") for n, p in model.named_parameters()}
    )


def everything(model: nn.Module) -> Selection:
    return Selection({name: Index.full(p.shape) for name, p in model.named_parameters()})


SELECTIONS = {
    "some": lambda model: Selection.random(model, 0.3),
    "few": lambda model: Selection.random(model, 1e-9),
    "all-elements": lambda model: Selection.random(model, 1.0),
    "rows": rows_of,
    "all-rows": everything,
    "columns": lambda model: Selection.random(model, 0.3, granularity="column"),
    "blocks": lambda model: Selection.random(model, 0.3, granularity="block", block=(3, 5)),
    "few-blocks": lambda model: Selection.random(model, 1e-9, granularity="block", block=(8, 8)),
}
GRAINS = ("some", "rows", "columns", "blocks")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", SELECTIONS)
def test_every_kind_of_module(kind: str, dtype: torch.dtype) -> None:
    model = Zoo().to(dtype)
    assert_gathered(model, SELECTIONS[kind](model), energy(ids(4, 7)))


@pytest.mark.parametrize("kind", GRAINS)
@pytest.mark.parametrize("name", [name for name, _ in Zoo().named_parameters()])
def test_each_parameter_alone(name: str, kind: str) -> None:
    model = Zoo().double()
    assert_gathered(model, Selection({name: SELECTIONS[kind](model)[name]}), energy(ids(4, 7)))


def test_rows_and_elements_and_nothing_together() -> None:
    model = Zoo().double()
    rows, elements = rows_of(model), Selection.random(model, 0.2)
    names = list(rows)
    mixed = {n: (rows, elements)[i % 2][n] for i, n in enumerate(names)}
    mixed["up.weight"] = Index(torch.zeros(0, dtype=torch.int64), model.up.weight.shape)
    mixed["embed.weight"] = Index(torch.zeros(0, dtype=torch.int64), model.embed.weight.shape, granularity="row")
    assert_gathered(model, Selection(mixed), energy(ids(4, 7)))


@pytest.mark.parametrize(
    "shape", [(WIDTH,), (1, WIDTH), (5, WIDTH), (2, 3, WIDTH), (2, 3, 2, WIDTH), (0, WIDTH)], ids=str
)
@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias"), ("no bias", "weight")], ids="+".join)
@pytest.mark.parametrize("kind", GRAINS)
def test_linear_inputs(shape: tuple[int, ...], names: tuple[str, ...], kind: str) -> None:
    model = nn.Linear(WIDTH, 9, bias="no bias" not in names).double()
    chosen = SELECTIONS[kind](model)
    chosen = Selection({name: chosen[name] for name in names if name != "no bias"})
    assert_gathered(model, chosen, energy(torch.randn(shape, dtype=torch.float64)))


def test_gradient_of_the_input() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(energy(x)(model), x)[0]
    sk.train_only(model, Selection.random(model, 0.2, names=["0.weight", "2.weight", "2.bias"]))
    assert torch.allclose(torch.autograd.grad(energy(x)(model), x)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("strides", ["transposed", "expanded"])
def test_inputs_that_are_not_contiguous(strides: str) -> None:
    x = torch.randn(WIDTH, 6, dtype=torch.float64)
    inputs = x.T if strides == "transposed" else x[:, :1].T.expand(5, WIDTH)
    model = nn.Linear(WIDTH, 9).double()
    assert_gathered(model, Selection.random(model, 0.4), energy(inputs))
    # The gradient of sum() is an expanded scalar: strides of zero.
    model = nn.Linear(WIDTH, 9).double()
    assert_gathered(model, Selection.random(model, 0.4), lambda m: m(inputs).sum())


@pytest.mark.parametrize(
    "options", [{"padding_idx": 2}, {"padding_idx": -1}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str
)
@pytest.mark.parametrize("kind", GRAINS)
@pytest.mark.parametrize("shape", [(1,), (40,), (3, 9), ()], ids=str)
def test_embedding(options: dict, kind: str, shape: tuple[int, ...]) -> None:
    model = nn.Embedding(7, 5, **options).double()
    tokens = torch.randint(0, 7, shape)
    dense = copy.deepcopy(model)
    dense.sparse = False
    reference = energy(tokens)
    selection = SELECTIONS[kind](model)
    reference(dense).backward()
    tuned = sk.train_only(model, selection)
    reference(model).backward()
    (values,) = tuned.parameters()
    assert torch.allclose(values.grad, take(dense.weight.grad, selection["weight"]), rtol=1e-12, atol=1e-12)


def test_accumulation() -> None:
    model = Zoo().double()
    assert_gathered(model, Selection.random(model, 0.2), energy(ids(4, 7), ids(2, 5, seed=1), ids(4, 7)))
    tuned = sk.train_only(model := Zoo().double(), Selection.random(model, 0.2))
    energy(ids(4, 7))(model).backward()
    first = [values.grad.clone() for values in tuned.parameters()]
    energy(ids(4, 7))(model).backward()
    for values, grad in zip(tuned.parameters(), first, strict=True):
        assert torch.allclose(values.grad, 2 * grad, rtol=1e-12)


def test_one_module_called_twice() -> None:
    model = nn.Linear(WIDTH, WIDTH).double()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    assert_gathered(model, Selection.random(model, 0.3), lambda m: (m(m(x).tanh()) ** 2).sum())
    norm = nn.LayerNorm(WIDTH).double()
    assert_gathered(norm, Selection.random(norm, 0.3), lambda m: (m(m(x).tanh()) ** 3).sum())


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("selection", [*GRAINS, "all-rows", "few-blocks"])
def test_transformers(kind: str, selection: str) -> None:
    """Tied embeddings included: both uses add into one compact Parameter."""
    model = transformer(kind).double()
    chosen = SELECTIONS[selection](model)
    tuned = assert_gathered(model, chosen, lambda m: 100 * m(**batch(kind)).loss)
    assert len(list(tuned.parameters())) == len(list(tuned.slots))
    assert any("embed" in name or "wte" in name for name in tuned.slots)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "lm_head.weight"), ("bert-mlm", "cls.predictions.decoder.weight")])
def test_a_tied_weight_under_its_other_name(kind: str, name: str) -> None:
    model = transformer(kind).double()
    shape = dict(model.named_parameters(remove_duplicate=False))[name].shape
    assert_gathered(model, Selection.random({name: shape}, 0.2), lambda m: 100 * m(**batch(kind)).loss)


@pytest.mark.compatibility("torch", "gradient checkpointing", "works")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("grain", GRAINS)
def test_gradient_checkpointing(grain: str, kind: str, reentrant: bool) -> None:
    model = transformer(kind).double()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_gathered(model, SELECTIONS[grain](model), lambda m: 100 * m(**batch(kind)).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_through_hooked_modules(reentrant: bool) -> None:
    """Norm, Conv1D and experts are recomputed in backward: their hooks run a second time there."""
    model = Zoo().double()

    def loss(m: Zoo) -> Tensor:
        x = checkpoint(lambda x: m.experts(m.conv(m.norm(x))), m.embed(ids(4, 7)), use_reentrant=reentrant)
        return (checkpoint(m.up, x, use_reentrant=reentrant) ** 2).sum()

    names = [
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "conv.weight",
        "conv.bias",
        "experts.weight",
        "up.weight",
        "up.bias",
    ]
    assert_gathered(model, Selection.random(model, 0.3, names=names), loss)
    assert type(model.norm.weight) is nn.Parameter


@pytest.mark.compatibility("torch", "autocast", "works")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("grain", GRAINS)
def test_autocast(grain: str, dtype: torch.dtype, checkpointed: bool) -> None:
    model = Zoo()

    def loss(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            out = checkpoint(m, ids(4, 7), use_reentrant=False) if checkpointed else m(ids(4, 7))
            assert out.dtype == dtype
        return out.float().square().sum()

    assert_gathered(model, SELECTIONS[grain](model), loss, tolerance=2e-2)


def test_no_grad_and_inference_mode() -> None:
    model = Zoo()
    expected = model(ids(4, 7))
    sk.train_only(model, Selection.random(model, 0.3))
    with torch.no_grad():
        assert torch.equal(model(ids(4, 7)), expected)
    with torch.inference_mode():
        assert torch.equal(model(ids(4, 7)), expected)
    assert torch.equal(model(ids(4, 7)), expected)


@pytest.mark.compatibility("torch.compile", "forward and backward, `fullgraph=True`", "works")
@pytest.mark.parametrize("grain", GRAINS)
def test_compiled_model(grain: str) -> None:
    """One graph for a model of Linear and Embedding; the same gradients as without."""
    model = nn.Sequential(nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    selection = SELECTIONS[grain](model)
    compiled: dict[int, Callable] = {}

    def loss(m: nn.Module) -> Tensor:
        run = compiled.setdefault(id(m), torch.compile(m, fullgraph=True, backend="aot_eager"))
        return (run(torch.arange(11)) ** 2).sum()

    assert_gathered(model, selection, loss)


@pytest.mark.compatibility("torch.compile", "`dynamic=True`", "works")
def test_compiled_with_dynamic_shapes() -> None:
    """Several sparse layers, few positions and many, units of all kinds, batches of several lengths; as without."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, 9), nn.LayerNorm(9), nn.Linear(9, 4),
        nn.Linear(4, 10), nn.Linear(10, 7),
    ).double()  # fmt: skip
    rows = Selection({"0.weight": Index(torch.arange(0, 11, 3), (11, WIDTH), granularity="row")})
    rows |= Selection({"3.weight": Index(torch.arange(0, 9, 2), (9, 9), granularity="row")})
    selection = rows | Selection.random(model, 0.04, names=["1.weight"])
    selection |= Selection.random(model, 0.4, names=["4.weight", "5.weight", "5.bias"])
    selection |= Selection.random(model, 0.4, names=["6.weight"], granularity="column")
    selection |= Selection.random(model, 0.2, names=["7.weight"], granularity="block", block=(3, 4))
    sk.train_only(model, selection)
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    values = [p for p in model.parameters() if p.requires_grad]
    assert len(values) == len(selection)
    for length in (4, 5, 7):
        found = [torch.autograd.grad((m(torch.arange(length)) ** 2).sum(), values) for m in (run, model)]
        for ours, eager in zip(*found, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.compatibility("torch", "double backward through a sparse layer", "refused")
def test_second_derivatives_are_refused() -> None:
    model = nn.Linear(4, 4)
    tuned = sk.train_only(model, Selection.random(model, 0.5))
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(energy(x)(model), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert all(values.grad is None for values in tuned.parameters())
