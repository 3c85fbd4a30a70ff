"""A causal language model in a plain PyTorch loop: SIFT selects 1 % of each projection, SparseAdamW trains it.

Shows the line that changes (AdamW becomes SparseAdamW over the selected weights), what is trained, and that the saved
delta turns a fresh copy of the base into the trained model, bit for bit. The model is SmolLM2-135M-Instruct, the text
docstrings of Python's own library; loss is measured on docstrings that are not trained on.

    python examples/plain_loop.py
"""

from __future__ import annotations

from typing import Any

import torch
from offline import HELD_OUT, OUT, TRAIN, batches_of, mean_loss, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekernels as sk


def main(steps: int = 24) -> dict[str, Any]:
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    train, held_out = batches_of(tokenizer, TRAIN, steps), batches_of(tokenizer, HELD_OUT, 4)

    selection = sk.methods.sift(model, train, density=0.01)
    tuned = sk.train_only(model, selection)  # everything else is frozen
    total = sum(parameter.numel() for parameter in model.parameters()) - selection.numel
    print(f"trains {selection.numel:,} of {total:,} weights, in {len(selection)} tensors")

    before = mean_loss(model, held_out)
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=1e-3)  # was: torch.optim.AdamW(model.parameters(), lr=...)
    for step, batch in enumerate(train, 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 6 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    after = mean_loss(model, held_out)
    print(f"loss on held-out docstrings: {before:.3f} before, {after:.3f} after")

    path = OUT / "plain_loop.safetensors"
    tuned.delta().save(path)
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    sk.Delta.load(path).apply(fresh)
    equal = all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True)
    )
    print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB for a model of {total * 4 / 2**20:.0f} MiB;")
    print(f"applied to a fresh copy it gives the trained model{'' if equal else ' NOT'} bit for bit")
    return {"trained": selection.numel, "before": before, "after": after, "equal": equal, "bytes": path.stat().st_size}


if __name__ == "__main__":
    main()
