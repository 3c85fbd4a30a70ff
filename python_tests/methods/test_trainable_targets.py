"""Weights that are used outside the forward of their module: no method selects what train_only could not train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TRANSFORMERS, Experts, batch, ids, mamba, transformer
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels.methods import fish, ird, sift

QUIET = {"progress": False}
OUTSIDE = ["conv1d", "dt_proj"]  # of a Mamba mixer, which reads their weights itself


def texts(seed: int = 0) -> dict[str, Tensor]:
    tokens = ids(3, 7, seed=seed)
    return {"input_ids": tokens, "labels": tokens}


def assert_all_train(model: nn.Module, selection: sk.Selection, loss: Callable[[nn.Module], Tensor]) -> None:
    with sk.train_only(model, selection) as tuned:
        loss(model).backward()
        assert all(p.grad is not None for p in tuned.parameters())


@pytest.mark.parametrize("method", [sift, fish, ird])
@pytest.mark.parametrize("count", [1, 2])
def test_default_targets_leave_out_what_a_mixer_reads(method: Any, count: int) -> None:
    model, batches = mamba(), [texts(seed) for seed in range(count)]
    more = {"num_batches": count} if method is sift else {}
    with pytest.warns(RuntimeWarning, match=rf"{method.__name__} leaves out .*conv1d\.weight.*outside") as said:
        found = method(model, batches, 0.9, **more, **QUIET)
    assert said[0].filename == __file__
    expected = [n for n, p in model.named_parameters() if any(part in n for part in OUTSIDE)]
    if method is sift:
        expected = [name for name in expected if name.endswith("weight")]
    assert found.report["left_out"] == expected
    assert not set(found) & set(expected)
    assert any("x_proj" in name for name in found)
    assert_all_train(model, found, lambda model: model(**batches[0]).loss)


@pytest.mark.parametrize("method", [sift, fish, ird])
def test_targets_that_are_named_are_refused(method: Any) -> None:
    model = mamba()
    with pytest.raises(ValueError, match=r"targets: .*0\.mixer\.dt_proj\.weight.*cannot be trained.*leave them out"):
        method(model, [texts()], 0.05, targets=["*.dt_proj.weight", "*.x_proj.weight"], **QUIET)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    found = method(model, [texts()], 0.05, targets="*.x_proj.weight", **QUIET)
    assert found.report["left_out"] == []


class Gain(nn.Module):
    """Reads its weight where no attribute is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self._parameters["weight"]


class Uses(nn.Module):
    """A weight of each kind, used as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.embed, self.up, self.last = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts, self.norm = Experts(width=8), nn.LayerNorm(8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        if how == "tied":
            self.last.weight = self.up.weight
        elif how == "past its attribute":
            self.gain = Gain()
        elif how == "weight norm":
            nn.utils.parametrizations.weight_norm(self.up)
        elif how == "hooked":
            self.up.forward = self.up.forward  # as accelerate does

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        x = x + self.rnn(x)[0] + self.attention(x, x, x)[0] + self.experts(x)
        if self.how == "its forward, called as such":
            x = self.up.forward(x)
        elif self.how == "read by the parent":
            x = F.linear(x, self.up.weight, self.up.bias)
        elif self.how == "past its attribute":
            x = self.up(x) * self.gain(x)
        elif self.how == "by both":
            x = self.up(x) @ self.up.weight
        elif self.how == "of a norm":
            x = self.up(x) * self.norm.weight
        elif self.how.startswith("checkpointed"):
            x = torch.utils.checkpoint.checkpoint(
                lambda x: x @ self.up.weight if "reads" in self.how else self.up(x),
                x,
                use_reentrant="reentrant" in self.how,
            )
        else:
            x = self.up(x)
        return self.last(x)


def squares(model: nn.Module, tokens: Tensor) -> Tensor:
    value = model(tokens).square().sum()
    if model.how == "decayed by the loss":
        value = value + model.up.weight.square().sum()
    return value


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize(
    ("how", "outside"),
    [
        ("plainly", []),
        ("tied", []),
        ("weight norm", []),
        ("hooked", []),
        ("its forward, called as such", []),
        ("read by the parent", ["up.bias", "up.weight"]),
        ("past its attribute", ["gain.weight"]),
        ("by both", ["up.weight"]),
        ("of a norm", ["norm.weight"]),
        ("decayed by the loss", ["up.weight"]),
        ("checkpointed", []),
        ("checkpointed, the parent reads", ["up.weight"]),
        ("checkpointed, reentrant", []),
        ("checkpointed, reentrant, the parent reads", ["up.weight"]),
    ],
)
def test_every_use_is_told(how: str, outside: list[str], num_batches: int) -> None:
    """Also that MultiheadAttention reads the weight of its out_proj, and what it and an LSTM read is their own."""
    model, batches = Uses(how), [ids(4, 7, seed=seed) for seed in range(num_batches)]
    unused = ["up.bias"] if "checkpointed" in how and "reads" in how else []
    names = [name for name, _ in model.named_parameters() if name not in unused]
    outside = sorted([*outside, "attention.out_proj.weight", "attention.out_proj.bias"])
    targets = [name for name in names if name not in outside]
    more = {"head": (), "loss": squares, "num_batches": num_batches, **QUIET}
    for wrong in outside:
        with pytest.raises(ValueError, match=wrong.replace(".", r"\.") + " cannot be trained"):
            sift(model, batches, targets=[wrong, "embed.weight"], **more)
    found = sift(model, batches, targets=targets, **more)
    assert list(found) == targets
    assert all("forward" not in m.__dict__ or how == "hooked" for m in model.modules())
    assert_all_train(model, found, lambda model: squares(model, batches[0]))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_nothing_is_left_out_without_need(kind: str) -> None:
    """Tied embeddings, fused projections: all of a transformer trains."""
    model = transformer(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        whole = sift(model, [batch(kind)], targets="*", head=(), **QUIET)
        assert fish(model, [batch(kind)], 1.0, head=(), **QUIET).report["left_out"] == []
    assert list(whole) == [name for name, _ in model.named_parameters()]


class Interrupted(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", [sift, fish])
def test_an_interrupt_leaves_every_parameter_where_it_was(method: Any) -> None:
    """Inside the forward of a module, where torch runs no hooks any more."""
    model = Uses("plainly")
    before = {name: id(p) for name, p in model.named_parameters()}
    model.norm.__class__ = Interrupted
    loss = lambda m, b: m(b["input_ids"]).sum((1, 2))  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        method(model, [{"input_ids": ids(2, 5)}], 0.5, loss=loss, targets="*", head=(), **QUIET)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())


def test_a_compiled_model_is_told_apart_too() -> None:
    """Its graph as a whole reads every weight; so it runs uncompiled, and compiled again afterwards."""
    model = transformer("bert")
    expected = sift(model, [batch("bert")], **QUIET)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    found = sift(compiled, [batch("bert")], **QUIET)
    assert {name.removeprefix("_orig_mod."): index for name, index in found.items()} == dict(expected)
    assert not graphs
    compiled(**batch("bert"))
    assert graphs
