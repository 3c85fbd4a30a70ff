"""FSDP2 as accelerate, transformers' Trainer and TRL set it up, over gloo: two processes are one process.

accelerate has FSDP for GPUs only: on the CPU it uses DistributedDataParallel instead, without a word. Told that the CPU
is a GPU, all of its own code for FSDP2 runs there too; what is not tested here is a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin
from models import VOCABULARY, ids, moe, transformer
from processes import in_processes, uses_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.data import DataLoader
from trainers import trainer

import sparsekernels as sk
from sparsekernels import Selection

STEPS, BATCH, ACCUMULATED = 4, 8, 2
MODELS = {"llama": lambda: transformer("llama"), "gpt2": lambda: transformer("gpt2"), "moe": moe}
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}


def call_cpus_gpus(rank: int, world: int) -> None:
    """What accelerate takes from its launcher and torch, for the next Accelerator or Trainer of this process."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in here.items()}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def accelerator_of(rank: int, world: int, mixed_precision: str = "no", **options: Any) -> Accelerator:
    call_cpus_gpus(rank, world)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options)
    found = Accelerator(mixed_precision=mixed_precision, fsdp_plugin=plugin, gradient_accumulation_steps=ACCUMULATED)
    assert found.is_fsdp2
    return found


def prepared(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, sk.SparseModel]:
    model = MODELS[kind]().to(dtype)
    return model, sk.train_only(model, Selection.random(model, 0.3, seed=1))


def loader(rows: int) -> DataLoader:
    return DataLoader(list(ids(STEPS * ACCUMULATED * BATCH, 7, seed=5)), batch_size=rows)


