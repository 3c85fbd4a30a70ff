"""A classifier over the mean of the token states, for models that were trained to be read that way."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

INIT_STD = 0.02  # of the new classifier's weights, as transformers initialises its heads


def is_mean_pooled(model: str) -> bool:
    """Whether a folder is a sentence-transformers model whose embeddings are means over tokens."""
    config = Path(model) / "1_Pooling" / "config.json"
    return config.is_file() and bool(json.loads(config.read_text("utf-8")).get("pooling_mode_mean_tokens"))


class MeanPooledClassifier(nn.Module):
    """encoder -> mean over the unmasked tokens -> dropout -> a new linear classifier; in and out as in transformers."""

    def __init__(self, model: str, num_labels: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(model, dtype=torch.float32)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # reads the first token alone
        self.config = self.encoder.config
        self.dropout = nn.Dropout(getattr(self.config, "hidden_dropout_prob", 0.1))
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=INIT_STD)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        logits = self.classifier(self.dropout((states * mask).sum(1) / mask.sum(1)))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
