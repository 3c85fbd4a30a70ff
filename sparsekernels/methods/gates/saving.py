"""A compressed model in a folder, and back."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from ...cutting import Cut, Cuts, cut
from ...files import load_tensors, reading, save_tensors

CUTS, WEIGHTS, CONFIG = "cuts.safetensors", "model.safetensors", "config.json"
SIDES = ("inputs", "columns", "outputs", "rows")


def mark_compressed(model: nn.Module, cuts: Cuts) -> None:
    """Give a model that was cut its `cuts` and its `save_pretrained`."""
    # Beside what nn.Module registers, and over the method of its class, which knows nothing of cuts.
    model.__dict__.update(cuts=cuts, save_pretrained=SavePretrained(model))


def is_compressed(model: nn.Module) -> bool:
    """Whether `compress` or `load` returned it."""
    return isinstance(model.__dict__.get("cuts"), Cuts)


class SavePretrained:
    """The `save_pretrained` of one model; an object that refers to it, so that a copy of the model has its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, folder: str | Path) -> None:
        """Write the model into a folder, for `load`: config.json (of transformers models), weights, cuts."""
        _write(self.model, self.model.__dict__["cuts"], folder)


def _write(model: nn.Module, cuts: Cuts, folder: str | Path) -> None:
    """Write config.json, model.safetensors and cuts.safetensors into a folder, which is made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
            config: Any = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            config.save_pretrained(partial)
        mark = {"sparsekernels": uuid.uuid4().hex}  # of a save: what two of them left is not mixed up
        save_model(model, str(Path(partial) / WEIGHTS), mark)
        tensors = {
            f"{i}.{side}": getattr(part, side)
            for i, part in enumerate(cuts.modules.values())
            for side in SIDES
            if getattr(part, side) is not None
        }
        plan = {
            "modules": [[name, *part.shape] for name, part in cuts.modules.items()],
            "attributes": cuts.attributes,
            "total": cuts.total,
            "removed": cuts.removed,
            "model": type(model).__name__,
        }
        save_tensors(
            Path(partial) / CUTS,
            tensors,
            {"sparsekernels": "cuts", "cuts": json.dumps(plan), "weights": mark["sparsekernels"]},
        )
        for path in Path(partial).iterdir():
            os.replace(path, folder / path.name)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a compressed model that its `save_pretrained` wrote; in eval mode if it is made here.

    Args:
        folder: where it lies.
        model: one of the original architecture, cut in place and filled; its weights do not matter. None: made from
            config.json, which transformers models have.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: a damaged file, one of something else, or a model of
            another architecture; the model is unchanged then, unless it lacks
            some of the weights only.
    """
    folder = Path(folder)
    tensors, metadata = load_tensors(folder / CUTS, "cuts")
    with reading(folder / CUTS):
        plan = json.loads(metadata["cuts"])
        modules = {
            name: Cut(**{side: tensors.get(f"{i}.{side}") for side in SIDES}, shape=(m, n))
            for i, (name, m, n) in enumerate(plan["modules"])
        }
        cuts = Cuts(modules, plan["attributes"], plan["total"], plan["removed"])
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"no file {folder / WEIGHTS}")
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            mark = (file.metadata() or {}).get("sparsekernels")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or truncated: {error}") from error
    if mark != metadata["weights"]:
        raise ValueError(f"{folder / CUTS} and {WEIGHTS} are of two saves; save the model again")
    if model is None:
        model = _made(folder).eval()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in modules and shapes.get(name, tensor.shape) != tensor.shape:
            raise ValueError(
                f"{name!r} is {list(shapes[name])} in {folder / WEIGHTS}, {list(tensor.shape)} in the model"
            )
    cut(model, cuts)
    mark_compressed(model, cuts)
    missing, unexpected = load_model(model, str(folder / WEIGHTS), strict=False)
    if missing or unexpected:
        wrong = ", ".join([*missing, *unexpected][:3])
        raise ValueError(f"{folder / WEIGHTS} and the model do not hold the same tensors: {wrong}")
    return model


def _made(folder: Path) -> nn.Module:
    """A model as config.json describes it, with any weights."""
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"no file {folder / CONFIG}: give load() a model of the original architecture")
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or [""])[0]
    made = getattr(transformers, architecture, None)
    if made is None:
        raise ValueError(f"{folder / CONFIG} names {architecture!r}, which transformers does not have; give a model")
    return made._from_config(config, dtype=config.dtype or torch.float32)  # type: ignore[no-any-return]
