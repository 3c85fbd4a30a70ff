"""Fisher information and per-sample norms against a loop over single samples in fp64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from fishing import CLASSIFIERS, MODELS, SLOW, assert_close, fisher, gradients, model, norms, one, ragged
from models import Zoo, ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsekernels as sk
from sparsekernels import Index, Selection, fisher_diagonal, squared_gradient_norms

QUIET = {"progress": False}


def silently(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The result, with no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return function(*args, **kwargs, **QUIET)


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_loop_over_single_samples(kind: str) -> None:
    net, batches = model(kind), [ragged(kind), ragged(kind, (3, 5), seed=1)]
    grads = gradients(net, batches)
    if kind in SLOW:
        with pytest.warns(RuntimeWarning, match=SLOW[kind]):
            found, lengths = fisher_diagonal(net, batches, return_norms=True, **QUIET)
    else:
        found, lengths = silently(fisher_diagonal, net, batches, return_norms=True)
    assert_close(found, fisher(grads))
    assert torch.allclose(lengths.double(), norms(grads), rtol=1e-5)
    assert all(total.dtype == torch.float32 for total in found.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "llama-tied"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    net, batches = model(kind), [ragged(kind)]
    expected = fisher(gradients(net, batches))
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    block = next(m for n, m in net.named_modules() if n.endswith((".0", "layer_groups.0")))
    block.register_forward_hook(lambda *_: runs.append(1))
    net.train()
    assert_close(fisher_diagonal(net, batches, **QUIET), expected)
    assert len(runs) > 3  # the probe and the batch, each recomputed


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
    whole, lengths = fisher_diagonal(net, [batch], return_norms=True, **QUIET)
    for size in (1, 4):
        parts = [{key: x[i : i + size] for key, x in batch.items()} for i in range(0, 6, size)]
        found, found_lengths = fisher_diagonal(net, iter(parts), return_norms=True, **QUIET)
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


# ---- a model of many kinds of module, with a loss of its own


def zoo_loss(net: nn.Module, batch: Any) -> Tensor:
    return net(batch["ids"]).square().sum(1)


def zoo_gradients(net: nn.Module, tokens: Tensor) -> list[dict[str, Tensor]]:
    twin = copy.deepcopy(net).double().eval()
    found = []
    for b in range(len(tokens)):
        grads = torch.autograd.grad(zoo_loss(twin, {"ids": tokens[b : b + 1]}).sum(), list(twin.parameters()))
        found.append(dict(zip((name for name, _ in twin.named_parameters()), grads, strict=True)))
    return found


def test_every_kind_of_module_and_a_loss_of_ones_own() -> None:
    net, tokens = Zoo(), ids(6, 7)
    with pytest.warns(RuntimeWarning, match=r"1 parameters take one backward a sample.*experts.weight \(Experts"):
        found = fisher_diagonal(net, [{"ids": tokens}], loss=zoo_loss, **QUIET)
    assert_close(found, fisher(zoo_gradients(net, tokens)))
    assert not found["embed.weight"][3].any()  # its padding_idx


def test_selection() -> None:
    """Elements, rows, the same numbers as in the whole; norms count the selected positions alone."""
    net, tokens = Zoo(), ids(6, 7)
    grads = zoo_gradients(net, tokens)
    names = [name for name in grads[0] if name != "down.weight"]
    chosen = Selection.random(net, 0.2, names=names) | Selection(
        {"down.weight": Index(torch.tensor([0, 3, 15]), net.down.weight.shape, rows=True)}
    )
    with pytest.warns(RuntimeWarning):
        found, lengths = fisher_diagonal(
            net, [{"ids": tokens}], loss=zoo_loss, selection=chosen, return_norms=True, **QUIET
        )
    picked = [{n: sk.ops.gather(grad[n].contiguous(), chosen[n]) for n in chosen} for grad in grads]
    assert_close(found, fisher(picked))
    assert torch.allclose(lengths.double(), norms(picked), rtol=1e-5)
    with pytest.warns(RuntimeWarning):
        again = squared_gradient_norms(net, [{"ids": tokens}], loss=zoo_loss, selection=chosen, **QUIET)
    assert torch.equal(again, lengths)


def test_names() -> None:
    net = model("bert")
    found = fisher_diagonal(net, [ragged("bert")], names=["*query*", "classifier.bias"], **QUIET)
    assert len(found) == 5
    whole = fisher_diagonal(net, [ragged("bert")], **QUIET)
    assert_close(found, {name: whole[name].double() for name in found})


class Reused(nn.Module):
    """Whatever can go wrong where gradients are caught at modules."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.linear = nn.Embedding(61, 8), nn.Linear(8, 8)
        self.positions, self.last = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.how == "shared positions":
            x = x + self.positions(torch.arange(tokens.shape[1])[None])
        elif self.how == "positions of no sample":
            x = x + self.positions(torch.arange(tokens.shape[1]))
        elif self.how == "twice":
            x = self.linear(self.linear(x).tanh())
        elif self.how == "outside its module":
            x = self.linear(x) + nn.functional.linear(x, self.linear.weight)
        elif self.how == "flattened":
            x = self.linear(x.flatten(0, 1)).unflatten(0, tokens.shape)
        elif self.how == "tokens first":
            x = self.linear(x.transpose(0, 1)).transpose(0, 1)
        elif self.how == "in place":
            x = self.linear(x).add_(1).relu_()
        elif self.how == "by keyword":
            x = self.linear(input=x)
        elif self.how == "no gradient":
            x = x + 0 * self.linear(x.detach())
        return self.last(x.tanh().mean(1))


