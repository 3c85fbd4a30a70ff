"""The floors of the package: a room imports from rooms below it alone, and no files import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import sparsekernels

PACKAGE = Path(sparsekernels.__file__).parent
FLOORS = (
    "common",
    "index",
    "ops choosing",
    "selection",
    "nn",
    "structure",
    "training",
    "optim scoring",
    "methods",
    "__init__",
)
FLOOR = {room: floor for floor, rooms in enumerate((*FLOORS, "__main__")) for room in rooms.split()}
FILES = {tuple(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def file_of(parts: tuple[str, ...]) -> tuple[str, ...] | None:
    return next((found for found in (parts, (*parts, "__init__")) if found in FILES), None)


def imports(file: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The files of the package that one imports, wherever in it, for types too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        assert not isinstance(node, ast.Import) or "sparsekernels" not in {a.name.partition(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.level:
            target = (*file[: -node.level], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                found.add(file_of((*target, alias.name)) or file_of(target))
    return found - {None, file}


def test_imports_go_down() -> None:
    up = [
        f"{'/'.join(file)} imports {'/'.join(other)}"
        for file in FILES
        for other in imports(file)
        if file[0] != other[0] and FLOOR[other[0]] >= FLOOR[file[0]]
    ]
    assert not up


def test_no_circle() -> None:
    order = list(TopologicalSorter({file: imports(file) for file in FILES}).static_order())
    assert len(order) == len(FILES)
