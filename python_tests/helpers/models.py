"""All tiny models of the tests, with random weights: one of each kind of module, and real transformers."""

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


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_SMALL = {"vocab_size": VOCABULARY, **_SPECIAL}
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


def moe() -> nn.Module:
    """Three experts in 3-D weights, two for each token; the embedding is tied to the head."""
    torch.manual_seed(1)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = transformers.Qwen3MoeConfig(**_SMALL, **_LAYERS, **heads, **experts, tie_word_embeddings=True)
    return transformers.Qwen3MoeForCausalLM(config).train()


def full_names(model: nn.Module) -> list[str]:
    """Names of all floating-point parameters, a tied one once."""
    return [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]


def batch(kind: str, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A batch in Hugging Face form that fits `transformer(kind)`."""
    tokens = ids(rows, length, seed=seed)
    labels = tokens[:, 0] % 3 if kind == "bert" else tokens.clone()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


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


def mamba(layers: int = 2, width: int = WIDTH, state: int = 4, vocabulary: int = VOCABULARY) -> nn.Module:
    """Its mixers read the weights of `conv1d` and `dt_proj` themselves: these modules never run."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "state_size": state}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, **_SPECIAL)).train()


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 6, "tie_word_embeddings": False}  # heads wider together than the model

# Every family whose blocks `structures` knows: class of the model, and its configuration.
FAMILIES = {
    "bert": ("BertModel", {**SIZES, **HEADS}),
    "roberta": ("RobertaModel", {**SIZES, **HEADS}),
    "xlm-roberta": ("XLMRobertaModel", {**SIZES, **HEADS}),
    "electra": ("ElectraModel", {**SIZES, **HEADS, "embedding_size": 8}),
    "camembert": ("CamembertModel", {**SIZES, **HEADS}),
    "distilbert": ("DistilBertModel", {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 24}),
    "opt": ("OPTForCausalLM", {**SIZES, **HEADS, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "gpt-neox": ("GPTNeoXForCausalLM", {**SIZES, **HEADS}),
    "phi3": ("Phi3ForCausalLM", {**SIZES, **GROUPED}),
    "llama": ("LlamaForCausalLM", {**SIZES, **GROUPED, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", {**SIZES, **GROUPED}),
    "qwen2": ("Qwen2ForCausalLM", {**SIZES, **GROUPED}),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, **WIDE}),
    "gemma": ("GemmaForCausalLM", {**SIZES, **WIDE}),
    "gemma2": ("Gemma2ForCausalLM", {**SIZES, **WIDE}),
    "gemma3": ("Gemma3ForCausalLM", {**SIZES, **WIDE}),
}


def family(kind: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """The model, in eval mode, every weight and bias random."""
    title, config = FAMILIES[kind]
    return random(getattr(transformers, title), {**config, **changes}, dtype)


def random(kind: type, config: dict, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = kind(kind.config_class(**_SMALL, **config)).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def t5(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return random(transformers.T5ForConditionalGeneration, config, dtype)


FEW_WORDS = 37
_BODY = {"vocab_size": FEW_WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_MLP = {**_BODY, "intermediate_size": 24}
_GPT = {"vocab_size": FEW_WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_GEMMA = {**_MLP, "num_key_value_heads": 2, "head_dim": 8}

# Models that take labels, over FEW_WORDS words.
CLASSIFIERS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_MLP, num_labels=4)),
    "albert": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**_MLP, embedding_size=8, num_labels=4)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**_MLP, num_labels=4, max_position_embeddings=32)
    ),
    "bart": lambda: transformers.BartForSequenceClassification(
        transformers.BartConfig(
            vocab_size=FEW_WORDS,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            num_labels=4,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=32,
        )
    ),
    "deberta": lambda: transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(**_MLP, num_labels=4)
    ),
}
LANGUAGE_MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT, **_SPECIAL)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_MLP, **_SPECIAL, num_key_value_heads=2)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_MLP, **_SPECIAL, tie_word_embeddings=True)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_GEMMA, **_SPECIAL)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**_GEMMA, **_SPECIAL)),
    "bert-mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_MLP)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_BODY, **_SPECIAL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **_MLP, **_SPECIAL, num_key_value_heads=2, num_local_experts=3, experts_implementation="eager"
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=FEW_WORDS, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0
        )
    ),
}
MODELS = CLASSIFIERS | LANGUAGE_MODELS