@pytest.mark.parametrize(
    ("how", "slow"),
    [
        ("shared positions", None),
        ("positions of no sample", "positions.weight"),
        ("twice", None),
        ("outside its module", "linear.weight"),
        ("flattened", None),
        ("tokens first", "linear.weight"),
        ("in place", "linear.weight"),
        ("by keyword", None),
        ("no gradient", None),
    ],
)
def test_modules_used_in_unusual_ways(how: str, slow: str | None) -> None:
    """Right in any case; and not slow where it need not be."""
    net, tokens = Reused(how), ids(5, 7)
    batch = {"input_ids": tokens}

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["input_ids"]).square().sum(1)

    twin = copy.deepcopy(net).double()
    grads = []
    for b in range(5):
        found = torch.autograd.grad(loss(twin, one(batch, b)).sum(), list(twin.parameters()), allow_unused=True)
        pairs = zip(twin.named_parameters(), found, strict=True)
        grads.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})
    if slow:
        with pytest.warns(RuntimeWarning, match=slow):
            found = fisher_diagonal(net, [batch], loss=loss, **QUIET)
    else:
        found = silently(fisher_diagonal, net, [batch], loss=loss)
    assert_close(found, fisher(grads))


def test_as_many_tokens_as_samples_do_not_deceive() -> None:
    """[tokens, samples] with both 5: the shape fits, the layout does not."""
    net, tokens = Reused("tokens first"), ids(5, 5)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["input_ids"]).square().sum(1)

    with pytest.warns(RuntimeWarning, match="linear.weight"):
        found = fisher_diagonal(net, [{"input_ids": tokens}], loss=loss, **QUIET)
    twin = copy.deepcopy(net).double()
    expected = sum(
        torch.autograd.grad(loss(twin, {"input_ids": tokens[b : b + 1]}).sum(), twin.linear.weight)[0].square()
        for b in range(5)
    )
    assert torch.allclose(found["linear.weight"].double(), expected, rtol=1e-5)


