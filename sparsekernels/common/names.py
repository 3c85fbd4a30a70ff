"""Which parameters of a model to use: by pattern, as the task head, or as a method's default targets."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

HEAD_NAMES = ("classifier", "score", "classification_head", "qa_outputs", "pooler")
PEFT_PATHS = ("base_model", "model", "base_layer")  # attributes of PEFT's modules that lead to the model's own weights


def matching(names: Iterable[str], patterns: Iterable[str], argument: str) -> list[str]:
    """The names that match any of the patterns (as in `fnmatch`), in their order; `argument` is for the message.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names, patterns = list(names), [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{argument}: no parameter matches {pattern!r}; names look like {names[0]!r}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """The names in their order, in groups whose sizes stay within the limit; a larger one is a group of its own."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def base_parameters(model: nn.Module) -> list[str]:
    """The parameters of the model itself, with or without requires_grad, except the adapters that PEFT added.

    A copy that PEFT trains of a whole module (modules_to_save) replaces that module if it is active.
    """
    added: list[str] = []
    for path, module in model.named_modules():
        parts = list(getattr(module, "adapter_layer_names", ()))
        if hasattr(module, "peft_config") and hasattr(module, "prompt_encoder"):
            parts.append("prompt_encoder")
        if "modules_to_save" in parts:
            used = () if module.disable_adapters else module.active_adapters
            copies = [name for name in module.modules_to_save if name in used]
            unused = [f"modules_to_save.{name}" for name in module.modules_to_save if name not in copies]
            parts = [*unused, "original_module"] if copies else unused
        added += [f"{path}.{part}." if path else f"{part}." for part in parts]
    return [name for name, _ in model.named_parameters() if not f"{name}.".startswith(tuple(added))]


def default_targets(model: nn.Module) -> list[str]:
    """Attention and MLP projections: weights of two or more dimensions inside numbered blocks, embeddings excluded."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    base = set(base_parameters(model))
    return [
        name
        for name, parameter in model.named_parameters()
        if name in base
        and parameter.dim() >= 2
        and parameter.is_floating_point()
        and id(parameter) not in embeddings
        and any(part.isdigit() for part in name.split("."))
        and not in_head(name)
    ]


def embedding_weight(model: nn.Module, name: str | None = None, argument: str = "embedding") -> str:
    """The name of the input embedding's table, [V, D]; or `name`, if that is such a parameter.

    Raises:
        ValueError: the model has no get_input_embeddings(), or no such parameter; `argument` is for the message.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name is None:
        ask = getattr(model, "get_input_embeddings", None)
        weight = getattr(ask() if ask else None, "weight", None)
        name = next((n for n, p in parameters.items() if p is weight), None)
        if name is None:
            raise ValueError(f"{argument}: the model has no get_input_embeddings() with a weight; pass the table name")
    if name not in parameters or parameters[name].dim() != 2:
        raise ValueError(f"{argument}: {name!r} is not a two-dimensional parameter of the model")
    return name


def default_head(model: nn.Module) -> list[str]:
    """The parameters of a task head, which starts from random weights and is trained densely."""
    return [name for name in base_parameters(model) if in_head(name)]


def in_head(name: str) -> bool:
    """Whether a parameter belongs to a module with one of the usual names of a task head."""
    return any(part in HEAD_NAMES for part in name.split("."))


def plain_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's name, and its name in the model without wrappers.

    Wrappers are PEFT, torch.compile, DataParallel and DistributedDataParallel. If PEFT trains a copy of a module
    (`modules_to_save`), the copy gets the plain name, because the forward reads it. Parameters that PEFT adds keep
    their names, and so do several parameters that would get the same one.
    """
    return {
        name: plain if len({id(parameter) for parameter, _ in found}) == 1 else name
        for plain, found in _by_plain_name(model).items()
        for parameter, name in found
    }


def own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For names of the model, or of the model without wrappers: the model's names. Unknown ones are dropped.

    Raises:
        ValueError: a plain name that several parameters would have.
    """
    names = list(names)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {name: name for name in names if name in own}
    by_plain = {} if len(found) == len(names) else _by_plain_name(model)
    for name in names:
        if name not in found and name in by_plain:
            alike = dict(by_plain[name])
            if len(alike) > 1:
                raise ValueError(f"{name!r} may be any of {', '.join(alike.values())}; pass one of these")
            found[name] = next(iter(alike.values()))
    return found


def _by_plain_name(model: nn.Module) -> dict[str, list[tuple[nn.Parameter, str]]]:
    """Plain name -> the parameters that would have it, and their names in the model."""
    found: dict[str, list[tuple[nn.Parameter, str]]] = {}

    def visit(module: nn.Module, own: str, plain: str, kept: str) -> None:
        """`own`, `plain` and `kept` come before names: in the model, in the plain one, and of what PEFT adds."""
        peft = any(each.__module__.partition(".")[0] == "peft" for each in type(module).__mro__)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault((kept if peft else plain) + name, []).append((parameter, own + name))
        for name, child in module._modules.items():
            step = name + "."
            if child is None:
                continue
            if name == "_orig_mod" or (
                name == "module" and isinstance(module, (DataParallel, DistributedDataParallel))
            ):
                visit(child, own + step, plain, kept)
            elif not peft:
                visit(child, own + step, plain + step, kept + step)
            elif name == "modules_to_save":
                for adapter, copy in child.named_children():
                    visit(copy, f"{own}{step}{adapter}.", plain, f"{kept}{step}{adapter}.")
            elif name in PEFT_PATHS:
                visit(child, own + step, plain, kept + step)
            else:
                visit(child, own + step, kept + step, kept + step)

    visit(model, "", "", "")
    return found