def train(run: nn.Module, optimizer: Any, batches: Any, accelerator: Accelerator) -> Iterator[int]:
    """A training loop as accelerate has it; what it yields are steps done."""
    step = 0
    for batch in batches:
        with accelerator.accumulate(run):
            accelerator.backward(run(batch).logits.float().square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            yield step


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(x, "full_tensor", lambda x=x: x)().clone() for name, x in model.state_dict().items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert (found[name] - weight).abs().max() <= limit * weight.abs().max(), name


# ---- accelerate; each function runs in two processes


def one_process(rank: int, world: int, folder: str) -> None:
    """Accumulation and clipping; weights on every rank, or loaded by one; unselected weights keep their bits."""
    ours, torchs = sk.SparseAdamW, torch.optim.AdamW
    for kind, efficient, cls in (
        ("llama", False, ours),
        ("llama", True, torchs),
        ("gpt2", True, ours),
        ("moe", True, ours),
    ):
        accelerator = accelerator_of(rank, world, cpu_ram_efficient_loading=efficient)
        model, tuned = prepared(kind)
        base = whole(model)
        if efficient and rank:
            with torch.no_grad():
                model = MODELS[kind]()
                for p in model.parameters():
                    p.zero_()  # a checkpoint is read by rank 0 alone
                tuned = sk.train_only(model, tuned.selection)
        optimizer = cls(tuned.parameters(), **ADAMW)
        run, optimizer, batches = accelerator.prepare(model, optimizer, loader(BATCH // world))
        assert type(next(tuned.parameters())).__name__ == "DTensor"
        assert list(train(run, optimizer, batches, accelerator)) == list(range(1, STEPS + 1))
        found, delta, state = whole(run), tuned.delta(), accelerator.get_state_dict(run)
        assert not rank or not state
        if rank == 0:
            same(state, found, 0.0)
        plain = MODELS[kind]()
        delta.apply(plain)  # its fingerprints are those of the base, on each rank
        same(plain.state_dict(), found, 0.0)

        model, tuned = prepared(kind)
        alone = sk.SparseAdamW(tuned.parameters(), **ADAMW)
        for i, batch in enumerate(loader(BATCH)):
            (model(batch).logits.square().mean() / ACCUMULATED).backward()
            if i % ACCUMULATED == ACCUMULATED - 1:
                torch.nn.utils.clip_grad_norm_(list(tuned.parameters()), 0.01)
                alone.step()
                alone.zero_grad()
        same(found, model.state_dict())
        for name, index in tuned.selection.items():
            unselected = ~index.mask()
            assert torch.equal(found[name][unselected], base[name][unselected]), (kind, name)
            assert not torch.equal(found[name], base[name]) or unselected.all(), (kind, name)


def resumed(rank: int, world: int, folder: str) -> None:
    """save_state and load_state, sharded and whole: a run goes on with the same bits, bf16 weights from fp32."""
    for number, (kind, dtype, efficient) in enumerate(
        (
            ("SHARDED_STATE_DICT", torch.float32, False),
            ("SHARDED_STATE_DICT", torch.bfloat16, True),
            ("FULL_STATE_DICT", torch.float32, True),
            ("FULL_STATE_DICT", torch.bfloat16, False),
        )
    ):
        states = []
        for resume in (False, True):
            accelerator = accelerator_of(rank, world, cpu_ram_efficient_loading=efficient, state_dict_type=kind)
            model, tuned = prepared("llama", dtype)
            optimizer = sk.SparseAdamW(tuned.parameters(), **ADAMW)
            run, optimizer, batches = accelerator.prepare(model, optimizer, loader(BATCH // world))
            if resume:
                accelerator.load_state(f"{folder}/state{number}")
                batches = accelerator.skip_first_batches(batches, STEPS // 2 * ACCUMULATED)
            for step in train(run, optimizer, batches, accelerator):
                if step == STEPS // 2 and not resume:
                    accelerator.save_state(f"{folder}/state{number}")
            moments = [optimizer.state[p]["exp_avg"].full_tensor() for p in tuned.parameters()]
            states.append([*whole(run).values(), *(p.full_tensor() for p in tuned.parameters()), *moments])
        for a, b in zip(*states, strict=True):
            assert torch.equal(a, b), (kind, dtype)


def saved_first(rank: int, world: int, folder: str) -> None:
    """The state of an optimizer read before the first forward: torch makes it by a step, which must not fix a plan."""
    for precision, dtype in (("no", torch.float32), ("bf16", torch.float32), ("bf16", torch.bfloat16)):
        accelerator = accelerator_of(rank, world, precision)
        model, tuned = prepared("llama", dtype)
        run, optimizer = accelerator.prepare(model, sk.SparseAdamW(tuned.parameters(), **ADAMW))
        state = get_optimizer_state_dict(run, optimizer)["state"]
        assert all("positions" in entry for entry in state.values())
        assert len(list(train(run, optimizer, loader(BATCH), accelerator))) == STEPS
        weights = whole(run)
        for (name, values), index in zip(tuned.named_parameters(), tuned.selection.values(), strict=True):
            assert values.dtype == torch.float32
            assert torch.equal(sk.ops.gather(weights[name], index), values.full_tensor().to(dtype)), name


def scenes(rank: int, world: int, folder: str) -> None:
    for scene in (one_process, resumed, saved_first):
        scene(rank, world, folder)


@pytest.mark.compatibility(
    "accelerate", "FSDP2 (`fsdp_version: 2`), also with `cpu_ram_efficient_loading`, bf16", "works"
)
@pytest.mark.compatibility("accelerate", "FSDP2: `save_state`, `load_state`, `get_state_dict`", "works")
@uses_processes
def test_accelerate(tmp_path: Path) -> None:
    in_processes(scenes, tmp_path)


# ---- Trainer

OPTIMIZER: dict[str, Any] = {"optimizer_cls_and_kwargs": (sk.SparseAdamW, ADAMW)}
OPTIONS = {
    "gradient_accumulation_steps": ACCUMULATED,
    "max_steps": 4,
    "average_tokens_across_devices": False,  # or Trainer multiplies BERT's loss by the number of processes
}


def classifier() -> tuple[nn.Module, sk.SparseModel]:
    model = transformer("bert")
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    return model, sk.train_only(model, Selection.random(model, 0.3, seed=1, names=names))


def fsdp(kind: str, efficient: bool) -> dict[str, Any]:
    """Arguments of a Trainer. Left to itself, accelerate would wrap BERT's embedding twice, which torch refuses."""
    config = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": kind,
        "cpu_ram_efficient_loading": efficient,
    }
    return {"fsdp": True, "fsdp_config": config, "accelerator_config": {"use_configured_state": True}, **OPTIONS}


def with_trainer(rank: int, world: int, folder: str) -> None:
    """Accumulation, clipping, a scheduler; then from a checkpoint, to the same bits; then what Trainer refuses."""
    for kind, efficient in (("SHARDED_STATE_DICT", False), ("FULL_STATE_DICT", True)):
        results = []
        for checkpoint in (None, f"{folder}/{kind}/checkpoint-2"):
            call_cpus_gpus(rank, world)
            model, tuned = classifier()
            arguments = {**fsdp(kind, efficient), "save_steps": 2 if checkpoint is None else 100}
            run = trainer(model, Path(folder) / kind, None, **OPTIMIZER, **arguments)
            run.train(resume_from_checkpoint=checkpoint)
            assert type(next(tuned.parameters())).__name__ == "DTensor"
            results.append(whole(run.model))
        same(results[1], results[0], 0.0)
        delta = tuned.delta()
        if rank == 0:
            torch.save(results[0], f"{folder}/{kind}.pt")
            delta.save(f"{folder}/{kind}.safetensors")
    call_cpus_gpus(rank, world)
    model, tuned = classifier()
    with pytest.raises(RuntimeError, match="Passing `optimizers` is not allowed if PyTorch FSDP is enabled"):
        trainer(model, Path(folder), sk.SparseAdamW(tuned.parameters()), **fsdp("FULL_STATE_DICT", False))


@pytest.mark.compatibility("Trainer", "FSDP2 with `optimizer_cls_and_kwargs=`, and `resume_from_checkpoint`", "works")
@pytest.mark.compatibility("Trainer", "FSDP2 with `optimizers=`, which Trainer does not allow", "refused")
@uses_processes
def test_trainer(tmp_path: Path) -> None:
    in_processes(with_trainer, tmp_path)
    model, tuned = classifier()
    base = whole(model)
    trainer(model, tmp_path, None, **OPTIMIZER, **OPTIONS, per_device_train_batch_size=4, save_strategy="no").train()
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        found = torch.load(tmp_path / f"{kind}.pt")
        same(found, model.state_dict())
        for name, index in tuned.selection.items():
            assert torch.equal(found[name][~index.mask()], base[name][~index.mask()]), name
        plain = transformer("bert")
        sk.Delta.load(tmp_path / f"{kind}.safetensors").apply(plain)
        same(plain.state_dict(), found, 0.0)


# ---- TRL


def sft(folder: str, **more: Any) -> tuple[Any, sk.SparseModel]:
    """What SFTTrainer trained. It reads the head's weight outside of the head, so this is not selected."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    model = transformer("llama")
    names = [name for name, p in model.named_parameters() if "layers" in name and p.dim() == 2]
    tuned = sk.train_only(model, Selection.random(model, 0.3, seed=1, names=names))
    arguments = {"per_device_train_batch_size": 2, "max_length": 16, "bf16": False, "use_cpu": True, "report_to": []}
    trainer = SFTTrainer(
        model,
        SFTConfig(folder, **{**arguments, "save_strategy": "no", "disable_tqdm": True, "max_steps": 4, **more}),
        train_dataset=Dataset.from_dict({"input_ids": ids(24, 7, seed=5).tolist()}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0"),
        **OPTIMIZER,
    )
    trainer.train()
    return trainer.model, tuned


def with_sft(rank: int, world: int, folder: str) -> None:
    call_cpus_gpus(rank, world)
    more = fsdp("FULL_STATE_DICT", True)
    del more["fsdp_config"]["transformer_layer_cls_to_wrap"]
    model, tuned = sft(folder, **more)
    assert type(next(tuned.parameters())).__name__ == "DTensor"
    found = whole(model)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


@pytest.mark.compatibility("TRL", "SFTTrainer with FSDP2", "works")
@uses_processes
def test_sft_trainer(tmp_path: Path) -> None:
    for package in ("trl", "datasets"):
        pytest.importorskip(package)
    in_processes(with_sft, tmp_path)
    model, tuned = sft(str(tmp_path), **{**OPTIONS, "per_device_train_batch_size": 4})
    found = torch.load(tmp_path / "found.pt")
    same(found, model.state_dict())
    for name, weight in transformer("llama").state_dict().items():
        index = tuned.selection.get(name)
        unselected = torch.ones(weight.shape, dtype=torch.bool) if index is None else ~index.mask()
        assert torch.equal(found[name][unselected], weight[unselected]), name
