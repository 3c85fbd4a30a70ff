"""Small models with random weights: every kind of module that holds a weight, and tiny real transformers."""

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY, WIDTH = 61, 16


class Experts(nn.Module):
    """A mixture of experts with one 3-D weight, every token through every expert."""

    def __init__(self, experts: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...d,edf->...f", x, self.weight).tanh()


class Zoo(nn.Module):
    """Token ids in, class scores out, through one module of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.conv = Conv1D(WIDTH, WIDTH)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, 5)
        self.register_buffer("scale", torch.ones(()))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.conv.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = x + self.down(self.up(x).tanh())
        x = x + self.conv(x) + self.experts(x) * self.scale
        return self.head(x.mean(1) if x.dim() == 3 else x)


def ids(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Token ids with many duplicates, the padding id of `Zoo` among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY // 3, shape, generator=generator).to(device)


_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_LAYERS = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "max_position_embeddings": 32}
TRANSFORMERS = ("bert", "bert-mlm", "gpt2", "llama")


def transformer(kind: str) -> nn.Module:
    """A tiny model of TRANSFORMERS without dropout, in train mode; all but "bert" tie their embeddings to the head."""
    torch.manual_seed(1)
    if kind.startswith("bert"):
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**_SMALL, **_LAYERS, **quiet, num_attention_heads=2, num_labels=3)
        cls = transformers.BertForMaskedLM if kind == "bert-mlm" else transformers.BertForSequenceClassification
    elif kind == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**_SMALL, **quiet, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32)
        cls = transformers.GPT2LMHeadModel
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(**_SMALL, **_LAYERS, **heads, tie_word_embeddings=True)
        cls = transformers.LlamaForCausalLM
    return cls(config).train()


def full_names(model: nn.Module) -> list[str]:
    """Names of all floating-point parameters, a tied one once."""
    return [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]


def batch(kind: str, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A batch in Hugging Face form that fits `transformer(kind)`."""
    tokens = ids(rows, length, seed=seed)
    labels = tokens[:, 0] % 3 if kind == "bert" else tokens.clone()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
