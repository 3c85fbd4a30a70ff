"""What Triton's interpreter lets pass and a GPU does not, and paths of the launchers that small samples do not take."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from samples import all_samples
from samples.case import Sample

from sparsekernels.ops import OPS, backend

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = importlib.import_module("triton.language")
SAMPLES = all_samples()
INTERPRETED = not torch.cuda.is_available()
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter; there is a GPU here")
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="steps on the device need a GPU")


class Watcher:
    """Stands between the interpreter and memory. A launch fails if it touches anything but its tensors, or if the order
    of its programs could matter: an address written twice, or written by one program and read by another."""

    def __init__(self, module) -> None:
        self.module = module
        self.memory = module._interpreter
        self.reset(())

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def reset(self, arguments) -> None:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.numel()]
        spans = [1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        self.owned = [(x.data_ptr(), x.data_ptr() + n * x.itemsize) for x, n in zip(tensors, spans, strict=True)]
        self.seen: dict[str, list[np.ndarray]] = {"read": [], "written": [], "counted": []}

    def note(self, kind, pointers, mask, size) -> None:
        live = pointers[mask.astype(bool)].astype(np.int64)
        inside = np.zeros(live.shape, bool)
        for begin, end in self.owned:
            inside |= (live >= begin) & (live + size <= end)
        assert inside.all(), f"{(~inside).sum()} addresses outside every tensor are {kind}"
        program = np.full(live.shape, self.module.interpreter_builder.grid_idx[0])
        self.seen[kind].append(np.stack([live, program], axis=1))

    def load(self, pointers, mask, other, dtype):
        self.note("read", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.note("written", pointers, mask, value.dtype.itemsize)
        return self.memory.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, order):
        self.note("counted", pointers, mask, value.dtype.itemsize)
        return self.memory.atomic_rmw(operation, pointers, value, mask, order)

    def check(self) -> None:
        read, written, counted = (np.concatenate([np.empty((0, 2), np.int64), *x]) for x in self.seen.values())
        addresses, writer = np.unique(written[:, 0], return_index=True)
        assert len(addresses) == len(written), "an address is written twice"
        assert not np.isin(counted[:, 0], written[:, 0]).any(), "an address is both written and counted in"
        assert not np.isin(counted[:, 0], read[:, 0]).any(), "an address is both read and counted in"
        also_read = read[np.isin(read[:, 0], addresses)]
        by = written[writer[np.searchsorted(addresses, also_read[:, 0])], 1]
        assert (by == also_read[:, 1]).all(), "an address is written by one program and read by another"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("triton.runtime.interpreter")
    watcher = Watcher(module)
    run = module.GridExecutor.__call__

    def watched_run(self, *arguments, **options):
        watcher.reset([*arguments, *options.values()])
        run(self, *arguments, **options)
        watcher.check()

    monkeypatch.setattr(module, "_interpreter", watcher)
    monkeypatch.setattr(module.GridExecutor, "__call__", watched_run)


@triton.jit
def copy_too_far(source, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(source + offsets, mask=offsets < n), mask=offsets <= n)


@triton.jit
def read_too_far(source, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(source + offsets, mask=offsets <= n), mask=offsets < n)


@triton.jit
def write_the_same(source, out, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(source + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def shift_in_place(source, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(out + offsets + 1, mask=offsets + 1 < n)
    tl.store(out + offsets, value, mask=offsets < n)


@interpreted_only
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (copy_too_far, "outside every tensor are written"),
        (read_too_far, "outside every tensor are read"),
        (write_the_same, "written twice"),
        (shift_in_place, "read by another"),
    ],
    ids=["store", "load", "two-writers", "writer-and-reader"],
)
def test_the_watcher_sees(kernel, fault: str, watched: None) -> None:
    buffer = torch.zeros(40)
    with pytest.raises(Exception, match=fault):
        kernel[(2,)](buffer[20:30], buffer[:10], 10, BLOCK=8)


@interpreted_only
@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(sample, id=f"{op.name}-{sample.name}")
        for op in OPS
        for sample in [s for s in SAMPLES[op.name] if not s.heavy][::3]
    ],
)
def test_launches_keep_to_their_memory(sample: Sample, watched: None) -> None:
    case = sample.case(torch.device("cpu"))
    case.call(*case.args, **case.kwargs, backend="triton")


@interpreted_only
def test_blocks_of_a_product_keep_to_their_memory(watched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("sparsekernels.ops.masked_grad.triton"), "BLOCK_BYTES", 4 * 11 * 5)
    grad, x = torch.randn(29, 17), torch.randn(29, 11)
    found = backend.triton_kernel("masked_grad_linear")(grad, x, torch.arange(17 * 11), (1, 1))
    torch.testing.assert_close(found.view(17, 11), grad.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 2, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_topk_by_programs(
    programs: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that owns many blocks goes on where its last one ended, ties included."""
    monkeypatch.setattr(importlib.import_module("sparsekernels.ops.topk.triton"), "PROGRAMS", programs)
    scores = [(torch.randn(n) * 3).round().to(dtype).to(device) for n in (5000, 0, 2047, 1)]
    flat = torch.cat(scores)
    for k in (1, 1234, 7047, 7048):
        positions, counts = backend.triton_kernel("topk")(scores, k, False)
        chosen = flat.argsort(descending=True, stable=True)[:k].sort().values
        starts = torch.tensor([0, 5000, 5000, 7047], device=device).repeat_interleave(counts)
        assert torch.equal(positions + starts, chosen)


