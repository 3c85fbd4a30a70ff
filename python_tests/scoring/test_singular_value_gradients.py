"""Gradients of singular values in whole models, against the dense gradient that autograd makes."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from models import TRANSFORMERS, Zoo, batch, ids, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.scoring.singular_values import singular_value_gradients
from sparsekernels.structure.matrices import Matrix, matrices
from sparsekernels.structure.svd import Factors, factorize, split_rows

Wanted = dict[Matrix, list[Factors]]


def wanted(model: nn.Module, names: Iterable[str] | None = None, rank: int | None = None) -> Wanted:
    """Every matrix whole, and in three blocks of rows."""
    found: Wanted = {}
    for matrix in matrices(model, names).values():
        weight = matrix.read(model.get_parameter(matrix.parameter))
        found[matrix] = factorize([weight], rank)
        for rows in split_rows(len(weight), 3):
            (part,) = factorize([weight[rows]])
            found[matrix].append(Factors(part.u, part.s, part.v, rows))
    return found


def dense(model: nn.Module, batches, factors: Wanted, loss=None) -> dict[Matrix, tuple[list[Tensor], Tensor]]:
    """In fp64 from whole gradients: u_i^T G v_i, and <G, W>."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    model.zero_grad()
    sizes = [len(next(iter(b.values()))) for b in batches]
    for b, size in zip(batches, sizes, strict=True):
        value = loss(model, b) if loss else model(**b).loss
        (value * size / sum(sizes)).backward()
    found = {}
    for matrix, parts in factors.items():
        parameter = model.get_parameter(matrix.parameter)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        grad, weight = matrix.read(grad), matrix.read(parameter)
        rows = [torch.arange(len(grad)) if part.rows is None else part.rows for part in parts]
        values = [torch.diagonal(p.u.double().T @ grad[r] @ p.v.double()) for p, r in zip(parts, rows, strict=True)]
        found[matrix] = values, (grad * weight).sum()
    return found


def compare(model: nn.Module, batches, factors: Wanted, near: float = 1e-5, loss=None) -> None:
    expected = dense(model, batches, factors, loss)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    found, _ = singular_value_gradients(model, batches, factors, loss=loss, progress=False)
    assert list(found) == list(factors)
    for matrix, (values, inner) in expected.items():
        size = max(float(torch.cat(values).norm()), 1e-12)
        for mine, own in zip(found[matrix].values, values, strict=True):
            assert float((mine - own).norm()) <= near * size, matrix.label
        assert abs(float(found[matrix].inner - inner)) <= 10 * near * size, matrix.label
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name]), name
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind: str) -> None:
    model = transformer(kind)
    compare(model, [batch(kind), batch(kind, rows=2, length=5, seed=1)], wanted(model))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_truncated_factors_and_checkpointing(kind: str) -> None:
    model = transformer(kind)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(model, [batch(kind)], wanted(model, rank=1))


def test_every_kind_of_module() -> None:
    """Linear and Conv1D from activations; experts, and a table, from their dense gradient."""
    torch.manual_seed(0)
    model = Zoo()

    def loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return model(b["input_ids"]).square().mean()

    names = ["embed.weight", "up.weight", "down.weight", "conv.weight", "experts.weight", "head.weight"]
    factors = wanted(model, names)
    assert len(factors) == 8  # three experts
    compare(model, [{"input_ids": ids(3, 7)}, {"input_ids": ids(2, 7, seed=1)}], factors, loss=loss)


def test_no_weight_gradient_of_a_linear_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense way would be seen: parameters of Linears never require a gradient."""
    model = transformer("bert")
    asked: list[str] = []

    def loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        asked.extend(name for name, p in model.named_parameters() if p.requires_grad)
        return model(**b).loss

    singular_value_gradients(model, [batch("bert")], wanted(model), loss=loss, progress=False)
    assert asked == []


def test_sparse_gradients_of_a_table() -> None:
    model = transformer("bert")
    model.get_input_embeddings().sparse = True
    compare(model, [batch("bert")], wanted(model, ["*word_embeddings*"]))


class Twice(nn.Module):
    """One weight in two Linears, one of them used twice; another read past its module; one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.past, self.idle = (nn.Linear(8, 8) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.b(self.a(x)).tanh())
        return torch.nn.functional.linear(x, self.past.weight)


