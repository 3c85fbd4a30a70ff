"""What setup.py builds, leaves out, and says about it: run for real, with stand-ins for torch and the compilers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]

# A compiler that leaves an empty file where it is told to put its output, and one that fails as compilers do.
WORKS = '#!/bin/sh\necho "{version}"\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
FAILS = '#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit\necho "op.cpp:3:1: error: boom" >&2\nexit 1\n'


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparsekernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, text: str = "", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def write_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    write(folder / "torch" / "include" / "header.h")
    write(folder / "torch" / "version.py", f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return folder / "torch"


class Tree:
    """A source tree with the real setup.py, one stand-in source of each kind, and a PATH of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        for name in ("sparsekernels/__init__.py", "csrc/cpu/op.cpp", "csrc/cuda/op.cpp", "csrc/cuda/op.cu", "LICENSE"):
            write(root / name)
        write(root / "README.md", "stand-in")
        write(root / "cuda/lib64/libcudart_static.a")
        nvcc = WORKS.format(version="release 13.0, V13.0.88\ncompute_80\ncompute_90")
        write(root / "cuda/bin/nvcc", nvcc, 0o755)
        self.compiler(WORKS)

    def compiler(self, script: str | None) -> None:
        (self.root / "bin/c++").unlink(missing_ok=True)
        if script:
            write(self.root / "bin/c++", script.format(version="c++ 1.0"), 0o755)

    def build(self, request: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        has_compiler = (self.root / "bin/c++").exists()
        environment = {
            "PATH": f"{self.root}/bin" + (os.pathsep + os.environ["PATH"] if has_compiler else ""),
            "PYTHONPATH": str(self.root / "site"),
            "CUDA_HOME": str(self.root / "cuda"),
            "SPARSEKERNELS_BUILD": request,
        }
        command = [sys.executable, "setup.py", "-q", *(arguments or ["build_native", "--inplace"])]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.root / "sparsekernels/_build.json").read_text())

    @property
    def libraries(self) -> list[str]:
        return sorted(path.name for path in (self.root / "sparsekernels").glob("*.so"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("request_", "torch", "compiler", "libraries", "said_of_cpu", "said_of_cuda"),
    [
        ("auto", ("2.13.0+cpu", None), None, [], "no C++ compiler was found", "no C++ compiler was found"),
        ("auto", ("2.13.0+cpu", None), WORKS, ["_cpu.so"], "compiled by c++ 1.0 against torch 2.13", "without CUDA"),
        ("auto", ("2.10.0", "12.8"), WORKS, ["_cpu.so"], "compiled", "of CUDA 12.8 and nvcc of 13.0"),
        ("auto", ("2.15.0", "13.2"), WORKS, ["_cpu.so", "_cuda.so"], "compiled", "sm_80 sm_90 by nvcc 13.0, host"),
        ("auto", ("2.9.1", None), WORKS, [], "torch 2.9.1 is too old", "torch 2.9.1 is too old"),
        ("auto", ("2.13.0+cpu", None), FAILS, [], "op.cpp:3:1: error: boom", "without CUDA"),
        ("none", ("2.15.0", "13.2"), WORKS, [], "does not ask for it", "does not ask for it"),
        ("cpu", ("2.15.0", "13.2"), WORKS, ["_cpu.so"], "compiled", "does not ask for it"),
        ("cuda", ("2.13.0+cpu", None), WORKS, ["_cpu.so"], "compiled", "only a CUDA torch can load it"),
        ("cuda", ("2.10.0", "12.8"), WORKS, ["_cpu.so", "_cuda.so"], "compiled", "compiled for sm_80 sm_90"),
    ],
)
def test_build(tree, request_, torch, compiler, libraries, said_of_cpu, said_of_cuda):
    write_torch(tree.root / "site", *torch)
    tree.compiler(compiler)
    for stale in ("_cpu.so", "_cuda.so"):
        write(tree.root / "sparsekernels" / stale, "from an older build")

    done = tree.build(request_)

    assert done.returncode == 0, done.stderr
    assert tree.libraries == libraries
    assert tree.facts["torch"] == (torch[0] if torch[0] != "2.9.1" else None)
    assert all((tree.root / "sparsekernels" / name).read_text() == "" for name in libraries)
    for name, said in (("cpu", said_of_cpu), ("cuda", said_of_cuda)):
        fact = tree.facts[name]
        assert fact["built"] == (f"_{name}.so" in libraries)
        assert said in fact["reason"]
        assert f"{name} library {'built' if fact['built'] else 'left out'}: {fact['reason']}" in done.stdout


@pytest.mark.parametrize(
    ("request_", "compiler", "message"),
    [
        ("cpu", None, "cpu library, SPARSEKERNELS_BUILD=cpu: no C++ compiler was found"),
        ("cpu", FAILS, "cpu library, SPARSEKERNELS_BUILD=cpu: building it failed: op.cpp:3:1: error: boom"),
        ("fast", WORKS, "SPARSEKERNELS_BUILD is one of auto, none, cpu, cuda; got 'fast'"),
    ],
)
def test_what_was_asked_for_by_name_must_succeed(tree, request_, compiler, message):
    write_torch(tree.root / "site", "2.13.0+cpu")
    tree.compiler(compiler)
    done = tree.build(request_)
    assert done.returncode != 0
    assert message in done.stderr


def test_warnings_are_errors_only_where_the_build_was_asked_for(tree):
    write_torch(tree.root / "site", "2.13.0+cpu")
    for request_, folder, strict in (("auto", "native", False), ("cuda", "native-strict", True)):
        assert tree.build(request_).returncode == 0
        script = (tree.root / "build" / folder / "_cpu.ninja").read_text()
        assert ("-Werror" in script) == strict
        assert "-fvisibility=hidden" in script
        assert "-ffast-math" not in script
        assert "-march" not in script


def test_wheel_tag_names_the_platform_only_with_a_library_inside(tree):
    write_torch(tree.root / "site", "2.13.0+cpu")
    for request_, pure in (("cpu", False), ("none", True)):
        assert tree.build(request_, "bdist_wheel", "--dist-dir", request_).returncode == 0
        (wheel,) = (tree.root / request_).glob("*-py3-none-*.whl")
        assert wheel.name.endswith("-any.whl") == pure


@pytest.mark.parametrize("through", ["path", "site"])
def test_torch_is_found_where_an_isolated_build_hides_it(setup, monkeypatch, tmp_path, through):
    root = write_torch(tmp_path, "2.11.0+cu130", "13.0")
    monkeypatch.setattr(setup.sys, "path", [str(tmp_path)] if through == "path" else [])
    monkeypatch.setattr(setup.site, "getsitepackages", lambda: [str(tmp_path)] if through == "site" else [])
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    assert setup.find_torch() == (root, "2.11.0+cu130", "13.0")
    shutil.rmtree(root)
    with pytest.raises(setup.Unavailable, match="torch is not installed"):
        setup.find_torch()


def test_toolkit_is_told_by_its_static_runtime(setup, monkeypatch, tree):
    wrapper = write(tree.root / "wrapper/bin/nvcc", "#!/bin/sh\nexec nvcc\n", 0o755)
    monkeypatch.setenv("CUDA_HOME", str(wrapper.parents[1]))
    monkeypatch.setenv("CUDA_PATH", str(tree.root / "cuda"))
    assert setup.find_cuda() == (tree.root / "cuda", "13.0")


def test_architectures_are_those_asked_for_that_nvcc_knows(setup, monkeypatch, tree):
    nvcc = str(tree.root / "cuda/bin/nvcc")
    assert setup.find_archs(nvcc) == ["80", "90"]
    monkeypatch.setenv("SPARSEKERNELS_CUDA_ARCHS", "9.0;70")
    assert setup.find_archs(nvcc) == ["90"]
    monkeypatch.setenv("SPARSEKERNELS_CUDA_ARCHS", "70")
    with pytest.raises(setup.Unavailable, match=r"none of the architectures asked for \(70\)"):
        setup.find_archs(nvcc)


@pytest.mark.parametrize("with_ninja", [True, False])
def test_steps_run_with_and_without_ninja(setup, monkeypatch, tmp_path, with_ninja):
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    if not with_ninja:
        monkeypatch.setattr(setup, "find_spec", lambda name: None)
        monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    write(tmp_path / "source", "$money")
    first, second = Path("out/first"), Path("out/second")
    steps = [
        setup.Step("compile", first, [Path("source")], f"cat source > {first}; printf $HOME >> {first}"),
        setup.Step("link", second, [first], f"cat {first} {first} > {second}"),
    ]
    setup.run_steps(steps, Path("out/build.ninja"))
    assert (tmp_path / second).read_text() == 2 * f"$money{os.environ['HOME']}"
    assert (tmp_path / "out/.ninja_log").exists() == with_ninja

    write(tmp_path / "source", "changed")
    broken = [steps[0]._replace(command="echo 'x.cpp:1: error: boom'; exit 1"), steps[1]]
    with pytest.raises(setup.CompileError, match="boom"):
        setup.run_steps(broken, Path("out/build.ninja"))


def test_version_is_the_same_everywhere():
    sparsekernels = pytest.importorskip("sparsekernels")
    version = Distribution({"src_root": str(ROOT)})
    version.parse_config_files([str(ROOT / "pyproject.toml")])
    assert version.get_version() == sparsekernels.__version__