def test_embedding_adds_in_the_order_of_tokens(device: torch.device) -> None:
    """Bit for bit a loop over the tokens: the sizes of the terms make any other order show."""
    ids = torch.randint(0, 3, (200,))
    grad = torch.randn(200, 5) * 10 ** torch.randint(-4, 5, (200, 1)).float()
    expected = torch.zeros(3, 5)
    for token, row in zip(ids.tolist(), grad, strict=True):
        expected[token] += row
    run = backend.triton_kernel("masked_grad_embedding")
    rows = run(grad.to(device), ids.to(device), torch.arange(3, device=device), (1, 5), -1)
    elements = run(grad.to(device), ids.to(device), torch.arange(15, device=device), (1, 1), -1)
    assert torch.equal(rows.cpu(), expected.flatten())
    assert torch.equal(elements.cpu(), expected.flatten())


def test_fisher_embedding_adds_in_the_order_of_tokens(device: torch.device) -> None:
    """Likewise, sample by sample, before it squares."""
    ids = torch.randint(0, 3, (2, 200))
    grad = torch.randn(2, 200, 5) * 10 ** torch.randint(-4, 5, (2, 200, 1)).float()
    run = backend.triton_kernel("fisher_embedding_")
    sums = torch.zeros(2, 3, 5)
    for b in range(2):
        for token, row in zip(ids[b].tolist(), grad[b], strict=True):
            sums[b, token] += row
        for positions, rows in ((None, False), (torch.arange(3), True), (torch.arange(15), False)):
            total = torch.zeros((15,) if positions is not None and not rows else (3, 5), device=device)
            # The other sample has no gradients: adding its zeros changes no bits.
            alone = torch.zeros_like(grad)
            alone[b] = grad[b]
            selected = None if positions is None else positions.to(device)
            run(alone.to(device), ids.to(device), total, None, selected, rows, -1)
            assert torch.equal(total.cpu().view(3, 5), sums[b].square())


@interpreted_only
def test_fisher_embedding_never_writes_outside(watched: None) -> None:
    """Ids that are no row of the table: the raw op takes them on trust, but memory stays whole."""
    memory = torch.zeros(9, 4)
    ids = torch.tensor([[0, 3, 2], [-1, 2, 5]])
    backend.triton_kernel("fisher_embedding_")(torch.ones(2, 3, 4), ids, memory[3:6], None, None, False, -1)
    assert memory[:, 0].tolist() == [0, 0, 0, 1, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_move_unchanged(dtype: torch.dtype, device: torch.device) -> None:
    """gather and scatter_ do not know floating point: the payload of a NaN survives them."""
    integers = {torch.float32: (torch.int32, 0x7F812345), torch.bfloat16: (torch.int16, 0x7FA5)}
    integer, nan = integers[dtype]
    source = torch.full((9,), nan, dtype=integer, device=device).view(dtype)
    positions = torch.tensor([1, 4, 8], device=device)
    values = backend.triton_kernel("gather")(source, positions, (1, 1))
    assert values.view(integer).tolist() == [nan] * 3
    target = torch.zeros_like(source)
    backend.triton_kernel("scatter_")(target, positions, values, (1, 1))
    assert target.view(integer).tolist() == [nan if i in (1, 4, 8) else 0 for i in range(9)]


OPTIONS = (1e-2, 0.9, 0.999, 0.1, 1e-8, False)


def step_in_place(run, steps: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Two tensors after one compact step, made from the same numbers each time."""
    generator = torch.Generator().manual_seed(3)
    positions = torch.arange(0, 60, 3, dtype=torch.int32, device=device)
    made = [[torch.rand(20, generator=generator).to(device) for _ in range(4)] for _ in range(2)]
    values, grads, exp_avgs, exp_avg_sqs = zip(*made, strict=True)
    weights = [torch.zeros(60, device=device) for _ in range(2)]
    run(values, grads, exp_avgs, exp_avg_sqs, [], steps, [positions] * 2, weights, [1, 1] * 2, *OPTIONS)
    return [*values, *exp_avgs, *exp_avg_sqs, *weights]


def test_scalars_in_memory_are_those_of_the_arguments(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that steps on the device take, taken with steps on the host."""
    run = backend.triton_kernel("adamw_")
    steps = [torch.tensor(1.0), torch.tensor(7.0)]
    expected = step_in_place(run, steps, device)
    asked = []
    module = importlib.import_module("sparsekernels.ops.adamw.triton")
    monkeypatch.setattr(module, "_scalars_in_memory", lambda *_: asked.append(True) or True)
    found = step_in_place(run, steps, device)
    assert len(asked) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@needs_gpu
@pytest.mark.parametrize("name", ["triton", "native"])
def test_steps_on_the_device_are_not_waited_for(name: str, device: torch.device) -> None:
    reason = backend.why_not("adamw_", name, "cuda")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    run = backend.select("adamw_", "cuda", name)
    steps = [torch.tensor(1.0), torch.tensor(7.0)]
    expected = step_in_place(lambda *args: run(*map(_listed, args)), steps, device)
    on_device = [step.to(device) for step in steps]

    def run_without_waiting(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(*map(_listed, args))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for a, b in zip(step_in_place(run_without_waiting, on_device, device), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def _listed(argument):
    return list(argument) if isinstance(argument, tuple) else argument
