"""Runs the CUDA kernels on the CPU, thread after thread, through the tests of their ops. No GPU, only CUDA's headers.

    python .ci/emulate_cuda.py [arguments of pytest]

The kernels are elementwise: with no shared memory, barrier or warp operation in them, threads may run in any order,
one at a time. csrc/cuda is compiled as C++ with launches turned into loops, its bindings registered for CPU tensors in
place of the native CPU ones; a misaligned access ends the process. What stays unproved is what a GPU adds: speed, and
the runtime itself.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = re.compile(r"(\w+(?:<(?:[^<>;{}]|\([^()]*\))*>)?)\s*<<<([^;]*?)>>>\(")
RUNTIME = """
#pragma once
#define __grid_constant__
#define __launch_bounds__(...)
#include <cuda_runtime.h>
#include <stdexcept>
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
[[noreturn]] inline void __trap() { throw std::runtime_error("the kernel trapped"); }

template <class... Parameters, class... Arguments>
void emulate(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t, cudaStream_t, Arguments&&... arguments) {
  gridDim = grid;
  blockDim = block;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    for (unsigned j = 0; j < block.x * block.y * block.z; ++j) {
      blockIdx = {i % grid.x, i / grid.x, 0};
      threadIdx = {j % block.x, j / block.x % block.y, j / (block.x * block.y)};
      kernel(static_cast<Parameters>(arguments)...);
    }
  }
}
"""
ERRORS = """
#include <cuda_runtime.h>
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "none"; }
"""
PLUGIN = """
import torch
from sparsekernels.ops import backend

torch.ops.load_library("{library}")
backend._load_errors.pop("cpu", None)  # the emulated kernels stand in for a native CPU library, built or not
backend._native.update((name, "cpu") for name in {ops})
skipped = []


def pytest_runtest_logreport(report):
    if report.skipped:
        skipped.append(report.nodeid)


def pytest_sessionfinish(session):
    if skipped:
        session.exitstatus = 1  # nothing may be left out unseen
"""


def translate(source: Path, folder: Path) -> None:
    """Write a source of csrc/cuda as C++ for CPU tensors."""
    text = source.read_text()
    forbidden = re.search(r"__shared__|__syncthreads|__shfl|__ballot|atomic\w+\(", text)
    if forbidden:
        sys.exit(f"{source.name} uses {forbidden[0]}: its threads cannot run one after another")
    text, launches = LAUNCH.subn(r"emulate(\1, \2, ", text)
    if source.suffix == ".cu":
        assert launches, source
        text = '#include "runtime.h"\n' + text
    text = text.replace('"../', f'"{ROOT}/csrc/')
    text = text.replace("sparsekernels, CUDA, m", "sparsekernels, CPU, m").replace("is_cuda()", "is_cpu()")
    text = text.replace(
        "using torch::stable::accelerator::DeviceGuard;", "struct DeviceGuard { explicit DeviceGuard(int) {} };"
    )
    text = re.sub(r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream.*", "(void)device;", text)
    (folder / source.name.replace(".cu", "_kernels.cpp" if source.suffix == ".cu" else ".cu")).write_text(text)


def build(folder: Path) -> Path:
    torch = Path(sysconfig.get_path("purelib"), "torch")
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for source in (ROOT / "csrc/cuda").iterdir():
        translate(source, folder)
    (folder / "runtime.h").write_text(RUNTIME)
    (folder / "errors.cpp").write_text(ERRORS)
    library = folder / "_emulated.so"
    sources = [str(path) for path in folder.glob("*.cpp")]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-w"]
    flags += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        f"{torch}/include",
        "-isystem",
        f"{cuda}/include",
    ]
    link = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(["c++", *flags, "-o", str(library), *sources, *link], check=True)
    return library


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        library = build(Path(name))
        hosts = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cpp"))
        ops = re.findall(r'm\.impl\("(\w+)"', hosts)
        Path(name, "emulated.py").write_text(PLUGIN.format(library=library, ops=ops))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), name])}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated", "python_tests/ops/test_ops.py"]
        command += ["-k", f"native and ({' or '.join(f'{op}-' for op in ops)})", *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
