"""Every Triton kernel, compiled for sm_80 and sm_90 without a GPU, just as its launcher would have it compiled.

The compiling is done by this file run as a script, in a process of its own: where Triton interprets, it cannot compile.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekernels
from sparsekernels.ops import OPS, backend

ARCHITECTURES = (80, 90)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FAMILIES = sorted({op.family for op in OPS})
SHARED_BYTES = 48 * 1024  # what a kernel gets without asking
# Two rows of 4096 keys of 64 bits; pairs of tiles of activations, three or four times. Triton asks; a GPU has as much.
ASKING = {
    "ks_kernel": {80: 64 * 1024, 90: 64 * 1024},
    "fisher_linear_kernel": {80: 65 * 1024, 90: 129 * 1024},
    "block_product_kernel": {90: 64 * 1024},
}
pytestmark = pytest.mark.xdist_group("aot")  # all of them read what one process compiles


def missing_tools() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    tools = Path(spec.origin).parent / "backends/nvidia/bin"
    missing = [name for name in ("ptxas", "cuobjdump") if not (tools / name).exists()]
    return f"this triton comes without {' and '.join(missing)}" if missing else None


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What became of every kernel, for each way that its launcher calls it."""
    reason = missing_tools()
    if reason is not None:
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(sparsekernels.__file__).parents[1])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_compiled(compiled: list[dict[str, Any]]) -> None:
    kernels = {
        name
        for family in FAMILIES
        for name in vars(importlib.import_module(f"sparsekernels.ops.{family}.triton"))
        if name.endswith("_kernel")
    }
    for architecture in ARCHITECTURES:
        assert {each["kernel"] for each in compiled if each["architecture"] == architecture} == kernels


def test_no_register_spills(compiled: list[dict[str, Any]]) -> None:
    assert all(each["registers"] > 0 for each in compiled)
    assert [each for each in compiled if each["local"] or each["stack"]] == []


def allowed(each: dict[str, Any]) -> int:
    return ASKING.get(each["kernel"], {}).get(each["architecture"], SHARED_BYTES)


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    assert [each for each in compiled if each["shared"] > allowed(each)] == []
    assert max(each["shared"] for each in compiled) > 0, "topk shares histograms: nothing was read"


def test_double_precision_only_where_it_was_asked_for(compiled: list[dict[str, Any]]) -> None:
    """fp64 runs at a 64th of the speed on most GPUs: a Python float must not pull a kernel up to it."""
    assert [each for each in compiled if each["double"] and each["dtype"] != "torch.float64"] == []
    assert any(each["double"] for each in compiled)


def test_compact_arrays_move_in_vectors(compiled: list[dict[str, Any]]) -> None:
    """16 bytes a thread, for elements as for rows, columns and blocks; but not for blocks of 5 x 7."""
    for each in compiled:
        if each["kernel"] == "adamw_kernel" and each["dtype"] == "torch.float32" and each["options"]["BLOCK_D"] != "8":
            assert each["vectors"] >= 2, each  # of both moments at the least


def test_tensor_cores_multiply_blocks(compiled: list[dict[str, Any]]) -> None:
    """Never fp32 rounded to TF32, unless torch's matmul may do that too."""
    products = [each for each in compiled if each["kernel"] == "block_product_kernel"]
    for each in products:
        narrow = each["dtype"] in ("torch.bfloat16", "torch.float16") or each["options"]["PRECISION"] == "tf32"
        assert each["tensor_cores"] == narrow, each
    dtypes = [each["dtype"] for each in products if each["tensor_cores"] and each["architecture"] == 90]
    assert [dtypes.count(f"torch.{name}") for name in ("bfloat16", "float16", "float32", "float64")] == [6, 6, 6, 0]


