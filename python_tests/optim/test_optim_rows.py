"""Sparse (COO) gradients: SparseAdamW is torch.optim.SparseAdam, with less state, decay, and every floating dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsekernels as sk

V, D, T, STEPS = 30, 6, 9, 40
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def gradients(
    steps: int = STEPS, tokens: int = T, dtype: torch.dtype = FP32, coalesce: bool = False
) -> Iterator[Tensor]:
    """Uncoalesced gradients of a [V, D] table with duplicates, of very different sizes; the last rows never occur."""
    generator = torch.Generator().manual_seed(11)
    for step in range(steps):
        count = 0 if step == 3 else tokens
        ids = torch.randint(0, V - 4, (count,), generator=generator)
        values = torch.randn(count, D, generator=generator, dtype=FP64) * 10.0 ** (step % 5 - 4)
        grad = torch.sparse_coo_tensor(ids[None], values.to(dtype), (V, D), check_invariants=True)
        yield grad.coalesce() if coalesce else grad


def table(dtype: torch.dtype = FP32) -> nn.Parameter:
    return nn.Parameter(torch.randn(V, D, generator=torch.Generator().manual_seed(2), dtype=FP64).to(dtype))


def train(optimizer: Any, p: nn.Parameter, grads: Iterator[Tensor]) -> Tensor:
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).abs().max())


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.03},
    "tensor lr": {"lr": torch.tensor(0.02)},
    "betas": {"betas": (0.7, 0.95)},
    "eps": {"eps": 1e-2},
    "maximize": {"maximize": True},
}


@pytest.mark.parametrize("sparse_state", ["seen", "all"])
@pytest.mark.parametrize("coalesce", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_sparse_adam_without_decay(options: dict[str, Any], coalesce: bool, sparse_state: str) -> None:
    """As close to SparseAdam in fp64 as SparseAdam in fp32 is; rows that never occur keep their bits."""
    runs = []
    for make, dtype, more in (
        (sk.SparseAdamW, FP32, {"weight_decay": 0.0, "sparse_state": sparse_state}),
        (torch.optim.SparseAdam, FP32, {}),
        (torch.optim.SparseAdam, FP64, {}),
    ):
        p = table(dtype)
        runs.append(train(make([p], **options, **more), p, gradients(dtype=dtype, coalesce=coalesce)))
    ours, theirs, exact = runs
    assert error(ours, exact) <= 2 * error(theirs, exact) + 2e-7
    assert error(ours, table()) > 1e-3
    assert torch.equal(ours[-4:], table()[-4:])


def loop(
    grads: Iterator[Tensor], rates: list[float], decay: str, correction: str, weight_decay: float, amsgrad: bool
) -> Tensor:
    """What the options mean, row by row in fp64. Decay that a row missed is made up for when it is touched."""
    x = table(FP64).detach().clone()
    m, v, largest = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    step_count, owed = [0] * V, [1.0] * V
    for step, (grad, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        dense = grad.double().to_dense()
        touched = set(grad._indices()[0].tolist())
        for row in range(V):
            owed[row] *= 1 - lr * weight_decay
            if row not in touched:
                continue
            step_count[row] += 1
            t = step_count[row] if correction == "row" else step
            x[row] *= owed[row] if decay == "catch_up" else 1 - lr * weight_decay
            owed[row] = 1.0
            m[row] = 0.9 * m[row] + 0.1 * dense[row]
            v[row] = 0.999 * v[row] + 0.001 * dense[row] ** 2
            largest[row] = torch.maximum(largest[row], v[row])
            second = largest[row] if amsgrad else v[row]
            x[row] -= lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m[row] / (second.sqrt() + 1e-8)
    return x


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("sparse_state", ["seen", "all"])
@pytest.mark.parametrize("correction", ["global", "row"])
@pytest.mark.parametrize("decay", ["touched", "catch_up"])
def test_decay_and_bias_correction(decay: str, correction: str, sparse_state: str, amsgrad: bool) -> None:
    """Both options, under a learning rate that changes, against a loop over rows."""
    found = []
    for dtype in (FP32, FP64):
        p = table(dtype)
        optimizer = sk.SparseAdamW(
            [p],
            0.02,
            weight_decay=0.5,
            amsgrad=amsgrad,
            sparse_state=sparse_state,  # type: ignore[arg-type]
            sparse_decay=decay,  # type: ignore[arg-type]
            sparse_bias_correction=correction,  # type: ignore[arg-type]
        )
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, STEPS)
        rates = []
        for grad in gradients(dtype=dtype):
            p.grad = grad
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        expected = loop(gradients(dtype=dtype), rates, decay, correction, 0.5, amsgrad)
        found.append(error(p, expected))
    assert found[0] <= 3e-6
    assert found[1] <= 1e-13


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision(dtype: torch.dtype) -> None:
    """fp32 state; each step is the exact one, rounded to nearest: the state never sees the rounding of the weight."""
    p = table(dtype)
    optimizer = sk.SparseAdamW([p], 0.01, weight_decay=0.1)
    twin = table(FP64)
    exact = sk.SparseAdamW([twin], 0.01, weight_decay=0.1)
    for grad in gradients(dtype=dtype):
        with torch.no_grad():
            twin.copy_(p)
        p.grad, twin.grad = grad, grad.double()
        optimizer.step()
        exact.step()
        unit = torch.finfo(dtype).eps / 2
        assert ((p.double() - twin).abs() <= 1.01 * unit * twin.abs() + 1e-6).all()
    assert optimizer.state[p]["exp_avg"].dtype == FP32


def test_micro_batches_and_a_real_embedding() -> None:
    """Gradients of two backwards, accumulated, step as the gradient of both texts at once."""
    ids = torch.tensor([[1, 2, 2, 7], [7, 1, 1, 9]])
    results = []
    for parts in ([ids], [ids[:1], ids[1:]]):
        torch.manual_seed(0)
        embedding = nn.Embedding(V, D, padding_idx=9, sparse=True)
        optimizer = sk.SparseAdamW(embedding.parameters(), 0.1)
        for _ in range(3):
            for part in parts:
                embedding(part).pow(2).sum().backward()
            assert embedding.weight.grad.is_sparse
            optimizer.step()
            optimizer.zero_grad()
        results.append(embedding.weight.detach())
        assert optimizer.state[embedding.weight]["rows"].tolist() == [1, 2, 7]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][3:7], results[1][3:7])


def test_state_is_as_large_as_what_was_seen() -> None:
    p = nn.Parameter(torch.randn(1000, D))
    optimizer = sk.SparseAdamW([p], 0.1)
    seen: list[int] = []
    sizes: set[int] = set()
    for step in range(30):
        ids = torch.randint(0, 30 * (step + 1), (5,))
        p.grad = torch.sparse_coo_tensor(ids[None], torch.randn(5, D), p.shape, check_invariants=True)
        optimizer.step()
        seen += [i for i in ids.sort().values.tolist() if i not in seen]
        state = optimizer.state[p]
        seen = list(dict.fromkeys(seen))
        assert state["rows"].tolist() == seen
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].shape == (len(seen), D)
            assert state[name].untyped_storage().nbytes() <= 2 * 4 * D * len(seen)
        sizes.add(state["exp_avg"].untyped_storage().nbytes())
    assert len(seen) > 64
    assert len(sizes) <= 8, "room for twice as many is made at once, not for a few at every step"


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(threads: int) -> None:
    """The same bits again, on one thread or two; duplicates are summed in the order they came."""
    wide = torch.randint(0, 300, (2000,))
    grad = torch.sparse_coo_tensor(wide[None], torch.randn(2000, 64), (300, 64), check_invariants=True)
    results = []
    for count in (threads, 1):
        torch.set_num_threads(count)
        p = nn.Parameter(torch.ones(300, 64))
        optimizer = sk.SparseAdamW([p], 0.1)
        for _ in range(3):
            p.grad = grad
            optimizer.step()
        results.append(p.detach())
    torch.set_num_threads(1)
    assert torch.equal(*results)


def test_sparse_and_dense_gradients_take_turns() -> None:
    """With state for all rows a tied table may get either; the one without refuses, and keeps everything."""
    p = table()
    optimizer = sk.SparseAdamW([p], 0.1, sparse_state="all")
    for grad in gradients(6):
        p.grad = grad
        optimizer.step()
        p.grad = grad.to_dense()
        optimizer.step()
    assert optimizer.state[p]["step"] == 12
    p = table()
    optimizer = sk.SparseAdamW([("emb.weight", p)], 0.1)
    grad = next(gradients())
    p.grad = grad
    optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    p.grad = grad.to_dense()
    with pytest.raises(ValueError, match=r"'emb.weight'.*dense.*sparse_state='all'"):
        optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(state[name], x) for name, x in optimizer.state[p].items())


def test_a_deep_copy_grows_alone() -> None:
    p = table()
    optimizer = sk.SparseAdamW([p], 0.1)
    grads = list(gradients(6))
    train(optimizer, p, iter(grads[:3]))
    q, other = copy.deepcopy((p, optimizer))
    q = other.param_groups[0]["params"][0]
    expected = train(optimizer, p, iter(grads[4:]))
    assert torch.equal(train(other, q, iter(grads[4:])), expected)


def test_clipping() -> None:
    """torch raises on sparse gradients; ours is torch's on the dense equivalent."""
    for clip, argument in ((sk.clip_grad_norm_, 0.5), (sk.clip_grad_value_, 0.01)):
        p, q = table(), nn.Parameter(torch.randn(5))
        grad, other = list(gradients(5))[4], torch.randn(5)
        p.grad, q.grad = grad.clone(), other.clone()
        dense, plain = table(), nn.Parameter(torch.randn(5))
        dense.grad, plain.grad = grad.to_dense(), other.clone()
        found = clip([p, q], argument)
        expected = getattr(torch.nn.utils, clip.__name__)([dense, plain], argument)
        assert found is None or torch.allclose(found, expected)
        assert p.grad.is_sparse
        torch.testing.assert_close(p.grad.to_dense(), dense.grad)
        torch.testing.assert_close(q.grad, plain.grad)
        assert not torch.equal(p.grad.to_dense(), grad.to_dense())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparse_state": "some"}, "sparse_state must be one of 'seen', 'all', got 'some'"),
        ({"sparse_decay": "later"}, "sparse_decay must be"),
        ({"sparse_bias_correction": True}, "sparse_bias_correction must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sk.SparseAdamW([table()], **options)
    with pytest.raises(ValueError, match=words):
        sk.SparseAdamW([{"params": [table()], **options}])


def test_refused_before_anything_changes() -> None:
    def refused(p: nn.Parameter, grad: Tensor, words: str, **options: Any) -> None:
        first = table()
        first.grad = torch.ones(V, D).to_sparse(1)
        optimizer = sk.SparseAdamW([first, p], **options)
        p.grad = grad
        before = first.detach().clone()
        with pytest.raises(ValueError, match=words):
            optimizer.step()
        assert torch.equal(first, before)
        assert not optimizer.state

    strided = nn.Parameter(torch.randn(D, V).T)
    refused(strided, torch.ones(V, D).to_sparse(1), "contiguous")
    ones = torch.ones(V, D).to_sparse(1)
    refused(table(), ones, "lr \\* weight_decay < 1", lr=2.0, weight_decay=0.5, sparse_decay="catch_up")


def test_refused_after_changes_of_the_run() -> None:
    """A parameter, an option or a state that changed meanwhile: named, in whatever group, and nothing is stepped."""

    def refused(change: Any, words: str, **options: Any) -> None:
        first, p = table(), table()
        optimizer = sk.SparseAdamW([{"params": [("a", first)]}, {"params": [("b", p)]}], 0.1, **options)
        for q in (first, p):
            q.grad = next(gradients())
        optimizer.step()
        change(optimizer, p)
        before = copy.deepcopy((first.detach(), p.detach(), optimizer.state[first], optimizer.state[p]))
        with pytest.raises(ValueError, match=words):
            optimizer.step()
        after = (first.detach(), p.detach(), optimizer.state[first], optimizer.state[p])
        for was, now in zip(before, after, strict=True):
            for a, b in zip(was.values(), now.values(), strict=True) if isinstance(was, dict) else [(was, now)]:
                assert torch.equal(a, b)

    def widen(optimizer: Any, p: nn.Parameter) -> None:
        p.data = p.data.double()
        p.grad = next(gradients(dtype=FP64))

    def lengthen(optimizer: Any, p: nn.Parameter) -> None:
        p.data = torch.cat([p.data, p.data])
        p.grad = torch.ones_like(p).to_sparse(1)

    def dense(optimizer: Any, p: nn.Parameter) -> None:
        p.grad = torch.ones_like(p)

    def option(name: str, value: Any) -> Any:
        return lambda optimizer, p: optimizer.param_groups[1].update({name: value})

    refused(widen, "'b': its state is torch.float32 on cpu, expected torch.float64")
    refused(lengthen, "'b': its state is of shape", sparse_state="all")
    refused(dense, "'b': its gradient is dense, and was sparse before")
    refused(dense, "'b': .*sparse_decay='touched'", sparse_state="all", sparse_decay="catch_up")
    refused(dense, "'b': .*correction='global'", sparse_state="all", sparse_bias_correction="row")
    refused(dense, "'b': its gradient is dense, but its moments", sparse_state="all", state_dtype=BF16)
    refused(option("amsgrad", True), "'b': .*lacks max_exp_avg_sq; these options cannot change during a run")
    refused(option("sparse_decay", "catch_up"), "lacks row_decay, decay_sum")
    refused(option("sparse_bias_correction", "row"), "lacks row_step")
    refused(option("differentiable", True), "differentiable=True is not possible")


def test_a_table_that_grew_goes_on() -> None:
    """Rows added behind: with state for the rows seen alone, nothing about the others is known or needed."""
    p = table()
    optimizer = sk.SparseAdamW([p], 0.1)
    grads = list(gradients(2))
    train(optimizer, p, iter(grads[:1]))
    p.data = torch.cat([p.data, torch.ones(5, D)])
    p.grad = torch.sparse_coo_tensor(torch.tensor([[V + 4]]), torch.ones(1, D), p.shape, check_invariants=True)
    optimizer.step()
    assert optimizer.state[p]["rows"][-1] == V + 4
    assert (p.detach()[V + 4] < 1).all()
    assert (p.detach()[V : V + 4] == 1).all()


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    embedding = nn.Embedding(V, D, sparse=True)
    optimizer = sk.SparseAdamW(embedding.parameters(), 0.1)
    embedding(torch.tensor([1])).sum().backward()
    loss = (embedding.weight[2] * embedding.weight[3]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_indices_want_dense_gradients() -> None:
    p = table()
    optimizer = sk.SparseAdamW([{"params": [p], "indices": [sk.Index(torch.tensor([1]), p.shape, granularity="row")]}])
    p.grad = torch.ones(V, D).to_sparse(1)
    with pytest.raises(ValueError, match="sparse, but it is stepped at positions of its own"):
        optimizer.step()
    assert not optimizer.state
