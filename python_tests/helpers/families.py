"""A tiny random model of every family whose blocks `structures` knows, and of some that it does not."""

import torch
import transformers
from models import VOCABULARY, ids
from torch import Tensor, nn

IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 6, "tie_word_embeddings": False}  # heads wider together than the model

# Class of the model, and its configuration.
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
    model = kind(kind.config_class(**IDS, **config)).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def t5(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return random(transformers.T5ForConditionalGeneration, config, dtype)


def linears(model: nn.Module) -> list[str]:
    """Names of the projections in the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    ]


def size(module: nn.Module) -> tuple[int, int]:
    """(M, N)"""
    return tuple(module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1])


def outputs(model: nn.Module) -> Tensor:
    """Of some tokens, of which a few are masked."""
    tokens = ids(3, 7)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    extra = {"labels": tokens} if "T5" in type(model).__name__ else {}
    out = model(input_ids=tokens, attention_mask=mask, **extra)
    return (out.logits if "logits" in out else out.last_hidden_state)[mask.bool()]
