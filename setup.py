"""Builds what `sparsekernels` uses beside its Python code: two shared libraries, each of them optional.

    sparsekernels/_cpu.so    csrc/cpu/*.cpp                     wherever there is a C++ compiler
    sparsekernels/_cuda.so   csrc/cuda/*.cu, csrc/cuda/*.cpp    where nvcc meets a torch of the same CUDA major version

SPARSEKERNELS_BUILD=auto|none|cpu|cuda   auto, the default, builds what the machine can and says what it leaves out.
                                         cpu, or cuda for both, means it: a failure or a warning ends the installation.
SPARSEKERNELS_CUDA_ARCHS="80 90"         compute capabilities to compile for; the newest of them as PTX too
CXX, CUDA_HOME                           compiler and CUDA toolkit, where the ones found first will not do

The libraries hold no Python symbols and keep to torch's stable ABI: one build serves every Python and every torch from
2.10 on. It takes torch's headers, and libtorch to link with, but never `import torch`. What was built, and why the rest
was not, is kept in sparsekernels/_build.json; `python -m sparsekernels` prints it.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
SOURCES = {"cpu": ["csrc/cpu/*.cpp"], "cuda": ["csrc/cuda/*.cu", "csrc/cuda/*.cpp"]}
REQUESTS = {"auto": ["cpu", "cuda"], "none": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"]}
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
NINJA_RULES = """
rule compile
  command = $do
  description = $in
  depfile = $out.d
  deps = gcc
rule link
  command = $do
  description = $out
