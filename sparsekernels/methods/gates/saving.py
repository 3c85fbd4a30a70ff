"""Save a compressed model to a folder, and load it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...common.files import check_names, described, load_tensors, reading, replacing
from ...structure.pruning_plan import Cut, Cuts, PreparedCut, prepare_cut

KIND = "compressed model"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SIDES = ("inputs", "columns", "outputs", "rows")
CUT = "sparsekernels.cut.{}.{}"  # name of the positions of a module, by its number, on one side
PLAN = {
    "modules": {str: {"shape": [int], "sides": [str]}},
    "attributes": {str: {str: int}},
    "total": int,
    "removed": int,
    "shared": {str: str},
    "config": (str, type(None)),
}


def mark_compressed(model: nn.Module, cuts: Cuts) -> None:
    """Give a model that was cut its `cuts` and its own `save_pretrained`."""
    # Not registered with nn.Module; hides the method of its class, which ignores cuts.
    model.__dict__.update(cuts=cuts, save_pretrained=SavePretrained(model))


def is_compressed(model: nn.Module) -> bool:
    """Whether it came from `compress` or `load`."""
    return isinstance(model.__dict__.get("cuts"), Cuts)


class SavePretrained:
    """The `save_pretrained` of one model; an object that refers to it, so that a copy of the model has its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the model to a folder, for `load`, replacing one that is there; other files in the folder are kept.

        Everything `load` reads is in model.safetensors: weights, cuts and configuration. So one rename replaces the old
        model by the new one, on any POSIX file system, and a save that is interrupted leaves either of them whole.
        config.json, for models that have a config, is a copy for tools that look into such folders.

        Args:
            save_directory: the folder, created if it does not exist.
            is_main_process: False: write nothing.
            state_dict: of the model, if it has to be gathered first, as by transformers' Trainer. None: its own.
            push_to_hub: True raises ValueError: upload the folder with huggingface_hub. Other arguments of
                transformers' save_pretrained are accepted and ignored: the result is always one safetensors file.

        Cost: a checksum of every byte, and a flush to the disk. Contiguous tensors on the CPU are not copied.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True is not supported; upload the folder with huggingface_hub.upload_folder")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        cuts: Cuts = self.model.__dict__["cuts"]
        tensors, shared = _distinct(self.model.state_dict() if state_dict is None else state_dict)
        modules = {}
        for i, (name, part) in enumerate(cuts.modules.items()):
            positions = {side: x for side in SIDES if (x := getattr(part, side)) is not None}
            tensors.update({CUT.format(i, side): x for side, x in positions.items()})
            modules[name] = {"shape": list(part.shape), "sides": list(positions)}
        config = _config(self.model)
        about = {"total": cuts.total, "removed": cuts.removed, "shared": shared, "config": config}
        plan = json.dumps({"modules": modules, "attributes": cuts.attributes, **about})
        metadata = {"format": "pt", "sparsekernels": KIND, "plan": plan, "checksum": checksum(tensors, plan)}
        if config is not None:
            with replacing(folder / CONFIG) as partial:
                partial.write_text(config)
        with replacing(folder / WEIGHTS) as partial:
            save_file(tensors, partial, metadata)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a compressed model that its `save_pretrained` wrote.

    Args:
        folder: the folder.
        model: one of the original architecture, cut in place and filled; its weights do not matter. None: made from the
            configuration in the file, which transformers models have.

    Returns:
        The model, with `cuts` and `save_pretrained` as `Gates.compress` adds them; in eval mode if it was made here.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: the file is damaged or of another kind, has no configuration and no model was passed, or the model
            has another architecture or is on the meta device. The model is unchanged then: everything is checked first.

    Source: ours.

    Examples:
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        >>> gates = sk.methods.gates.attach(make(), pruning_ratio=0.3, total_steps=100)
        >>> small = gates.compress()  # warns: after 0 of 100 steps nothing is removed
        >>> small.save_pretrained("small")
        >>> loaded = sk.methods.gates.load("small", make())
        >>> torch.equal(loaded[0].weight, small[0].weight)
        True
    """
    path = Path(folder) / WEIGHTS
    tensors, metadata = load_tensors(path, KIND)
    plan = described(path, metadata.get("plan"), PLAN)
    if metadata.get("checksum") != checksum(tensors, metadata["plan"]):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    with reading(path):
        cuts = _cuts(plan, tensors)
        state = {name: x for name, x in tensors.items() if not name.startswith(CUT.partition("{")[0])}
        state.update({name: state[first] for name, first in plan["shared"].items()})
    if model is None:
        model = _made(path, plan["config"]).eval()
    elif any(p.is_meta for p in model.parameters()):
        raise ValueError("model is on the meta device, which has no weights; call to_empty(device=...) on it first")
    prepared = prepare_cut(model, cuts)
    _check_fits(path, state, prepared)
    prepared.install()
    with torch.no_grad():
        for name, own in model.state_dict().items():
            own.copy_(state[name])
    mark_compressed(model, cuts)
    return model


def checksum(tensors: Mapping[str, Tensor], plan: str) -> str:
    """CRC-32 of the file's contents: names, dtypes, shapes and bytes of tensors, and the plan."""

    def of(item: tuple[str, Tensor]) -> str:
        name, x = item
        data: Any = x.reshape(-1).view(torch.uint8).numpy()  # flat first: a scalar has no such view
        return f"{name} {x.dtype} {list(x.shape)} {zlib.crc32(data)}"

    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        lines = list(pool.map(of, sorted(tensors.items())))
    return f"{zlib.crc32(json.dumps([plan, *lines]).encode()):08x}"


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, identical ones only once, and the other names of these."""
    names: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, x in state.items():
        first = names.setdefault((*_place(x), name if x.numel() == 0 else ""), name)
        if first != name:
            shared[name] = first
    storages: set[int] = set()
    tensors = {}
    for name in state.keys() - shared.keys():
        x = state[name].detach().cpu().contiguous()
        # safetensors refuses tensors that overlap, as parts of one storage may.
        tensors[name] = x.clone() if x.untyped_storage().data_ptr() in storages else x
        storages.add(x.untyped_storage().data_ptr())
    return tensors, shared


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.device, x.data_ptr(), x.dtype, x.shape, x.stride()


def _config(model: nn.Module) -> str | None:
    """The text of config.json, for a model that has a config of transformers."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    about = json.loads(config.to_json_string())
    about["architectures"] = [type(model).__name__]
    about["dtype"] = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    return json.dumps(about, indent=2, sort_keys=True) + "\n"


