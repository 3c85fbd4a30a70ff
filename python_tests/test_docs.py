"""The documentation: nothing public is missing in it, its code is right, and its numbers are measured."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import yaml

import sparsekernels as sk

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"
sys.path.insert(0, str(ROOT / "docs"))

import readme  # noqa: E402
import tables  # noqa: E402

SOURCES = {str(page.relative_to(PAGES)): page.read_text() for page in sorted(PAGES.rglob("*.md"))}
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
VOCABULARY = 2048  # embedding-rows.md trains some of so many rows
each_page = pytest.mark.parametrize("page", SOURCES)


@pytest.fixture(scope="module")
def expanded() -> dict[str, str]:
    return {name: tables.expand(source) for name, source in SOURCES.items()}


def blocks(text: str) -> Iterator[str]:
    """The Python code of a page."""
    for indent, language, code in BLOCK.findall(text):
        if language == "python":
            yield re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def pages_of(nav: Any) -> Iterator[str]:
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_the_nav_has_every_page_once() -> None:
    nav = list(pages_of(yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(SOURCES)


def public(module: ModuleType) -> Iterator[str]:
    for name in module.__all__:
        thing = getattr(module, name)
        yield from public(thing) if isinstance(thing, ModuleType) else [tables.path(module.__name__, name)]


def test_the_reference_has_every_public_name(expanded: dict[str, str]) -> None:
    directives = re.findall(r"^::: (\S+)$", "\n".join(expanded.values()), re.MULTILINE)
    missing = [name for name in public(sk) if name not in directives and not name.endswith(".OPS")]
    assert not missing


def test_the_op_table_has_every_op(expanded: dict[str, str]) -> None:
    rows = [line for line in expanded["how-it-works.md"].splitlines() if line.startswith("|")]
    for op in sk.ops.OPS:
        assert any(f"| [`{op.name}`]" in row and op.doc in row for row in rows), op.name


def test_results_are_shown(expanded: dict[str, str]) -> None:
    """Every file of benchmarks/results has its function, and the page of benchmarks calls each."""
    for result in tables.RESULTS.glob("*.*"):
        function = tables.PUBLIC.get(result.stem)
        if result.suffix == ".png":
            assert f"results/{result.name})" in expanded["benchmarks.md"], result.name
        else:
            assert function is not None, result.name
            assert function() in expanded["benchmarks.md"], result.name


def test_pictures_exist(expanded: dict[str, str]) -> None:
    pictures = re.findall(r"!\[[^]]*\]\((?:\.\./)*results/([^)]*)\)", "\n".join(expanded.values()))
    assert pictures
    assert all((tables.RESULTS / picture).exists() for picture in pictures), pictures


def test_unknown_tables_and_marks_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="no table called 'nothing'"):
        tables.expand("{{ nothing }}")
    mark = "@pytest.mark.compatibility('a', 'b', '{}')\ndef test_{}(): ...\n"
    (tmp_path / "test_a.py").write_text(mark.format("works", 1) + mark.format("refused", 2))
    monkeypatch.setattr(tables, "TESTS", tmp_path)
    with pytest.raises(ValueError, match=r"test_2 says that a, b is 'refused'; elsewhere it is 'works'"):
        tables.compatibility()


@each_page
def test_no_measured_number_is_typed(page: str) -> None:
    prose = re.sub(r"`[^`\n]*`|\(http\S*\)", "", BLOCK.sub("", SOURCES[page]))
    assert not re.findall(r"\d[\d.,]* ?(?:%|x\b|ms\b|µs\b|[KMGT]i?B\b|points\b|times\b|seconds\b)", prose)


@pytest.mark.parametrize("page", [*SOURCES, "README.md"])
def test_code_uses_what_exists(page: str) -> None:
    """Names after `sk.`, and the keywords of calls."""
    source = SOURCES[page] if page in SOURCES else (ROOT / page).read_text()
    for code in blocks(source):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute):
                named(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                function = named(node.func)
                if function is not None and not isinstance(function, ModuleType):
                    parameters = inspect.signature(function).parameters
                    taken = {keyword.arg for keyword in node.keywords}
                    assert taken <= set(parameters), f"{ast.unparse(node.func)} takes no {taken - set(parameters)}"


def named(node: ast.expr) -> Any:
    """What a chain of attributes that begins with `sk` stands for; None for any other expression."""
    if isinstance(node, ast.Name):
        return sk if node.id == "sk" else None
    if not isinstance(node, ast.Attribute):
        return None
    owner = named(node.value)
    if owner is None:
        return None
    assert hasattr(owner, node.attr), f"{ast.unparse(node)} does not exist"
    return getattr(owner, node.attr)


@pytest.mark.parametrize(
    "page",
    [page for page in SOURCES if any(blocks(SOURCES[page])) and page not in ("compatibility.md", "get-started.md")]
    + ["README.md"],
)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what its reader has: a model, batches, and where a page says nothing of it, what trains."""
    monkeypatch.chdir(tmp_path)
    names = ["model.layers.0.mlp.up_proj.weight"]
    loader = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCABULARY, (12, 2, 8))]
    selection = sk.Selection.random(llama(), 0.01, names=names)
    tuned = sk.train_only(llama(), selection)
    namespace = {
        "torch": torch,
        "sk": sk,
        "model": llama(),
        "loader": loader,
        "batches": loader[:2],
        "samples": loader[:2],
        "validation": loader[2:3],
        "batch": loader[0],
        "evaluate": lambda model: -float(model(**loader[0]).loss),
        "selection": selection,
        "new_selection": sk.Selection.random(llama(), 0.02, names=names),
        "tuned": tuned,
        "other": tuned.delta(),
        "optimizer": sk.SparseAdamW(tuned.parameters()),
        "path": "checkpoint.pt",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a ticket by size, and of gates that see few steps
        for code in blocks(SOURCES.get(page) or readme.README.read_text()):
            exec(code, namespace)


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes))


def test_get_started_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to a delta file, and back."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for code in blocks(SOURCES["get-started.md"]):
        exec(code, namespace)
    selection, delta = namespace["selection"], namespace["delta"]
    assert 0 < selection.numel == delta.selection.numel
    assert (tmp_path / "delta.safetensors").stat().st_size > delta.nbytes
    assert namespace["model"].get_parameter(next(iter(selection))).requires_grad


def test_code_in_docstrings_stands_by_itself() -> None:
    """A blank line before it, or Markdown takes it for text."""
    for path in (ROOT / "sparsekernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                for line, after in pairwise((ast.get_docstring(node) or "").split("\n")):
                    is_text = line[:1].strip() and not re.match(r"\w+:( |$)", line)
                    assert not (is_text and after.startswith("    ")), f"{path.name}, {node.name}: after {line!r}"


def test_the_readme_is_one_page_of_measured_numbers() -> None:
    text = readme.README.read_text()
    assert text == readme.filled(text), "run python docs/readme.py"
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
