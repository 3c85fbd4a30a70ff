"""Public docstrings: every example runs, and no docstring lacks a part that a reader needs."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sparsekernels as sk

ROOMS = {
    "sk": sk,
    "sk.ops": sk.ops,
    "sk.methods": sk.methods,
    "sk.methods.gates": sk.methods.gates,
    "sk.methods.ks_lottery": sk.methods.ks_lottery,
    "sk.methods.laser": sk.methods.laser,
}
PUBLIC = {
    f"{room}.{name}": getattr(module, name)
    for room, module in ROOMS.items()
    for name in module.__all__
    if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
}
EVERYWHERE = {"self", "cls", "backend"}  # arguments that no docstring has to explain
# Other files call these, users do not.
INTERNAL = {"unchecked", "from_slots", "check_in_use", "leave", "of", "pieces", "split", "remapped_step"}
INTERNAL |= {"entries", "by_unit", "same_units", "with_positions", "unit_name", "shaped", "at", "without_padding"}
MOST_LINES = 6  # of an example
each = pytest.mark.parametrize("name", PUBLIC)


def members(thing: Any) -> dict[str, Any]:
    """Public methods and properties of a class of this package, as functions; not those that torch documents."""
    found = {}
    for name, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        inherited = any(hasattr(base, name) for base in thing.__mro__[1:])
        if not name.startswith("_") and inspect.isfunction(function) and not inherited:
            found[name] = function
    return found


def examples(doc: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(doc)


def parameters(thing: Any) -> list[str]:
    constructed = thing.__init__ if inspect.isclass(thing) and thing.__init__ is not object.__init__ else thing
    if constructed is thing and inspect.isclass(thing):
        return []
    return [name for name in inspect.signature(constructed).parameters if name not in EVERYWHERE]


def raises(function: Any) -> bool:
    """Whether a `raise` of an exception stands in the body."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:  # made by dataclass or NamedTuple
        return False
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(ast.parse(source)))


def problems(name: str, thing: Any) -> Iterator[str]:
    """What the docstring of a public function or class lacks."""
    doc = inspect.getdoc(thing) or ""

    def has(*sections: str) -> bool:
        return any(re.search(rf"^{section}:", doc, re.MULTILINE) for section in sections)

    given = parameters(thing)
    is_class = inspect.isclass(thing)
    if given and not has(*(("Args", "Attributes") if is_class else ("Args",))):
        yield f"{name} has no Args"
    for parameter in given if has("Args") else ():
        if not re.search(rf"\b{parameter}\b", doc):
            yield f"{name} does not explain its argument {parameter}"
    if not is_class and inspect.signature(thing).return_annotation not in (None, "None") and not has("Returns"):
        yield f"{name} has no Returns"
    own = [getattr(thing, part) for part in ("__init__", "__post_init__") if is_class and part in vars(thing)]
    if any(map(raises, own or ([] if is_class else [thing]))) and not has("Raises"):
        yield f"{name} has no Raises"
    if not has("Source"):
        yield f"{name} has no Source"
    if not examples(doc):
        yield f"{name} has no example"
    shown = "".join(example.source for text in docs(thing).values() for example in examples(text))
    for member, function in members(thing).items():
        text = inspect.getdoc(function)
        if not text:
            yield f"{name}.{member} has no docstring"
        elif raises(function) and "Raise" not in text:
            yield f"{name}.{member} has no Raises"
        if member not in INTERNAL and not re.search(rf"\.{member}\b", shown):
            yield f"{name}.{member} is in no example"
    for part, text in docs(thing).items():
        if sum(example.source.count("\n") for example in examples(text)) > MOST_LINES:
            yield f"{name}{part} has an example of more than {MOST_LINES} lines"


def docs(thing: Any) -> dict[str, str]:
    """The docstring of a function; those of a class and of its members."""
    found = {f".{name}": inspect.getdoc(function) or "" for name, function in members(thing).items()}
    return {"": inspect.getdoc(thing) or "", **found}


@each
def test_parts(name: str) -> None:
    found = list(problems(name, PUBLIC[name]))
    assert not found, "; ".join(found)


@each
def test_examples(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would run them after `import torch` and `import sparsekernels as sk`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for part, doc in docs(PUBLIC[name]).items():
        test = doctest.DocTestParser().get_doctest(doc, {"sk": sk, "torch": torch}, name + part, None, 0)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        output: list[str] = []
        runner.run(test, out=output.append)
        assert not runner.failures, "".join(output)


def test_what_lacks_is_named() -> None:
    def bare(x: int) -> int:
        raise ValueError

    assert list(problems("bare", bare)) == [
        f"bare has no {part}" for part in ("Args", "Returns", "Raises", "Source", "example")
    ]


def test_an_argument_without_a_word_is_named() -> None:
    def half(x: int, y: int) -> None:
        """Do something.

        Args:
            x: a number.

        Source: ours.

        Example:
            >>> 1 + 1
            2
        """

    assert list(problems("half", half)) == ["half does not explain its argument y"]