def twice_loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    return model(b["x"].to(model.a.weight.dtype)).square().mean()


def test_shared_weights_and_weights_read_past_their_module() -> None:
    torch.manual_seed(0)
    model = Twice()
    batches = [{"x": torch.randn(2, 5, 8)}, {"x": torch.randn(3, 5, 8)}]
    factors = wanted(model, ["a.weight", "past.weight", "idle.weight"])
    compare(model, batches, factors, loss=twice_loss)
    found, _ = singular_value_gradients(model, batches, factors, loss=twice_loss, progress=False)
    norms = {matrix.label: float(found[matrix].values[0].norm()) for matrix in factors}
    assert norms["idle.weight"] == 0
    assert min(norms["a.weight"], norms["past.weight"]) > 0


def test_a_forward_set_on_the_instance_is_kept() -> None:
    """As accelerate's hooks do: then the dense gradient is taken."""
    torch.manual_seed(0)
    model, batches = Twice(), [{"x": torch.randn(2, 5, 8)}]
    model.a.forward = lambda x: 2 * nn.Linear.forward(model.a, x)
    found, _ = singular_value_gradients(model, batches, wanted(model, ["a.weight"]), loss=twice_loss, progress=False)
    assert "forward" in vars(model.a)
    twice_loss(model, batches[0]).backward()
    (matrix,) = found
    u, _, vh = torch.linalg.svd(model.a.weight.detach(), full_matrices=False)
    expected = torch.diagonal(u.T @ model.a.weight.grad @ vh.T)
    torch.testing.assert_close(found[matrix].values[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model = transformer("llama").to(dtype)
    near = 1e-10 if dtype == torch.float64 else 0.1
    compare(model, [batch("llama")], wanted(model), near=near)


def test_autocast() -> None:
    model = transformer("bert")
    factors = wanted(model)
    expected = dense(model, [batch("bert")], factors)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = singular_value_gradients(model, [batch("bert")], factors, progress=False)
    for matrix, (values, _) in expected.items():
        assert float((found[matrix].values[0] - values[0]).norm()) <= 0.1 * float(values[0].norm())


def test_the_loss_is_the_mean_over_samples() -> None:
    model = transformer("bert").eval()
    batches = [batch("bert", rows=5), batch("bert", rows=1, seed=2)]
    _, mean = singular_value_gradients(model, batches, wanted(model), progress=False)
    with torch.no_grad():
        assert mean == pytest.approx(float(5 * model(**batches[0]).loss + model(**batches[1]).loss) / 6)


def singles(b: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: x[i : i + 1] for key, x in b.items()} for i in range(len(next(iter(b.values()))))]


def compare_per_sample(model: nn.Module, batches, factors: Wanted, loss=None) -> None:
    found, _ = singular_value_gradients(model, batches, factors, per_sample=True, loss=loss, progress=False)
    alone = [dense(model, [sample], factors, loss) for b in batches for sample in singles(b)]
    for matrix in factors:
        each = [torch.stack(values) for values in zip(*(sample[matrix][0] for sample in alone), strict=True)]
        size = max(1e-12, *(float(values.norm()) for values in each))
        for mine, expected in zip(found[matrix].values, each, strict=True):
            assert mine.shape == expected.shape
            assert float((mine - expected).norm()) <= 1e-5 * size, matrix.label
        inner = torch.stack([sample[matrix][1] for sample in alone])
        assert float((found[matrix].inner - inner).norm()) <= 1e-4 * size, matrix.label


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_per_sample(kind: str) -> None:
    model = transformer(kind)
    compare_per_sample(model, [batch(kind), batch(kind, rows=2, length=5, seed=1)], wanted(model))


def test_per_sample_runs_batches_and_one_sample_alone() -> None:
    model, batches = transformer("bert"), [batch("bert"), batch("bert", rows=2, seed=1)]
    sizes: list[int] = []

    def loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        sizes.append(len(b["labels"]))
        return model(**b).loss

    singular_value_gradients(model, batches, wanted(model), per_sample=True, loss=loss, progress=False)
    assert sizes == [3, 1, 2]


def test_per_sample_where_modules_do_not_tell_samples_apart() -> None:
    """Experts, a table, and a Linear whose weight is read past it: samples run one by one."""
    torch.manual_seed(0)
    model = Zoo()

    def loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return model(b["input_ids"]).square().mean()

    factors = wanted(model, ["embed.weight", "up.weight", "experts.weight", "head.weight"])
    compare_per_sample(model, [{"input_ids": ids(3, 7)}, {"input_ids": ids(2, 7, seed=1)}], factors, loss=loss)
    model = Twice()
    factors = wanted(model, ["a.weight", "past.weight", "idle.weight"])
    compare_per_sample(model, [{"x": torch.randn(3, 5, 8)}], factors, loss=twice_loss)


class Turned(nn.Module):
    """Samples in dimension 1 of what the Linear sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("length", [5, 3])
def test_per_sample_where_samples_are_not_in_front(length: int) -> None:
    """Even where there are as many tokens as samples."""
    torch.manual_seed(0)
    model = Turned()
    compare_per_sample(model, [{"x": torch.randn(3, length, 8)}], wanted(model, ["a.weight"]), loss=twice_loss)


@pytest.mark.parametrize("kind", ["gpt2", "bert-mlm"])
@pytest.mark.parametrize("later", [False, True])
def test_per_sample_of_texts_with_unequal_numbers_of_labels(kind: str, later: bool) -> None:
    """The loss of a batch is the mean over its labels: that of a sample is its own mean all the same."""
    model, ragged = transformer(kind), batch(kind, rows=3, length=8)
    ragged["labels"][1, 3:] = -100
    batches = [batch(kind, rows=2, length=8, seed=1), ragged] if later else [ragged]
    compare_per_sample(model, batches, wanted(model))


class Past(nn.Module):
    """Reads its only weight past the module that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.a.weight)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_model_whose_only_matrix_is_read_past_its_module(per_sample: bool) -> None:
    torch.manual_seed(0)
    model, batches = Past(), [{"x": torch.randn(3, 5, 8)}]
    factors = wanted(model, ["a.weight"])
    if per_sample:
        compare_per_sample(model, batches, factors, loss=twice_loss)
    else:
        compare(model, batches, factors, loss=twice_loss)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    names = ["self_attn.out_proj.weight", "linear1.weight"]  # its fast path reads weights by itself

    def loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return model(b["x"].to(model.linear1.weight.dtype))[..., 0].mean()

    compare(block, batches, wanted(block, names), loss=loss)