def calls(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """One call for each way to launch a kernel; nothing runs, so the numbers do not matter."""
    kernel = backend.triton_kernel
    dense = torch.zeros(64, 2048, dtype=dtype)
    options = (1e-3, 0.9, 0.999, 0.1, 1e-8, False)
    elements, few = torch.arange(2048, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    selections = [(few, (1, 2048)), (elements, (1, 1)), (elements[:80], (64, 1)), (few, (16, 32))]
    if dtype == torch.float32:
        selections += [(elements.long(), (1, 1)), (few, (5, 7))]
    for positions, tile in selections:
        size = len(positions) * math.prod(tile)
        moments = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32))
        yield lambda p=positions, t=tile: kernel("gather")(dense, p, t)
        yield lambda p=positions, t=tile, v=moments: kernel("scatter_")(dense, p, v, t)
        for maximum in ([], [moments]):
            state = ([moments], [moments], maximum, [torch.tensor(1.0)], [positions])
            yield lambda v=moments, s=state, t=tile: kernel("adamw_")([v], [v], *s, [dense], t, *options)
            yield lambda s=state, t=tile: kernel("adamw_")([dense], [dense], *s, [], t, *options)
        one, step_counts = torch.tensor(1.0), torch.ones(len(positions))
        for step, rest in ((step_counts, ()), (one, (one, one, one)), (step_counts, (one, one, one))):
            state = ([moments], [moments], [], [step], [positions], [dense], tile, *options, *rest)
            yield lambda v=moments, s=state: kernel("adamw_")([v], [v], *s)
        narrow = moments.bfloat16() if dtype == torch.bfloat16 else moments
        rest = (tile, *options, None, None, None, [3, 0])
        for step in (one, step_counts):
            state = ([narrow], [narrow], [narrow], [step], [positions])
            yield lambda v=moments, s=state, r=rest: kernel("adamw_")([v], [v], *s, [dense], *r)
            yield lambda s=state, r=rest: kernel("adamw_")([dense], [dense], *s, [], *r)
        if tile != (64, 1):  # of a table, columns are those of a narrower one
            tokens = torch.zeros(32, 2048, dtype=dtype), torch.arange(32)
            yield lambda p=positions, t=tile, k=tokens: kernel("masked_grad_embedding")(*k, p, t, 0)
    for shape in ((3, 2048), (2048,)):
        moments = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
        tokens = torch.zeros(32, 2048, dtype=dtype), torch.arange(32)
        ways = ((None, None, 1, []), (torch.arange(32).int(), moments, 32, []), (None, moments, 1, [3, 1, 0]))
        for slots, maximum, lines, rounding in ways:
            scales = torch.ones(lines, 2, dtype=moments.dtype)
            listed = (*tokens, slots, moments, moments, maximum, scales, 0.9, 0.999, 1e-8, False, rounding)
            yield lambda a=listed: kernel("adamw_rows_")(torch.zeros(64, 2048, dtype=dtype), *a)
    for chosen in (elements[:7], torch.arange(64 * 2048, dtype=torch.int32), torch.arange(64 * 2048)):
        activations = torch.zeros(32, 64, dtype=dtype), torch.zeros(32, 2048, dtype=dtype)
        yield lambda a=(*activations, chosen): kernel("masked_grad_linear")(*a, (1, 1))
    yield from block_calls(dtype)
    yield from fisher_calls(dtype)
    for rank in (1, 7, 48):
        wide = torch.promote_types(dtype, torch.float32)
        u, v = torch.zeros(2, 32, rank, dtype=wide), torch.zeros(2, 2048, rank, dtype=wide)
        yield lambda u=u, v=v: kernel("singular_value_grad")(dense.view(2, 32, 2048), u, v)
        tokens = torch.zeros(2, 16, 32, dtype=dtype), torch.zeros(2, 16, 2048, dtype=dtype)
        for per_sample in (False, True):
            yield lambda u=u[0], v=v[0], p=per_sample, t=tokens: kernel("singular_value_grad_linear")(*t, u, v, p)
    if dtype == torch.float32:
        parts = importlib.import_module("sparsekernels.ops.singular_values.triton").bf16_parts
        yield lambda: parts(dense)
    for alternative in (-1, 0, 1):
        for n in (8, 4096):  # the smallest block and the largest
            yield lambda a=alternative, n=n: kernel("ks_2samp")(dense.view(-1, n), dense.view(-1, n), a)
    yield from gates_calls(dtype)
    yield lambda: kernel("topk")([dense, dense[:, :7].contiguous()], 5, False)
    yield lambda: kernel("topk")([dense], 5, True)


