"""FSDP2 with accelerate: the model is sharded over processes, and so are its compact parameters, moments and gradients.

Shows what sharding adds to a training loop: one process selects and shares the selection, `accelerator.prepare` shards
after `train_only`, and `delta()` is called by all processes. The saved delta turns a fresh copy of the base into the
trained model, bit for bit.

    accelerate launch --config_file examples/fsdp2.yaml examples/fsdp2.py
    torchrun --nproc_per_node 2 examples/fsdp2.py

accelerate has FSDP for GPUs only; `offline.shard_on_cpu` lets this program show it without one.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from offline import HELD_OUT, OUT, TRAIN, batches_of, mean_loss, shard_on_cpu, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsekernels as sk


def made_accelerator() -> Accelerator:
    """As `accelerate launch` was told by fsdp2.yaml; torchrun passes no settings on, so they are here."""
    shard_on_cpu()
    if "ACCELERATE_USE_FSDP" in os.environ:
        return Accelerator()
    return Accelerator(
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    )


def main(steps: int = 24) -> None:
    accelerator = made_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():
        folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    train, held_out = batches_of(tokenizer, TRAIN, steps * world)[rank::world], batches_of(tokenizer, HELD_OUT, 4)
    model.to(accelerator.device)
    for batch in train + held_out:
        batch.update({name: x.to(accelerator.device) for name, x in batch.items()})

    selection = sk.methods.sift(model, train, density=0.01) if rank == 0 else sk.Selection({})
    tuned = sk.train_only(model, selection.broadcast(src=0))  # all processes train the same positions
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)  # shards both
    held = sum(values.to_local().numel() for values in tuned.parameters())
    accelerator.print(f"{world} processes; rank 0 holds {held:,} of {tuned.selection.numel:,} selected weights")

    before = mean_loss(model, held_out)
    for step, batch in enumerate(train, 1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 6 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
    after = mean_loss(model, held_out)
    accelerator.print(f"loss on held-out docstrings: {before:.3f} before, {after:.3f} after")

    path = OUT / "fsdp2.safetensors"
    delta, weights = tuned.delta(), accelerator.get_state_dict(model)  # in all processes: both gather
    if accelerator.is_main_process:
        delta.save(path)
        fresh = AutoModelForCausalLM.from_pretrained(folder)
        sk.Delta.load(path).apply(fresh)
        equal = all(torch.equal(x, weights[name]) for name, x in fresh.state_dict().items())
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB;")
        print(f"applied to a fresh copy it gives the trained model{'' if equal else ' NOT'} bit for bit")
    accelerator.end_training()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
