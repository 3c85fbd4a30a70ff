"""Fisher information and per-sample norms against a loop over single samples in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fishing import QUIET, SLOW, assert_close, fisher, fisher_and_norms, gradients, model, norms, one, ragged, silently
from models import CLASSIFIERS, MODELS, ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsekernels import fisher_diagonal


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_loop_over_single_samples(kind: str) -> None:
    net, batches = model(kind), [ragged(kind), ragged(kind, (3, 5), seed=1)]
    grads = gradients(net, batches)
    if kind in SLOW:
        with pytest.warns(RuntimeWarning, match=SLOW[kind]):
            found, lengths = fisher_and_norms(net, batches, **QUIET)
    else:
        found, lengths = silently(fisher_and_norms, net, batches)
    assert_close(found, fisher(grads))
    assert torch.allclose(lengths.double(), norms(grads), rtol=1e-5)
    assert all(total.dtype == torch.float32 for total in found.values())


@pytest.mark.compatibility("torch", "gradient checkpointing under `fisher_diagonal` (`use_reentrant=False`)", "works")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "llama-tied"])
def test_gradient_checkpointing(kind: str) -> None:
    """Right, in eval mode inside, and a layer does run once more in backward."""
    net, batches = model(kind), [ragged(kind)]
    expected = fisher(gradients(net, batches))
    net.gradient_checkpointing_enable({"use_reentrant": False})
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    modes: list[bool] = []
    inner = [m for m in net.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"][1]
    layer = next(m for m in net.modules() if getattr(m, "gradient_checkpointing", False) and inner in set(m.modules()))
    inner.register_forward_hook(lambda *_: modes.append(layer.training))
    assert_close(fisher_diagonal(net, batches, **QUIET), expected)
    assert len(modes) == 5  # one sample without gradients, the check twice, the batch twice
    assert modes[1:] == [False] * 4
    assert layer.training
    assert getattr(net.config, "use_cache", True)


class Segments(nn.Module):
    """One Linear in three checkpointed segments, as a plain torch user would write it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.embed, self.linear, self.reentrant = nn.Embedding(61, 8), nn.Linear(8, 8), reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = torch.utils.checkpoint.checkpoint(lambda x: self.linear(x).tanh(), x, use_reentrant=self.reentrant)
        return x.square().sum((1, 2))


def test_a_weight_shared_by_checkpointed_segments() -> None:
    net, tokens = Segments(False), ids(5, 7)
    twin, grads = copy.deepcopy(net).double(), []
    for b in range(5):
        found = torch.autograd.grad(twin(tokens[b : b + 1]).sum(), list(twin.parameters()))
        grads.append(dict(zip((name for name, _ in twin.named_parameters()), found, strict=True)))

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["input_ids"])

    assert_close(silently(fisher_diagonal, net, [{"input_ids": tokens}], loss=loss), fisher(grads))
    for names in ("*", "linear.*"):
        with pytest.raises(ValueError, match="pass use_reentrant=False"):
            fisher_diagonal(Segments(True), [{"input_ids": tokens}], loss=loss, names=names, **QUIET)


def test_checkpointing_frees_what_the_hooks_saw() -> None:
    """Inputs are held the way autograd holds them: recomputed, not kept."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(24))
            self.checkpointing = False

        def forward(self, x: Tensor) -> Tensor:
            for pair in zip(self.layers[::2], self.layers[1::2], strict=True):
                run = lambda x, pair=pair: pair[1](pair[0](x).tanh()).tanh()  # noqa: E731
                x = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if self.checkpointing else run(x)
            return x.square().sum((1, 2))

    net, batch = Deep(), {"x": torch.randn(4, 1000, 64)}

    def held() -> int:
        kept = []

        def loss(net: nn.Module, batch: Any) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage()) or x, lambda x: x):
                return net(batch["x"])

        fisher_diagonal(net, [batch], loss=loss, **QUIET)
        return sum({s.data_ptr(): s.nbytes() for s in kept}.values())

    plain = held()
    net.checkpointing = True
    assert held() < 0.7 * plain


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_batching_changes_nothing(kind: str) -> None:
    net, batch = model(kind), ragged(kind, (9, 4, 9, 3, 7, 2))
    whole, lengths = fisher_and_norms(net, [batch], **QUIET)
    for size in (1, 4):
        parts = [{key: x[i : i + size] for key, x in batch.items()} for i in range(0, 6, size)]
        found, found_lengths = fisher_and_norms(net, parts, **QUIET)
        assert_close(found, {name: total.double() for name, total in whole.items()})
        assert torch.allclose(found_lengths, lengths, rtol=1e-5)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_expected_labels(kind: str) -> None:
    net, batch = model(kind), ragged(kind)
    twin: Any = copy.deepcopy(net).double().eval()
    expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for b in range(len(batch["labels"])):
        for y in range(4):
            inputs = {key: x for key, x in one(batch, b).items() if key != "labels"}
            log_p = twin(**inputs).logits.log_softmax(-1)[0]
            weight = log_p[y].exp().detach()
            for name, grad in zip(
                expected, torch.autograd.grad(log_p[y], twin.parameters(), allow_unused=True), strict=True
            ):
                expected[name] += 0 if grad is None else weight * grad.square()
    without = {key: x for key, x in batch.items() if key != "labels"}
    for samples in (batch, without):
        assert_close(fisher_diagonal(net, [samples], labels="expected", **QUIET), expected)


def test_regression_and_several_labels() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    small = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for labels in (torch.randn(5), torch.rand(5, 4).round()):
        net = BertForSequenceClassification(BertConfig(**small, num_labels=1 if labels.dim() == 1 else 4))
        batch = {**ragged("bert"), "labels": labels}
        doubled = {**batch, "labels": labels.double()}
        assert_close(fisher_diagonal(net, [batch], **QUIET), fisher(gradients(net, [doubled])))


# ---- precision, memory


def test_double_precision_is_kept() -> None:
    net, batch = model("bert").double(), ragged("bert")
    assert_close(silently(fisher_diagonal, net, [batch]), fisher(gradients(net, [batch])), 1e-12)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_half_precision_adds_up_in_fp32(kind: str) -> None:
    net, batches = model(kind).bfloat16(), [ragged(kind)] * 3
    expected = fisher(gradients(net, batches))
    found = silently(fisher_diagonal, net, batches)
    assert all(total.dtype == torch.float32 for total in found.values())
    total = torch.cat([x.flatten() for x in found.values()]).double()
    true = torch.cat([x.flatten() for x in expected.values()])
    assert float((total - true).norm() / true.norm()) < 0.05


def test_autocast() -> None:
    net, batch = model("bert"), ragged("bert")
    exact = fisher_diagonal(net, [batch], **QUIET)
    with torch.autocast("cpu", torch.bfloat16):
        found = silently(fisher_diagonal, net, [batch])
    total, true = (torch.cat([x.flatten() for x in f.values()]) for f in (found, exact))
    assert 0 < float((total - true).norm() / true.norm()) < 0.05


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_no_per_sample_gradient_ever_exists() -> None:
    """8 samples, a weight of 400 x 300: nothing larger than the weight itself is made."""
    net = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 1))
    batch = {"x": torch.randn(8, 20, 300)}
    with Largest() as made:
        fisher_diagonal(net, [batch], loss=lambda net, b: net(b["x"]).square().sum((1, 2)), **QUIET)
    assert made.elements <= 400 * 300
