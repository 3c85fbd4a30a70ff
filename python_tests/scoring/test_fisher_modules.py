"""Fisher information: modules that are used in unusual ways are right, and are not slow without need."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fishing import QUIET, assert_close, fisher, fisher_and_norms, gradients, model, norms, ragged, silently
from models import FEW_WORDS, Zoo, ids, mamba
from torch import Tensor, nn

import sparsekernels as sk
from sparsekernels import Index, Selection, fisher_diagonal, squared_gradient_norms

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
    with pytest.warns(
        RuntimeWarning, match=r"1 parameters take one backward per sample.*experts.weight \(Experts"
    ) as said:
        found = fisher_diagonal(net, [{"ids": tokens}], loss=zoo_loss, **QUIET)
    assert_close(found, fisher(zoo_gradients(net, tokens)))
    assert not found["embed.weight"][3].any()  # its padding_idx
    assert said[0].filename == __file__


def test_the_padding_row_of_a_tied_embedding() -> None:
    """Its lookups do not count, its scores do; here with tokens that are the padding id and not masked."""
    net, batch = model("llama-tied"), ragged("llama-tied")
    batch["input_ids"][0, 2:5] = batch["input_ids"][2, 3] = 0
    assert net.model.embed_tokens.padding_idx == 0
    assert_close(fisher_diagonal(net, [batch], **QUIET), fisher(gradients(net, [batch])))


def test_a_parameter_that_nothing_uses() -> None:
    net, tokens = Reused("nothing"), ids(5, 7)
    net.spare = nn.Parameter(torch.ones(3))
    with pytest.warns(RuntimeWarning, match=r"spare \(Reused"):
        found = fisher_diagonal(net, [{"input_ids": tokens}], loss=squares, **QUIET)
    assert_close(found, fisher(each(net, tokens)))
    assert not found["spare"].any()


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_stay_dense_or_sparse(sparse: bool) -> None:
    net, tokens = Reused("nothing"), ids(5, 7)
    expected = fisher(each(net, tokens))
    tables = [module for module in net.modules() if isinstance(module, nn.Embedding)]
    for table in tables:
        table.sparse = sparse
    assert_close(silently(fisher_diagonal, net, [{"input_ids": tokens}], loss=squares), expected)
    assert len(tables) == 2
    assert all(table.sparse is sparse for table in tables)


def test_a_hook_on_a_table_sees_what_it_always_sees() -> None:
    net, tokens = Reused("nothing"), ids(5, 7)
    seen: list[Tensor] = []

    def only_new_rows(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[:3] = 0
        seen.append(grad)
        return grad

    handle = net.embed.weight.register_hook(only_new_rows)
    expected = fisher(each(net, tokens))
    with pytest.warns(RuntimeWarning, match="embed.weight"):  # whose gradient is not all that autograd would give
        fisher_diagonal(net, [{"input_ids": tokens}], loss=squares, **QUIET)
    assert seen
    handle.remove()
    assert_close(silently(fisher_diagonal, net, [{"input_ids": tokens}], loss=squares), expected)


def test_an_empty_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="selection is empty"):
        fisher_diagonal(Reused("nothing"), [{"input_ids": ids(2, 7)}], loss=squares, selection=Selection({}), **QUIET)


def test_part_of_a_model_in_another_precision() -> None:
    net, tokens = Reused("nothing"), ids(5, 7)
    net.last.double()
    net.last.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    found = fisher_diagonal(net, [{"input_ids": tokens}], loss=squares, names="last.*", **QUIET)
    expected = fisher(each(net, tokens))
    assert found["last.weight"].dtype == torch.float64
    assert_close(found, {name: expected[name] for name in found})


def test_selection() -> None:
    """Elements, rows, the same numbers as in the whole; norms count the selected positions alone."""
    net, tokens = Zoo(), ids(6, 7)
    grads = zoo_gradients(net, tokens)
    names = [name for name in grads[0] if name != "down.weight"]
    chosen = Selection.random(net, 0.2, names=names) | Selection(
        {"down.weight": Index(torch.tensor([0, 3, 15]), net.down.weight.shape, granularity="row")}
    )
    with pytest.warns(RuntimeWarning):
        found, lengths = fisher_and_norms(net, [{"ids": tokens}], loss=zoo_loss, selection=chosen, **QUIET)
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


def squares(net: nn.Module, batch: Any) -> Tensor:
    return net(batch["input_ids"]).square().sum(1)


def each(net: nn.Module, tokens: Tensor, loss: Any = squares) -> list[dict[str, Tensor]]:
    """The gradient of every row of tokens alone, in fp64."""
    twin, grads = copy.deepcopy(net).double(), []
    for b in range(len(tokens)):
        term = loss(twin, {"input_ids": tokens[b : b + 1]}).sum()
        found = torch.autograd.grad(term, list(twin.parameters()), allow_unused=True)
        pairs = zip(twin.named_parameters(), found, strict=True)
        grads.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})
    return grads


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

    grads = each(net, tokens)
    if slow:
        with pytest.warns(RuntimeWarning, match=slow):
            found = fisher_diagonal(net, [batch], loss=squares, **QUIET)
    else:
        found = silently(fisher_diagonal, net, [batch], loss=squares)
    assert_close(found, fisher(grads))


def assert_each_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """By the norm of each tensor itself, however small beside the others."""
    for name, x in expected.items():
        assert float((found[name].double() - x).norm()) <= 1e-4 * float(x.norm()), name


class Faint(Reused):
    """A branch whose gradients are a millionth of the others'."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.how == "outside its module":
            y = nn.functional.linear(x, self.linear.weight, self.linear.bias)
        elif self.how == "by both":
            y = self.linear(x) + nn.functional.linear(x, self.linear.weight)
        else:
            y = self.linear(x).add_(1).relu_()
        return self.last((x + 1e-6 * y).tanh().mean(1))