def _cuts(plan: Any, tensors: Mapping[str, Tensor]) -> Cuts:
    modules = {}
    expected: set[str] = set()
    for i, (name, about) in enumerate(plan["modules"].items()):
        names = {side: CUT.format(i, side) for side in about["sides"]}
        expected.update(names.values())
        m, n = about["shape"]
        modules[name] = Cut(**{side: tensors[names[side]] if side in names else None for side in SIDES}, shape=(m, n))
    for name in tensors:
        if name.startswith(CUT.partition("{")[0]) and name not in expected:
            raise ValueError(f"it should not contain {name!r}")
    if not 0 <= plan["removed"] <= plan["total"]:
        raise ValueError(f"{plan['removed']} of {plan['total']} parameters removed")
    return Cuts(modules, plan["attributes"], plan["total"], plan["removed"])


def _check_fits(path: Path, state: Mapping[str, Tensor], prepared: PreparedCut) -> None:
    """Raise ValueError unless the tensors of a file are those of the model after the cut."""
    expected = prepared.state_dict()
    check_names(path, state, expected)
    places: dict[tuple[Any, ...], str] = {}
    for name, own in expected.items():
        x = state[name]
        if x.shape != own.shape:
            raise ValueError(f"{name!r} is {list(x.shape)} in {path}, the model needs {list(own.shape)}")
        if x.dtype != own.dtype and not (x.is_floating_point() and own.is_floating_point()):
            raise ValueError(f"{name!r} is {x.dtype} in {path}, {own.dtype} in the model")
        first = places.setdefault(_place(own), name) if own.numel() else name
        if state[first] is not x and not torch.equal(state[first], x):
            raise ValueError(f"{first!r} and {name!r} are one tensor in the model, two in {path}")
    for module, made in prepared.made.items():
        for name, positions in made.named_buffers(prefix=module):
            if not torch.equal(positions.cpu(), state[name]):
                raise ValueError(f"{path} is damaged: {name!r} does not match the cuts")


def _made(path: Path, config: str | None) -> nn.Module:
    """A model from the configuration, with arbitrary weights."""
    if config is None:
        raise ValueError(f"{path} holds no configuration: pass load() a model of the original architecture")
    import transformers

    try:
        about = json.loads(config)
        architecture = about["architectures"][0]
        settings = transformers.CONFIG_MAPPING[about["model_type"]].from_dict(about)
        made: Any = getattr(transformers, architecture)
        return made._from_config(settings, dtype=settings.dtype or torch.float32)  # type: ignore[no-any-return]
    except Exception as error:  # transformers may raise anything
        raise ValueError(
            f"the configuration in {path} makes no model of transformers, pass load() one: {type(error).__name__} "
            f"{error}"
        ) from error