class Named(nn.Module):
    """Calls its modules with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.a, self.b = nn.Linear(8, 8), Conv1D(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x=self.a(input=x).tanh())


def test_modules_called_with_a_keyword() -> None:
    torch.manual_seed(0)
    model = Named()
    compare(model, [{"x": torch.randn(3, 5, 8)}], wanted(model, ["a.weight", "b.weight"]), loss=twice_loss)


def test_bad_input() -> None:
    model = transformer("bert")
    factors, batches = wanted(model), [batch("bert")]

    def run(samples=batches, factors=factors, loss=None) -> None:
        singular_value_gradients(model, samples, factors, loss=loss, progress=False)

    with pytest.raises(ValueError, match="samples holds no batch"):
        run(samples=[])
    with pytest.raises(ValueError, match="factors holds no matrix"):
        run(factors={})
    with pytest.raises(ValueError, match=r"loss must be a scalar tensor.*got shape \[3\] at batch 0"):
        run(loss=lambda model, b: model(**b).logits.sum(1))
    with pytest.raises(ValueError, match="depends on the matrices"):
        run(loss=lambda model, b: torch.zeros(()))
    with pytest.raises(ValueError, match="loss is nan at batch 0"):
        run(loss=lambda model, b: model(**b).loss * float("nan"))
    with pytest.raises(ValueError, match="is not finite"):
        run(loss=lambda model, b: model(**b).loss + (model(**b).logits.sum() * 0).sqrt())
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        run()
    selection = sk.Selection({"classifier.bias": sk.Index(torch.tensor([0]), (3,))})
    with sk.train_only(model, selection), pytest.raises(ValueError, match="trains a selection"):
        run()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