class Routed(nn.Module):
    """Experts that see only the tokens routed to them: how many depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.expert, self.last = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        chosen = tokens.remainder(5) == 0
        routed = torch.zeros_like(x).masked_scatter(chosen[..., None], self.expert(x[chosen]))
        return self.last((x + routed).tanh().mean(1))


def test_a_misfit_in_a_later_batch_starts_over() -> None:
    """The first batch routes one token of each sample, so it looks split by sample; the second does not."""
    net = Routed()
    first = torch.tensor([[5, 1, 2], [3, 10, 4], [1, 2, 15]])
    second = torch.tensor([[5, 10, 2], [3, 1, 4], [1, 2, 6]])

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["input_ids"]).square().sum(1)

    twin, grads = copy.deepcopy(net).double(), []
    for b in range(6):
        row = torch.cat([first, second])[b : b + 1]
        found = torch.autograd.grad(loss(twin, {"input_ids": row}).sum(), list(twin.parameters()))
        grads.append(dict(zip((name for name, _ in twin.named_parameters()), found, strict=True)))
    with pytest.warns(RuntimeWarning, match="expert.weight"):
        found, lengths = fisher_diagonal(
            net, [{"input_ids": first}, {"input_ids": second}], loss=loss, return_norms=True, **QUIET
        )
    assert_close(found, fisher(grads))
    assert torch.allclose(lengths.double(), norms(grads), rtol=1e-5)


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


# ---- what is left behind, and errors


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    net, batch = model("bert"), ragged("bert")
    net.bert.encoder.layer[0].eval()
    net.classifier.bias.requires_grad_(False)
    net.classifier.weight.grad = torch.ones_like(net.classifier.weight)
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    flags = [(p.requires_grad, p.grad) for p in net.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    if fails:
        with torch.no_grad():
            net.bert.encoder.layer[1].output.dense.weight[0, 0] = before_value = float("nan")
        with pytest.raises(ValueError, match="sample 0 in batch 0 is not finite"):
            fisher_diagonal(net, [batch], **QUIET, loss=lambda net, b: net(b["input_ids"]).logits.sum(1))
        assert before_value != before_value
    else:
        fisher_diagonal(net, [batch], **QUIET)
        assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(
        p.requires_grad == flag and p.grad is grad for p, (flag, grad) in zip(net.parameters(), flags, strict=True)
    )
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == hooks


def test_the_sample_with_a_broken_gradient_is_named() -> None:
    net, good, bad = Zoo(), ids(3, 4), ids(3, 4, seed=1)
    bad[2, 1] = 60
    with torch.no_grad():
        net.embed.weight[60] = float("inf")
    samples = [{"ids": good}, {"ids": bad}]
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="sample 2 in batch 1 is not finite"):
        fisher_diagonal(net, samples, loss=zoo_loss, **QUIET)


def mean(net: nn.Module, batch: Any) -> Tensor:
    return net(**batch).loss


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"loss": mean}, r'loss must return one value a sample, shape \[5\], got \[\].*reduction="none"'),
        ({"labels": None}, {}, "no loss for them; put labels in"),
        (
            {"attention_mask": torch.tensor([[1] * 9] * 4 + [[0] * 9])},
            {},
            "attention_mask of sample 4 in batch 0 is all",
        ),
        ({}, {"labels": "true"}, 'labels must be "given" or "expected"'),
        ({}, {"labels": "expected", "loss": mean}, "leave loss out"),
        ({}, {"names": "nothing.*"}, "names: no parameter matches 'nothing"),
    ],
)
def test_bad_input(change: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    batch = {key: x for key, x in {**ragged("bert"), **change}.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(model("bert"), [batch], **arguments, **QUIET)


def test_more_bad_input() -> None:
    net, batch = model("bert"), ragged("bert")
    with pytest.raises(ValueError, match="samples holds no batch"):
        fisher_diagonal(net, [], **QUIET)
    with pytest.raises(ValueError, match="batch 1 must be a mapping of tensors"):
        fisher_diagonal(net, [batch, [1, 2]], **QUIET)
    with pytest.raises(ValueError, match="batch 0 is empty"):
        fisher_diagonal(net, [{key: x[:0] for key, x in batch.items()}], **QUIET)
    lm = ragged("llama")
    lm["labels"][1] = -100
    with pytest.raises(ValueError, match="sample 1 of a batch has no labelled token"):
        fisher_diagonal(model("llama"), [lm], **QUIET)
    with pytest.raises(ValueError, match=r"needs logits \[samples, classes\]"):
        fisher_diagonal(model("llama"), [ragged("llama")], labels="expected", **QUIET)
    with pytest.raises(ValueError, match="lacks: nothing"):
        fisher_diagonal(net, [batch], selection=Selection({"nothing": Index.full((3,))}), **QUIET)
    chosen = Selection.random(net, 0.1, names=["classifier.weight"])
    with pytest.raises(ValueError, match="give either selection or names"):
        fisher_diagonal(net, [batch], selection=chosen, names="*", **QUIET)
    gpt = model("gpt2")
    tied = Selection({n: Index(torch.tensor([1]), (37, 16)) for n in ("transformer.wte.weight", "lm_head.weight")})
    with pytest.raises(ValueError, match="are one tied parameter"):
        fisher_diagonal(gpt, [ragged("gpt2")], selection=tied, **QUIET)
    with sk.sparsify(net, chosen), pytest.raises(ValueError, match="sparsified"):
        fisher_diagonal(net, [batch], **QUIET)


def test_a_loss_that_the_default_does_not_know_is_refused() -> None:
    """Label smoothing is in the model's own loss, not in ours: no silently other Fisher."""
    net = model("bert")
    plain = net.forward

    def smoothed(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        if "labels" in kwargs:
            output.loss = nn.functional.cross_entropy(output.logits, kwargs["labels"], label_smoothing=0.1)
        return output

    net.forward = smoothed
    with pytest.raises(ValueError, match="the model's own loss on one sample is"):
        fisher_diagonal(net, [ragged("bert")], **QUIET)
