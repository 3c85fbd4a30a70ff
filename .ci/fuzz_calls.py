"""Calls of raw ops with arguments that nobody should pass; fuzz_ops.py runs it: FIRST CALLS SECONDS FOLDER.

A call is known by its number: that of a random generator which picks an op of the table, one of its samples, and what
is done to the arguments. Children make a few hundred calls each and note them in FOLDER before they make them.
"""

import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from samples import all_samples
from samples.case import Sample
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsekernels.ops import OPS, backend

BATCH = 400  # calls of a child
HANGS = 120  # seconds without a new call
ENOUGH = 20  # failures
PAD = 64  # elements of canary on either side
INTS = [-(2**63), -(2**62), -(2**31), -7, -1, 0, 1, 2, 3, 7, 63, 64, 65, 700]
INTS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1]
SIZES = [0, 1, 2, 3, 17, 2**31, 2**32, 2**40, 2**62]  # of a tensor without elements
FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 1.0, 1e-45, 1e30, 1e300]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64]
DTYPES += [torch.int16, torch.uint8, torch.bool, torch.complex64]


class Hostile:
    """The arguments of one call, and what is done to them."""

    def __init__(self, number: int, samples: dict[str, list[Sample]], cases: dict[int, tuple[Any, ...]]) -> None:
        self.random = random.Random(number)
        self.op = self.random.choice(sorted(samples))
        sample = self.random.choice(samples[self.op])
        raw = cases.get(id(sample))
        if raw is None:
            raw = cases[id(sample)] = sample.case(torch.device("cpu")).raw
        self.sample, self.buffers = sample, []
        self.args = [self.own(arg) for arg in raw]
        self.done: list[str] = []
        self.freed_at_last: list[tuple[Tensor, int]] = []  # for torch itself reads what is freed
        for _ in range(self.random.choice([1, 1, 1, 2, 2, 3])):
            self.spoil(self.random.randrange(len(self.args)))
        self.tensors = [x for x in tree_leaves(self.args) if isinstance(x, Tensor)]
        # Those of another kind are for the references to take or to refuse, and for torch, which reads what is freed;
        # it does so, too, to print arguments that fit no schema.
        self.plain = all(x.device.type == "cpu" and x.layout == torch.strided for x in self.tensors)
        fits = not any(isinstance(arg, list) and any(x is None for x in arg) for arg in self.args)
        for x, left in self.freed_at_last if self.plain and fits else ():
            x.untyped_storage().resize_(left)

    def own(self, arg: Any) -> Any:
        """A copy: in an allocation of just its size, whose ends a sanitizer watches, or between canaries."""
        if isinstance(arg, (list, tuple)):
            return [self.own(x) for x in arg]
        if not isinstance(arg, Tensor):
            return arg
        if self.random.random() < 0.7 or not arg.is_contiguous():
            return arg.clone()
        buffer = arg.new_zeros(arg.numel() + 2 * PAD)
        view = buffer[PAD : PAD + arg.numel()].view(arg.shape)
        view.copy_(arg)
        self.buffers.append((buffer, arg.numel()))
        return view

    def spoil(self, at: int) -> None:
        arg = self.args[at]
        how: Callable[[Any], Any]
        if isinstance(arg, list) and (not arg or isinstance(arg[0], Tensor)):
            if arg and self.random.random() < 0.8:
                entry = self.random.randrange(len(arg))
                arg[entry] = self.spoil_tensor(arg[entry], f"{at}[{entry}]")
                return
            how = self.random.choice([self.shorter, self.longer, self.twice, self.nothing])
            self.args[at] = how(arg)
        elif isinstance(arg, list):
            how = self.random.choice([self.shorter, self.longer, self.nothing, self.numbers])
            self.args[at] = how(arg)
        elif isinstance(arg, Tensor) or arg is None:
            self.args[at] = self.spoil_tensor(arg, str(at))
            return
        elif isinstance(arg, bool):
            how = self.flipped
            self.args[at] = not arg
        elif isinstance(arg, int):
            how = self.numbers
            self.args[at] = self.random.choice(INTS)
        elif isinstance(arg, float):
            how = self.numbers
            self.args[at] = self.random.choice(FLOATS)
        else:
            how = self.dtype
            self.args[at] = self.random.choice(DTYPES)
        self.done.append(f"{at}: {how.__name__}")

    # Of lists.
    def shorter(self, arg: list) -> list:
        return arg[:-1]

    def longer(self, arg: list) -> list:
        return [*arg, arg[0] if arg else self.another()] if not arg or isinstance(arg[0], Tensor) else [*arg, 1]

    def twice(self, arg: list) -> list:
        return [self.random.choice(arg)] * len(arg) if arg else arg

    def nothing(self, arg: list) -> list:
        return []

    def numbers(self, arg: list) -> list:
        return [self.random.choice(INTS) for _ in arg]

    def flipped(self, arg: Any) -> Any: ...
    def dtype(self, arg: Any) -> Any: ...

    def another(self) -> Tensor:
        """Any of the call's tensors."""
        found = [x for x in tree_leaves(self.args) if isinstance(x, Tensor)]
        return self.random.choice(found) if found else torch.zeros(3)

    def spoil_tensor(self, x: Tensor | None, where: str) -> Tensor | None:
        general = [self.other_dtype, self.shape, self.strides, self.without_elements, self.same_memory, self.elsewhere]
        general += [self.freed, self.misaligned]
        if x is None:
            how: Any = self.same_memory
        elif x.dtype in (torch.int32, torch.int64):
            how = self.random.choice([*general, *[self.entries] * 12, *[self.order] * 6])
        else:
            how = self.random.choice([*general, *[self.specials] * 2])
        self.done.append(f"{where}: {how.__name__}")
        try:
            return how(x)
        except RuntimeError as refused:  # by torch: there is no such tensor
            self.done[-1] += f", refused: {str(refused).splitlines()[0][:60]}"
            return x

    def entries(self, x: Tensor) -> Tensor:
        """A few of the numbers are others: any, or near the sizes at hand."""
        out = x.clone().view(-1)
        near = [
            n + d
            for t in tree_leaves(self.args)
            if isinstance(t, Tensor)
            for n in (*t.shape, t.numel())
            for d in (-1, 0, 1)
        ]
        limits = torch.iinfo(x.dtype)
        for _ in range(self.random.choice([1, 1, 2, 5])):
            if out.numel() == 0:
                break
            at = self.random.choice([0, out.numel() - 1, self.random.randrange(out.numel())])
            value = self.random.choice(INTS if self.random.random() < 0.6 else near)
            out[at] = max(limits.min, min(limits.max, value))
        return out.view(x.shape)

    def order(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        if flat.numel() == 0:
            return x
        shuffled = flat[torch.tensor(self.random.sample(range(flat.numel()), flat.numel()))]
        repeated = flat[torch.tensor([self.random.randrange(flat.numel()) for _ in range(flat.numel())])]
        return self.random.choice([flat.flip(0), shuffled, repeated, repeated.sort().values]).clone().view(x.shape)

    def specials(self, x: Tensor) -> Tensor:
        out = x.clone()
        if out.is_floating_point() and out.numel():
            for _ in range(self.random.choice([1, 3, 10])):
                out.view(-1)[self.random.randrange(out.numel())] = self.random.choice(FLOATS)
        return out

    def other_dtype(self, x: Tensor) -> Tensor:
        return x.to(self.random.choice(DTYPES))

    def shape(self, x: Tensor) -> Tensor:
        """Longer, shorter, flat, with a dimension more, transposed, or a scalar."""
        flat = x.reshape(-1)
        made = [
            flat,
            x[None],
            x.unsqueeze(-1),
            torch.cat([flat, flat]),
            flat[: flat.numel() // 2].clone(),
            flat[:1].clone(),
        ]
        made += [x.clone().transpose(0, -1).contiguous()] if x.dim() else []
        made += [flat[0].clone()] if flat.numel() else []
        made += [x[1:].clone(), torch.cat([x, x])] if x.dim() and x.shape[0] else []
        return self.random.choice(made)

    def strides(self, x: Tensor) -> Tensor:
        wide = torch.stack([x, x], -1)[..., 0]
        made = [wide, torch.stack([x, x])[1]]
        if x.dim() >= 2:
            made += [
                x.transpose(0, 1),
                x[:1].expand_as(x),
                x[..., :1].expand_as(x),
                x[:, 1:],
                torch.cat([x, x], -1)[:, : x.shape[1]],
            ]
        if x.dim() == 1 and x.numel():
            made += [x[:1].expand_as(x), x.as_strided((x.numel(),), (0,))]
        return self.random.choice(made)

    def without_elements(self, x: Tensor) -> Tensor:
        """Sizes of any height, one of them 0."""
        sizes = [self.random.choice(SIZES) for _ in range(self.random.choice([x.dim(), x.dim(), 1, 2, 3]))]
        if sizes and 0 not in sizes:
            sizes[self.random.choice([0, 0, len(sizes) - 1])] = 0
        return x.new_empty(sizes) if sizes else x

    def same_memory(self, x: Tensor | None) -> Tensor:
        """The memory of another argument, as the dtype and size of this one if that can be."""
        other = self.another()
        if x is None or not other.is_contiguous() or other.numel() == 0 or self.random.random() < 0.2:
            return other
        seen = other.view(-1)
        if (seen.numel() * seen.element_size()) % x.element_size() == 0:
            seen = seen.view(x.dtype)
        if seen.dtype in (torch.int32, torch.int64) and x.dtype == seen.dtype and seen.numel() >= x.numel():
            seen[: x.numel()].copy_(x.reshape(-1))  # its numbers stay good ones, until what shares them changes
        return seen[: x.numel()].view(x.shape) if seen.numel() >= x.numel() else seen

    def elsewhere(self, x: Tensor) -> Any:
        made = [lambda: x.to("meta"), lambda: x.to_sparse(), lambda: None, lambda: x.clone().requires_grad_()]
        return self.random.choice(made)()

    def freed(self, x: Tensor) -> Tensor:
        """The storage is gone, or too small, while the tensor still says its size."""
        out = x.clone()
        self.freed_at_last.append((out, self.random.choice([0, out.untyped_storage().nbytes() // 2])))
        return out

    def misaligned(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        if size == 0 or x.dtype == torch.bool:
            return x
        memory = bytearray(size + 1)
        out = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
        return out.copy_(x)


def describe(arg: Any) -> str:
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(map(describe, arg)) + "]"
    if not isinstance(arg, Tensor):
        return repr(arg)
    kind = f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}"
    if arg.device.type != "cpu" or arg.layout != torch.strided:
        return f"{arg.device} {arg.layout} {kind}"
    return kind if arg.is_contiguous() else f"{kind} strides {arg.stride()}"


def readable(x: Tensor) -> bool:
    """Whether its storage is as large as it says."""
    if x.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (x.storage_offset() + last + 1) * x.element_size() <= x.untyped_storage().nbytes()


def bits(x: Tensor) -> bytes:
    packed = torch.empty(x.numel(), dtype=x.dtype)
    packed.view(x.shape).copy_(x.detach())
    return packed.view(torch.uint8).numpy().tobytes()


def overlaps(x: Tensor, written: list[Tensor]) -> bool:
    own = x.untyped_storage().data_ptr()
    return any(own == w.untyped_storage().data_ptr() for w in written)


def broken(call: Hostile) -> tuple[str | None, str]:
    """Makes the call: what it did that it must not, and how it ended."""
    overload = getattr(torch.ops.sparsekernels, call.op).default
    seen = [x for x in call.tensors if call.plain and readable(x)]
    before = [bits(x) for x in seen]
    mutable = [
        x
        for arg, value in zip(overload._schema.arguments, call.args, strict=False)
        if arg.alias_info is not None and arg.alias_info.is_write
        for x in tree_leaves(value)
        if isinstance(x, Tensor)
    ]
    refused = None
    try:
        overload(*call.args)
    except Exception as error:
        refused = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    outcome = refused or "done"
    for buffer, numel in call.buffers if call.plain else ():
        if buffer[:PAD].any() or buffer[PAD + numel :].any():
            return "memory beside an argument changed", outcome
    for x, was in zip(seen, before, strict=True):
        if bits(x) != was and (refused or not overlaps(x, mutable)):
            return f"{describe(x)} changed, " + (
                f"though refused: {refused}" if refused else "and is only read"
            ), outcome
    return None, outcome


def make_calls(first: int, last: int, samples: dict[str, list[Sample]], progress: Path, verbose: bool) -> int:
    """Calls [first, last), each noted before it is made; 1 where one broke a promise that no sanitizer sees."""
    torch.set_num_threads(2)
    cases: dict[int, tuple[Any, ...]] = {}
    with progress.open("w", buffering=1) as file:
        for number in range(first, last):
            call = Hostile(number, samples, cases)
            arguments = ", ".join(describe(x) for x in call.args)
            done = "; ".join(call.done)
            note = f"--seed {number} --calls 1: {call.op}({arguments[:1500]})  # {call.sample.name}; {done}"
            file.write(note + "\n")
            if verbose:
                print(note, *call.args, sep="\n", flush=True)
            what, outcome = broken(call)
            file.write(outcome + "\n")
            if what:
                print(f"runtime error: {what}")
                return 1
    return 0


def run_batch(
    first: int, last: int, samples: dict[str, list[Sample]], folder: Path, verbose: bool
) -> tuple[list[str], str | None]:
    """The same in a child process: the notes of its calls, and what it said where it did not come to the end."""
    progress, log = folder / "calls", folder / "calls.log"
    progress.write_text("")
    child = os.fork()
    if child == 0:
        if not verbose:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
        status = 1
        try:
            status = make_calls(first, last, samples, progress, verbose)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    seen, since = -1, time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        time.sleep(0.02)
        if (size := progress.stat().st_size) != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > HANGS:
            os.kill(child, signal.SIGKILL)
            since = float("inf")
    made = progress.read_text().splitlines()
    if ended[1] == 0:
        return made, None
    text = "" if verbose else log.read_text()
    report = re.search(r"^.*(runtime error|ERROR: AddressSanitizer|CHECK failed).*(\n.*){,12}", text, re.MULTILINE)
    return made, f"status {os.waitstatus_to_exitcode(ended[1])}\n{report[0] if report else text[:2000]}"


def main() -> int:
    first, calls, limit, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    native = [op.name for op in OPS if backend.has_native(op.name, "cpu")]
    assert native, backend._load_errors
    samples = {
        op: [s for s in group if not s.heavy and not any(word in s.name for word in ("many", "large", "long"))]
        for op, group in all_samples().items()
        if op in native
    }
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    at, start, now = first, time.monotonic(), 0.0
    while (now < limit if limit else at < first + calls) and len(failures) < ENOUGH:
        last = at + BATCH if limit else min(at + BATCH, first + calls)
        made, failure = run_batch(at, last, samples, folder, verbose=calls == 1)
        if failure:
            note = made[len(made) - 2 + len(made) % 2] if made else "no call was made"
            failures.append(note)
            print(f"--- {note}\n{failure}", flush=True)
        for note, outcome in zip(made[::2], made[1::2], strict=False):
            op = note.split(": ", 1)[1].split("(", 1)[0]
            outcomes[f"{op} {'done' if outcome == 'done' else 'refused'}"] += 1
        at += max(1, (len(made) + 1) // 2)
        now = time.monotonic() - start
    print(f"{at - first} hostile calls of {len(samples)} ops in {now:.0f} s, {len(failures)} failures")
    for op in sorted(samples) if calls > 1 else ():
        print(f"  {op}: {outcomes[op + ' done']} done, {outcomes[op + ' refused']} refused")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
