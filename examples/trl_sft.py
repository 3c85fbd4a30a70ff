"""TRL's SFTTrainer, with 1 % of each projection trained: the optimizer is all that changes.

Shows a chat model tuned on questions and answers, and checks what TRL does with the model: it is the same object, in
the same dtype, and every weight that is not selected keeps its bits. SFTTrainer reads `lm_head.weight` outside the
forward of its module, so neither the LM head nor an embedding tied to it may be selected here; SIFT selects neither.

    python examples/trl_sft.py
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from offline import HELD_OUT, OUT, TRAIN, docstrings, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import sparsekernels as sk


def conversations(modules: tuple[str, ...], count: int) -> Dataset:
    """Questions about Python's library; the answer is the first line of the docstring."""
    return (
        Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": f"What is {name}?"}],
                    "completion": [{"role": "assistant", "content": text.partition("\n")[0]}],
                }
                for name, text in docstrings(modules)
            ]
        )
        .shuffle(seed=0)
        .select(range(count))
    )


def main(steps: int = 24) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(smollm2())
    arguments = SFTConfig(
        output_dir=str(OUT / "trl_sft"),
        max_steps=steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        bf16=False,  # TRL's default is True
        logging_steps=6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=conversations(TRAIN, 4 * steps),
        eval_dataset=conversations(HELD_OUT, 16),
        processing_class=AutoTokenizer.from_pretrained(smollm2()),
        optimizer_cls_and_kwargs=(sk.SparseAdamW, {"lr": 1e-3}),  # made in train(), over what trains by then
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    selection = sk.methods.sift(model, trainer.get_train_dataloader(), density=0.01)  # the batches as TRL makes them
    tuned = sk.train_only(model, selection)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    print(f"loss on held-out answers: {first:.3f} before, {last:.3f} after")

    assert trainer.model is model, "SFTTrainer wrapped the model"
    weights = model.state_dict()
    assert all(weights[name].dtype == base.dtype for name, base in before.items()), "SFTTrainer cast the model"
    changed = {name: weights[name] != base for name, base in before.items()}
    outside = sum(int(mask.sum()) for mask in changed.values())
    for name, index in selection.items():
        outside -= int(sk.ops.gather(changed[name].float(), index).sum())
    total = sum(int(mask.sum()) for mask in changed.values())
    print(f"{total:,} weights changed, of {selection.numel:,} selected; {outside} that were not selected")

    path = OUT / "trl_sft.safetensors"
    tuned.delta().save(path)
    print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
    return {"before": first, "after": last, "changed": total, "selected": selection.numel, "outside": outside}


if __name__ == "__main__":
    main()