def block_calls(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Products of every size, the last of columns; of fp32 with TF32, too."""
    activations, positions = torch.zeros(32, 2048, dtype=dtype), torch.arange(3)
    for precision in ("tf32", "ieee") if dtype == torch.float32 else ("ieee",):
        torch.backends.cuda.matmul.fp32_precision = precision
        for block in ((128, 128), (64, 64), (32, 16), (16, 256), (5, 7), (2048, 1)):
            arguments = (activations, activations, positions, block)
            yield lambda a=arguments: backend.triton_kernel("masked_grad_linear")(*a)


def gates_calls(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Each kind, drawn and not; with all that may be absent and without."""
    kernel = backend.triton_kernel
    wide = torch.promote_types(dtype, torch.float32)
    logits, weight, bias = torch.zeros(48, dtype=wide), torch.zeros(96, 48, dtype=dtype), torch.zeros(96, dtype=dtype)
    for kind in range(3):
        yield lambda k=kind: kernel("gate_probabilities")([logits, logits], k, 0.5)
        for key in (None, torch.tensor([5])):
            number = (kind, 0.5, key)
            yield lambda n=number: kernel("gate_values")(logits, *n, 2)
            yield lambda n=number: kernel("gate_gradient")(weight, weight, logits, *n, 0, 1)
            every = (bias, logits, logits)
            for transposed, shape, given in (
                (False, (96, 48), every), (True, (48, 96), every),
                (False, (96, 48), (None, None, logits)), (True, (48, 96), (bias, logits, None)),
            ):  # fmt: skip
                rest = (*number, transposed, dtype, 2)
                yield lambda g=given, r=rest, s=shape: kernel("gated_weight")(weight.view(s), *g, *r)
    yield lambda: kernel("gate_gradient")(weight.view(48, 96), weight.view(48, 96), logits, 0, 0.5, None, 0, 2)
    for columns in (torch.arange(0, 48, 3), torch.arange(0, 48, 3, dtype=torch.int32)):
        yield lambda c=columns: kernel("take_columns")(weight, c)
        yield lambda c=columns: kernel("put_columns")(weight[:, ::3].contiguous(), c, 48)


def fisher_calls(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Whole, by rows, by many elements and by few of them; with either sum and with both."""
    kernel = backend.triton_kernel
    grad, input, ids = torch.zeros(2, 16, 64, dtype=dtype), torch.zeros(2, 16, 2048, dtype=dtype), torch.zeros(2, 16)
    wide = torch.promote_types(dtype, torch.float32)
    elements = torch.arange(0, grad.shape[2] * input.shape[2], 2, dtype=torch.int32)
    rows = torch.arange(3)
    norms = torch.zeros(2, dtype=wide)
    selections = ((None, False, grad.shape[2]), (rows, True, 3), (elements, False, 0), (elements[:7], False, 0))
    for positions, by_rows, height in selections:
        total = torch.zeros((height, input.shape[2]) if height else len(positions), dtype=wide)
        for sums in ((total, norms), (total, None), (None, norms)):
            selected = (*sums, positions, by_rows)
            yield lambda a=selected: kernel("fisher_linear_")(grad, input, *a)
            yield lambda a=selected: kernel("fisher_embedding_")(input, ids.long(), *a, 0)
    if dtype == torch.bfloat16:  # enough of a weight for large tiles
        whole = torch.zeros(2048, 1024)
        for count in (16, 64):
            tokens = torch.zeros(2, count, 2048, dtype=dtype), torch.zeros(2, count, 1024, dtype=dtype)
            for sums in ((whole, norms), (whole, None), (None, norms)):
                yield lambda a=(*tokens, *sums): kernel("fisher_linear_")(*a, None, False)
    for x, positions in ((None, None), (grad, None), (None, rows), (grad, rows)):
        total = torch.zeros(64 if positions is None else 3, dtype=wide)
        yield lambda a=(x, total, norms, positions): kernel("fisher_vector_")(grad, *a)
    yield lambda: kernel("fisher_squares_")([total], [total.to(dtype)])


class Target:
    """A driver for a GPU that is not there: enough for Triton to compile for it."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_everything() -> list[dict[str, Any]]:
    import triton
    from triton.runtime.jit import JITFunction

    made: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self, *arguments, **options):
        kernel = run(self, *arguments, **{**options, "warmup": True})
        if kernel.hash not in made:
            chosen = {name: str(value) for name, value in options.items()}
            made[kernel.hash] = {"kernel": self.__name__, "options": chosen, **label, **facts_of(kernel)}
        return kernel

    JITFunction.run = compile_only
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(Target(architecture))
        for dtype in (*DTYPES, torch.float16):
            label = {"architecture": architecture, "dtype": str(dtype)}
            for call in calls(dtype) if dtype in DTYPES else block_calls(dtype):
                call()
    return list(made.values())


def facts_of(kernel: Any) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "shared": kernel.metadata.shared,
        "double": ".f64" in ptx,
        "tensor_cores": "mma." in ptx,
        "vectors": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
    }


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