"""
ERROR = r"\berror(:| #)|undefined reference"  # how compilers and linkers mark the line that matters


class Unavailable(Exception):
    """Why a library cannot be built here, in one plain sentence."""


class Step(NamedTuple):
    rule: str  # one of NINJA_RULES
    output: Path
    inputs: list[Path]
    command: str


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def find_torch() -> tuple[Path, str, str | None]:
    """Folder, version and CUDA version of the torch that will run the package.

    pip's isolated build hides that torch from sys.path, but site and sysconfig still know where it is.
    """
    for folder in [*sys.path, *site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]:
        root = Path(folder, "torch")
        if (root / "version.py").is_file() and (root / "include").is_dir():
            facts = runpy.run_path(str(root / "version.py"))
            version = str(facts["__version__"])
            if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 10):
                raise Unavailable(f"torch {version} is too old: the native part needs torch 2.10 or newer")
            return root, version, facts.get("cuda")
    raise Unavailable("torch is not installed here: install torch first, then sparsekernels again")


def find_compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"no C++ compiler was found ({f'CXX={asked[0]}' if asked else 'c++, g++ or clang++ on PATH'})")


def find_cuda() -> tuple[Path, str]:
    """Root and version of a whole toolkit, told by its static runtime: an nvcc on PATH may be a script out of place."""
    nvcc = shutil.which("nvcc")
    beside_nvcc = Path(nvcc).resolve().parents[1] if nvcc else None
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), beside_nvcc, "/usr/local/cuda"):
        if root and Path(root, "bin/nvcc").is_file() and Path(root, "lib64/libcudart_static.a").is_file():
            release = re.search(r"release ([\d.]+)", output_of(f"{root}/bin/nvcc", "--version"))
            return Path(root), release[1] if release else "unknown"
    raise Unavailable("no CUDA toolkit was found (bin/nvcc beside lib64/libcudart_static.a; CUDA_HOME can name one)")


def find_archs(nvcc: str) -> list[str]:
    """The compute capabilities asked for, as far as this nvcc knows them, oldest first."""
    known = re.findall(r"compute_(\w+)", output_of(nvcc, "--list-gpu-arch"))
    asked = re.findall(r"\w+", os.environ.get("SPARSEKERNELS_CUDA_ARCHS", "80 90").replace(".", ""))
    archs = sorted({*known} & {*asked}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    if not archs:
        raise Unavailable(f"this nvcc compiles for none of the architectures asked for ({' '.join(asked)})")
    return archs


def plan(name: str, library: Path, strict: bool) -> tuple[list[Step], str, bool]:
    """The steps that make a library, a sentence that says how it is made, and whether it may be installed."""
    (torch, version, torch_cuda), compiler = find_torch(), find_compiler()
    host_flags = [*HOST_FLAGS, *(["-Werror"] if strict else [])]
    commands = {".cpp": [*compiler, *host_flags, *CXX_FLAGS, "-Icsrc", "-isystem", f"{torch}/include"]}
    link = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", *(["-Wl,--no-undefined"] if sys.platform == "linux" else [])]
    how = f"compiled by {output_of(*compiler, '--version').splitlines()[0]} against torch {version}"
    if name == "cuda":
        cuda, toolkit = find_cuda()
        if not strict and not torch_cuda:
            raise Unavailable(f"torch {version} is a build without CUDA")
        if not strict and torch_cuda.split(".")[0] != toolkit.split(".")[0]:
            raise Unavailable(f"torch {version} is of CUDA {torch_cuda} and nvcc of {toolkit}: their majors differ")
        archs = find_archs(f"{cuda}/bin/nvcc")
        targets = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
        gencode = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets]
        warnings = ["-Werror=all-warnings"] if strict else []
        host = f"-Xcompiler={','.join(host_flags)}"
        commands[".cu"] = [f"{cuda}/bin/nvcc", "-O3", "-std=c++17", "-Icsrc", "-Xptxas=-v", host, *gencode, *warnings]
        # USE_CUDA makes torch declare its stream getter. That lives in libtorch_cuda: beside a CPU torch the link gets
        # a null instead, which proves that everything compiles and links, but is not to be installed.
        commands[".cpp"] += ["-DUSE_CUDA", "-isystem", f"{cuda}/include"]
        link += ["-ltorch_cuda" if torch_cuda else "-Wl,--defsym=aoti_torch_get_current_cuda_stream=0"]
        # The runtime is linked in whole and its symbols hidden: torch has a libcudart of its own in the process.
        link += [f"-L{cuda}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        how = f"compiled for {' '.join(f'sm_{arch}' for arch in archs)} by nvcc {toolkit}, host code {how}"

    steps = []
    for source in sorted(path.relative_to(ROOT) for pattern in SOURCES[name] for path in ROOT.glob(pattern)):
        out = library.parent / f"{name}-{source.name}.o"
        command = shlex.join([*commands[source.suffix], "-MD", "-MF", f"{out}.d", "-c", f"{source}", "-o", f"{out}"])
        # ptxas reports registers and spills of every kernel: kept beside the object, shown if the compilation fails.
        steps.append(Step("compile", out, [source], f"{command} > {out}.log 2>&1 || {{ cat {out}.log; exit 1; }}"))
    if not steps:
        raise Unavailable(f"its sources are missing ({', '.join(SOURCES[name])})")
    objects = [step.output for step in steps]
    link = [*compiler, "-shared", "-o", f"{library}", *map(str, objects), *link]
    return [*steps, Step("link", library, objects, shlex.join(link))], how, name == "cpu" or bool(torch_cuda)


def run_steps(steps: list[Step], script: Path) -> None:
    """Let ninja run the steps that are out of date; where there is no ninja, run them all, one after another."""
    (ROOT / script.parent).mkdir(parents=True, exist_ok=True)
    text = f"builddir = {script.parent}\n{NINJA_RULES}"
    for step in steps:
        text += f"build {step.output}: {step.rule} {' '.join(map(str, step.inputs))}\n"
        text += f"  do = {step.command.replace('$', '$$')}\n"
    (ROOT / script).write_text(text)
    ninja = f"{shlex.quote(sys.executable)} -m ninja" if find_spec("ninja") else shutil.which("ninja")
    for command in [f"{ninja} -f {script}"] if ninja else [step.command for step in steps]:
        done = subprocess.run(command, shell=True, cwd=ROOT, text=True, capture_output=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, flush=True)
            errors = [line.strip() for line in (done.stdout + done.stderr).splitlines() if re.search(ERROR, line)]
            raise CompileError(f"building it failed: {(errors or ['see the output above'])[0]}")


class BuildNative(Command):
    """The step of `build` that makes the libraries and writes _build.json; in place for an editable install."""

    description = "build the native libraries"
    user_options = [("inplace", "i", "put them into the source tree"), ("build-lib=", "b", "or into this folder")]
    boolean_options = ["inplace"]
    editable_mode = False  # set by setuptools

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib = None
        self.built: list[str] = []

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))
        self.request = os.environ.get("SPARSEKERNELS_BUILD") or "auto"
        if self.request not in REQUESTS:
            raise OptionError(f"SPARSEKERNELS_BUILD is one of {', '.join(REQUESTS)}; got {self.request!r}")

    def run(self) -> None:
        folder = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        package = folder / "sparsekernels"
        package.mkdir(parents=True, exist_ok=True)
        facts = {"version": self.distribution.get_version(), "SPARSEKERNELS_BUILD": self.request, "torch": None}
        with suppress(Unavailable):
            facts["torch"] = find_torch()[1]
        for name in SOURCES:
            (package / f"_{name}.so").unlink(missing_ok=True)  # an older build must not outlive its sources
            reason = self.build_library(name, package)
            built = name in self.built
            facts[name] = {"built": built, "reason": reason}
            print(f"sparsekernels: {name} library {'built' if built else 'left out'}: {reason}", flush=True)
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def build_library(self, name: str, package: Path) -> str:
        if name not in REQUESTS[self.request]:
            return f"SPARSEKERNELS_BUILD={self.request} does not ask for it"
        strict = self.request != "auto"
        library = Path("build", "native-strict" if strict else "native", f"_{name}.so")
        try:
            steps, how, installable = plan(name, library, strict)
            run_steps(steps, library.with_suffix(".ninja"))
        except (Unavailable, CompileError) as reason:
            if strict:
                raise CompileError(f"{name} library, SPARSEKERNELS_BUILD={self.request}: {reason}") from None
            return str(reason)
        if not installable:
            return f"only a CUDA torch can load it; as a check it was {how}"
        shutil.copy2(ROOT / library, package)
        self.built.append(name)
        return how


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class Wheel(bdist_wheel):
    """Tags a wheel with the platform if it holds a library, and never with a version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not self.get_finalized_command("build_native").built
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel})
