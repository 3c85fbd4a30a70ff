"""What tests of LASER share: models, and what a model holds."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor, nn

from sparsekernels.nn.low_rank import LowRankLinear


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, x in before.items():
        assert torch.equal(x, after[name]), name


def best(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Every matrix of the model, dense, wherever it is stored."""
    dense = copy.deepcopy(model)
    for parent in list(dense.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LowRankLinear):
                parent._modules[name] = child.to_linear()
    return {name: p.detach() for name, p in dense.named_parameters()}


def wide_bert() -> nn.Module:
    """Wide enough for the randomised method."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=61, **sizes, num_labels=3))


class Shared(nn.Module):
    """Two Linears of one weight with biases of their own, one of them registered twice; hooks on a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hooked = (nn.Linear(12, 12) for _ in range(3))
        self.b.weight = self.a.weight
        self.again = nn.ModuleList([self.a])
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.hooked(self.again[0](self.b(self.a(x))))
