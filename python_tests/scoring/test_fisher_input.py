"""Fisher information: what is left behind, which losses are known, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fishing import QUIET, assert_close, fisher, model, one, ragged
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection, fisher_diagonal
from sparsekernels.scoring.losses import _over_tokens

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


def mean(net: nn.Module, batch: Any) -> Tensor:
    return net(**batch).loss


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"loss": mean}, r'loss must return one value per sample, shape \[5\], got \[\].*reduction="none"'),
        ({"labels": None}, {}, "no loss for them; add labels"),
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
    mixed = model("bert")
    mixed.classifier.double()
    with pytest.raises(ValueError, match="on several devices, or partly fp64"):
        fisher_diagonal(mixed, [batch], **QUIET)
    gpt = model("gpt2")
    tied = Selection({n: Index(torch.tensor([1]), (37, 16)) for n in ("transformer.wte.weight", "lm_head.weight")})
    with pytest.raises(ValueError, match="are one tied parameter"):
        fisher_diagonal(gpt, [ragged("gpt2")], selection=tied, **QUIET)
    with sk.train_only(net, chosen), pytest.raises(ValueError, match="trains a selection"):
        fisher_diagonal(net, [batch], **QUIET)


class TiedScores(nn.Module):
    """Token classification whose first sample cannot tell shifted labels from others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classifier = nn.Embedding(37, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import TokenClassifierOutput

        logits = self.classifier(self.embed(input_ids))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


def test_whether_labels_are_shifted_is_found_from_samples_that_tell() -> None:
    net = TiedScores()
    same = {"input_ids": torch.full((1, 6), 5), "labels": torch.ones(1, 6, dtype=torch.long)}
    telling = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 4]]), "labels": torch.tensor([[0, 1, 2, 0, 1, 1]])}
    both = {key: torch.cat([same[key], telling[key]]) for key in same}
    twin, grads = copy.deepcopy(net).double(), []
    for b in range(2):
        twin.zero_grad()
        twin(**one(both, b)).loss.backward()
        grads.append({name: p.grad.clone() for name, p in twin.named_parameters()})
    assert_close(fisher_diagonal(net, [both], **QUIET), fisher(grads))
    with pytest.raises(ValueError, match="shifted by one token; pass loss"):
        fisher_diagonal(net, [same, telling], **QUIET)


def test_a_label_on_the_first_token_alone() -> None:
    net = TiedScores()
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[2, -100, -100]])}
    assert fisher_diagonal(net, [batch], **QUIET)["classifier.bias"].all()


@pytest.mark.parametrize("seed", range(6))
def test_half_precision_models_have_their_loss_known(seed: int) -> None:
    fisher_diagonal(model("bert", seed).bfloat16(), [ragged("bert", seed=seed)], names="classifier.*", **QUIET)


def test_other_terms_in_the_loss_are_noticed() -> None:
    net = model("mixtral")
    net.config.output_router_logits = True
    net.config.router_aux_loss_coef = net.router_aux_loss_coef = 0.001
    with pytest.raises(ValueError, match="the model's own loss on one sample is"):
        fisher_diagonal(net, [ragged("mixtral")], **QUIET)


def test_a_loss_without_gradients_is_refused() -> None:
    net, batch = model("bert"), ragged("bert")
    detached = lambda net, b: net(**b).logits.sum(1).detach()  # noqa: E731
    with pytest.raises(ValueError, match="no gradient of it reaches any of the chosen parameters"):
        fisher_diagonal(net, [batch], loss=detached, **QUIET)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        fisher_diagonal(net, [batch], **QUIET)


def test_a_batch_encoding_and_lists_in_it() -> None:
    from transformers import BatchEncoding

    net, batch = model("bert"), ragged("bert")
    expected = fisher_diagonal(net, [batch], **QUIET)
    assert_close(fisher_diagonal(net, [BatchEncoding(batch)], **QUIET), {n: x.double() for n, x in expected.items()})
    ignored = {**batch, "labels": torch.tensor([1, 2, -100, 0, 0])}
    with pytest.raises(ValueError, match="sample 2 of a batch has the label -100"):
        fisher_diagonal(net, [ignored], **QUIET)


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


def test_the_loss_of_a_large_vocabulary_is_the_models_own() -> None:
    """Many small terms beside a large one: summed one by one, they are lost."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 4, 200_000, generator=generator) - 18.5
    logits[:, :, 0] = 0
    labels = torch.randint(0, 200_000, (2, 4), generator=generator)
    found = _over_tokens(logits, labels, True)
    for b in range(2):
        own = torch.nn.functional.cross_entropy(logits[b, :-1], labels[b, 1:])
        assert float(found[b]) == pytest.approx(float(own), rel=1e-6)