@pytest.mark.parametrize("how", ["outside its module", "by both", "in place"])
def test_a_small_gradient_is_right_too(how: str) -> None:
    net, tokens = Faint(how), ids(5, 7)
    with pytest.warns(RuntimeWarning, match="linear.weight"):
        found = fisher_diagonal(net, [{"input_ids": tokens}], loss=squares, names=["linear.*", "last.*"], **QUIET)
    expected = fisher(each(net, tokens))
    assert_each_close(found, {name: expected[name] for name in found})


def test_a_mixer_that_reads_the_weights_of_its_modules() -> None:
    """Mamba's dt_proj has gradients that are a millionth of the largest, and its forward is never run."""
    net, batch = mamba(vocabulary=FEW_WORDS), ragged("gpt2", (9, 9, 9))
    with pytest.warns(RuntimeWarning, match=r"12 parameters take one backward per sample"):
        found = fisher_diagonal(net, [batch], **QUIET)
    assert_each_close(found, fisher(gradients(net, [batch])))


def test_as_many_tokens_as_samples_do_not_deceive() -> None:
    """[tokens, samples] with both 5: the shape fits, the layout does not."""
    net, tokens = Reused("tokens first"), ids(5, 5)

    with pytest.warns(RuntimeWarning, match="linear.weight"):
        found = fisher_diagonal(net, [{"input_ids": tokens}], loss=squares, **QUIET)
    assert_close(found, fisher(each(net, tokens)))


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

    grads = each(net, torch.cat([first, second]))
    with pytest.warns(RuntimeWarning, match="expert.weight"):
        found, lengths = fisher_and_norms(net, [{"input_ids": first}, {"input_ids": second}], loss=squares, **QUIET)
    assert_close(found, fisher(grads))
    assert torch.allclose(lengths.double(), norms(grads), rtol=1e-5)


class Moved(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


class Transposed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.t(), self.bias)


def test_subclasses_with_a_forward_of_their_own() -> None:
    """Norms cannot tell moved rows, nor a transposed weight."""
    net, tokens = Reused("nothing"), ids(5, 7)
    net.embed, net.linear, net.how = Moved(70, 8), Transposed(8, 8), "in place"

    grads = each(net, tokens)
    with pytest.warns(RuntimeWarning, match="Moved"):
        found = fisher_diagonal(net, [{"input_ids": tokens}], loss=squares, **QUIET)
    assert_close(found, fisher(grads))


def test_an_expert_that_the_checked_sample_does_not_reach() -> None:
    """The sample has no multiple of five; a later batch routes as many tokens as it has samples."""
    net, first, second = Routed(), torch.tensor([[1, 2, 3]] * 3), torch.tensor([[5, 10, 2], [3, 15, 4], [1, 2, 6]])

    grads = each(net, torch.cat([first, second]))
    with pytest.warns(RuntimeWarning, match="expert.weight"):
        found = fisher_diagonal(net, [{"input_ids": first}, {"input_ids": second}], loss=squares, **QUIET)
    assert_close(found, fisher(grads))


class Rigid(nn.Module):
    """Repeats its positions itself: they must come as one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(61, 8), nn.Embedding(7, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        place = self.positions(torch.arange(tokens.shape[1])[None]).repeat(len(tokens), 1, 1)
        return (self.embed(tokens) + place).tanh().sum((1, 2))


def test_positions_that_must_stay_one_row() -> None:
    net, tokens = Rigid(), ids(5, 7)
    grads = each(net, tokens, loss=lambda net, b: net(b["input_ids"]))
    with pytest.warns(RuntimeWarning, match="positions.weight"):
        found = fisher_diagonal(net, [{"input_ids": tokens}], loss=lambda net, b: net(b["input_ids"]), **QUIET)
    assert_close(found, fisher(grads))


def test_the_sample_with_a_broken_gradient_is_named() -> None:
    net, good, bad = Zoo(), ids(3, 4), ids(3, 4, seed=1)
    bad[2, 1] = 60
    with torch.no_grad():
        net.embed.weight[60] = float("inf")
    samples = [{"ids": good}, {"ids": bad}]
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="sample 2 in batch 1 is not finite"):
        fisher_diagonal(net, samples, loss=zoo_loss, **QUIET)
