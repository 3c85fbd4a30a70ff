"""A handful of embedding rows: eight new tokens are trained as a prompt, and nothing else of the model.

Shows how rows are selected by hand, that a tied embedding needs nothing special, and that the delta of eight rows, a
few kilobytes, fits any copy of the base to which the tokens were added the same way. The model is
SmolLM2-135M-Instruct, the text docstrings of Python's own library. `sk.methods.ks_lottery` has ways to choose rows:
`select`, `by_frequency`.

    python examples/embedding_rows.py
"""

from __future__ import annotations

from typing import Any

import torch
from offline import HELD_OUT, OUT, TRAIN, batches_of, mean_loss, smollm2
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekernels as sk

TOKENS = [f"<doc{number}>" for number in range(8)]
MEANING = "Documentation from the standard library of Python:"  # the new rows start as those of its tokens


def base() -> tuple[nn.Module, Any]:
    """The model and tokenizer with the new tokens. Rows drawn at random would fit no delta made in another process."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2())
    rows = tokenizer(MEANING)["input_ids"][: len(TOKENS)]
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    table = model.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
    with torch.no_grad():
        table[-len(TOKENS) :] = table[rows]
    return model, tokenizer


def main(steps: int = 24) -> dict[str, Any]:
    model, tokenizer = base()
    prefix = "".join(TOKENS)
    plain = mean_loss(model, batches_of(tokenizer, HELD_OUT, 4))
    train = batches_of(tokenizer, TRAIN, steps, prefix=prefix)
    held_out = batches_of(tokenizer, HELD_OUT, 4, prefix=prefix)

    name, table = "model.embed_tokens.weight", model.get_input_embeddings().weight
    rows = torch.tensor(tokenizer.convert_tokens_to_ids(TOKENS))
    selection = sk.Selection({name: sk.Index(rows, table.shape, granularity="row")})
    print(selection.summary())

    before = mean_loss(model, held_out)
    tuned = sk.train_only(model, selection)
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=1e-2, weight_decay=0)
    for batch in train:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = mean_loss(model, held_out)
    print(f"loss on held-out docstrings: {plain:.3f} without the prompt, {before:.3f} before, {after:.3f} after")

    path = OUT / "embedding_rows.safetensors"
    tuned.delta().save(path)
    fresh, _ = base()
    sk.Delta.load(path).apply(fresh)
    equal = all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True)
    )
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes; a fresh copy becomes the trained model{'' if equal else ' NOT'} bit for bit")
    return {"plain": plain, "before": before, "after": after, "equal": equal, "bytes": size, "rows": len(rows)}


if __name__ == "__main__":
    main()
