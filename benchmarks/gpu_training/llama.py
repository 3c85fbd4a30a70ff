"""Llama models of known shapes with random weights, batches of random tokens, and the loss of all contenders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..timing import DEVICE

CHUNK = 512  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def kv(self) -> int:
        """Columns of all keys, or of all values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(M, N) of each projection of attention and MLP, in all layers."""
        attention = [(self.hidden, self.hidden), (self.kv, self.hidden), (self.kv, self.hidden)]
        mlp = [(self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate)]
        return [*attention, (self.hidden, self.hidden), *mlp] * self.layers

    @property
    def projections(self) -> int:
        """Elements of all projections."""
        return sum(m * n for m, n in self.matrices)

    @property
    def table(self) -> int:
        """Elements of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """Elements of all parameters: projections, embedding, head, norms."""
        return self.projections + (1 if self.tied else 2) * self.table + (2 * self.layers + 1) * self.hidden


LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, heads=32, kv_heads=8, vocab=128_256, tied=True)
LLAMA_7B = Shape("Llama-2-7B", 4096, 11_008, 32, heads=32, kv_heads=32, vocab=32_000, tied=False)
SMALL = Shape("tiny Llama", 64, 96, 2, heads=4, kv_heads=2, vocab=500, tied=True)


def make_model(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A causal language model with the same random weights each time, made where it will run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def make_batches(shape: Shape, count: int, size: int, length: int) -> list[dict[str, Tensor]]:
    """Batches of `size` samples of `length` random tokens, each token a label as well."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(shape.vocab, (size, length), generator=generator).to(DEVICE) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def causal_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the next tokens, as the model computes it, without the logits of all tokens."""
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
    weight = model.lm_head.weight
    if torch.is_autocast_enabled(DEVICE.type):
        dtype = torch.get_autocast_dtype(DEVICE.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(DEVICE.type, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, batch["labels"][:, 1:].flatten())
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(hidden @ weight.T, targets), CHUNK tokens at a time; backward may run once.

    Gradients are made by forward, while a chunk's logits are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK):
            some, target = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            logits = (some @ weight.T).to(wide)
            normalizer = logits.logsumexp(1, keepdim=True)
            total += (normalizer - logits.gather(1, target)).sum()
            grad = logits.sub_(normalizer).exp_().scatter_add_(1, target, -torch.ones_like(normalizer))
            grad = grad.div_(len(hidden)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + CHUNK])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, some)
        ctx.grads = grad_hidden, grad_weight
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.grads = ctx.grads, None  # or they would be copied
        return *(None if x is None else x.mul_(grads[0].to(x.dtype)) for x in found), None
