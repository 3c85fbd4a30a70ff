"""Which parameters of a model are meant: by pattern, as the task head, or as a method's default targets."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

HEAD_NAMES = ("classifier", "score", "classification_head", "qa_outputs", "pooler")


def matching(names: Iterable[str], patterns: Iterable[str], argument: str) -> list[str]:
    """The names that match any of the patterns (as in `fnmatch`), in their order; `argument` is for the message.

    Raises:
        ValueError: a pattern that matches nothing.
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


def default_targets(model: nn.Module) -> list[str]:
    """Attention and MLP projections: weights of two or more dimensions inside numbered blocks, embeddings excluded."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
        and parameter.is_floating_point()
        and id(parameter) not in embeddings
        and any(part.isdigit() for part in name.split("."))
        and not in_head(name)
    ]


def embedding_weight(model: nn.Module, name: str | None = None, argument: str = "embedding") -> str:
    """The name of the input embedding's table, [V, D]; or `name`, if that is such a parameter.

    Raises:
        ValueError: the model does not say what its input embedding is, or has no such parameter; `argument` is for the
            message.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name is None:
        ask = getattr(model, "get_input_embeddings", None)
        weight = getattr(ask() if ask else None, "weight", None)
        name = next((n for n, p in parameters.items() if p is weight), None)
        if name is None:
            raise ValueError(f"{argument}: the model has no get_input_embeddings() with a weight; name the table")
    if name not in parameters or parameters[name].dim() != 2:
        raise ValueError(f"{argument}: {name!r} is no two-dimensional parameter of the model")
    return name


def default_head(model: nn.Module) -> list[str]:
    """The parameters of a task head, which starts from random weights and trains densely."""
    return [name for name, _ in model.named_parameters() if in_head(name)]


def in_head(name: str) -> bool:
    """Whether a parameter belongs to a module with one of the usual names of a task head."""
    return any(part in HEAD_NAMES for part in name.split("."))
