"""The op table is complete: what keeps backends, tests, benchmarks and README from drifting apart."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from samples import all_samples

import sparsekernels
from sparsekernels import ops
from sparsekernels.ops import OPS
from sparsekernels.ops.table import Op

ROOT = Path(__file__).resolve().parents[2]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def test_names_are_unique_and_public() -> None:
    names = [op.name for op in OPS]
    assert len(set(names)) == len(names)
    assert set(names) == set(ops.__all__) - {"OPS"}


@each_op
def test_schema(op: Op) -> None:
    """Defined with the dispatcher; a name ends in _ exactly where something is mutated."""
    schema = getattr(torch.ops.sparsekernels, op.name).default._schema
    assert schema.is_mutable == op.name.endswith("_")
    arguments = [argument.name for argument in schema.arguments]
    assert "mode" not in arguments, "opcheck in torch 2.13 does not bear a mutating op with an argument called mode"


@each_op
def test_reference_and_fake(op: Op) -> None:
    assert callable(op.reference)
    assert callable(op.fake)
    name = f"sparsekernels::{op.name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")


@each_op
def test_reference_takes_the_arguments_of_the_schema(op: Op) -> None:
    schema = getattr(torch.ops.sparsekernels, op.name).default._schema
    for function in (op.reference, op.fake):
        inspect.signature(function).bind(*schema.arguments)


@each_op
def test_gpu_kernel(op: Op) -> None:
    """A Triton launcher, or a CUDA registration in csrc/cuda/<family>.cpp."""
    launcher = ROOT / "sparsekernels" / "ops" / op.family / "triton.py"
    binding = ROOT / "csrc" / "cuda" / f"{op.family}.cpp"
    in_triton = launcher.exists() and re.search(rf"^def {op.name}\(", launcher.read_text(), re.MULTILINE)
    in_cuda = binding.exists() and f'"{op.name}"' in binding.read_text()
    assert in_triton or in_cuda


@each_op
def test_cpu_kernel(op: Op) -> None:
    """In csrc/cpu/<family>.cpp, or in several files that begin so."""
    sources = (ROOT / "csrc/cpu").glob(f"{op.family}*.cpp")
    assert any(f'"{op.name}"' in source.read_text() for source in sources)


@each_op
def test_samples(op: Op) -> None:
    samples = all_samples().get(op.name, [])
    assert len(samples) >= 10
    assert len({sample.name for sample in samples}) == len(samples)


def test_no_samples_without_an_op() -> None:
    assert set(all_samples()) == {op.name for op in OPS}


@each_op
def test_public_function(op: Op) -> None:
    """A docstring with all its parts, and the backend argument that every public function has."""
    function = getattr(ops, op.name)
    assert function.__module__ == f"sparsekernels.ops.{op.family}"
    doc = inspect.getdoc(function) or ""
    summary = doc.split("\n")[0]
    assert summary.endswith(".")
    assert len(summary) > 20
    for part in ("Equivalent", "Args", "Cost:"):
        assert part in doc, f"the docstring of {op.name} lacks {part}"
    backend = inspect.signature(function).parameters["backend"]
    assert backend.default is None
    assert backend.kind is inspect.Parameter.KEYWORD_ONLY


@each_op
def test_line_of_prose(op: Op) -> None:
    assert op.doc
    assert "\n" not in op.doc


@each_op
def test_benchmark(op: Op) -> None:
    benchmark = ROOT / "benchmarks" / "kernels" / f"bench_{op.family}.py"
    assert benchmark.exists()
    assert op.name in benchmark.read_text(), f"{benchmark.name} does not time {op.name}"


@pytest.mark.parametrize("name", sparsekernels.__all__)
def test_public_surface_is_documented(name: str) -> None:
    thing = getattr(sparsekernels, name)
    assert inspect.getdoc(thing)
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(value, "__func__", value)
        function = function.fget if isinstance(function, property) else function
        if not member.startswith("_") and inspect.isfunction(function):
            assert function.__doc__, f"{name}.{member} has no docstring"
