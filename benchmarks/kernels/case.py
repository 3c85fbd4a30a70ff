"""What the kernel benchmarks share: cases, their floors, contenders, and the check that comes before any time.

A `Case` is one job on one input. Its `contenders` are ways to get it done: ours, on each backend there is, and what a
user would call otherwise. A contender whose result is wrong raises `WrongResult` and is given no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sparsekernels as sk
from sparsekernels.ops.backend import why_not

from ..timing import DEVICE

FP32, BF16 = torch.float32, torch.bfloat16
WARM, BOTH = ("warm",), ("warm", "cold")
LINE = 32 if DEVICE.type == "cuda" else 64  # bytes that memory moves at least: a sector, a cache line
SECTOR = 32
CUT_OFF = 1e-4  # tensor cores cut off what they add: thousands of terms in fp32 are not exact to 1e-5


class WrongResult(AssertionError):
    """A contender computed something else than the oracle."""


@dataclass
class Problem:
    """The input of a case, and what comes out.

    Attributes:
        shape, density, dtype: for the reader of the results.
        bytes_moved: the least that the job has to read and write, in `formula`'s terms; the same for every contender,
            so that bytes_moved / time compares them.
        expected: what `Contender.result` must return, in the precision of the oracle.
    """

    shape: str
    density: float
    dtype: str
    bytes_moved: int
    formula: str
    expected: list[Tensor]


@dataclass
class Contender:
    """One way to solve a problem.

    Attributes:
        call: what is timed.
        result: what the calls so far computed, comparable with `Problem.expected`.
        untouched: (weight, its original, Index): outside of the Index the two must agree bit for bit.
        expected, tolerance: override those of problem and case: an alternative may follow another rule, or be coarser.
    """

    call: Callable[[], Any]
    result: Callable[[], Sequence[Tensor]]
    untouched: Sequence[tuple[Tensor, Tensor, sk.Index]] = ()
    expected: Sequence[Tensor] | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Floor:
    """What a job takes at least, counted from its sizes alone, and what is asked of ours.

    The bytes are those that any implementation reads and writes. Memory moves in sectors of 32 bytes, so an element of
    two bytes costs a whole one unless a neighbour is selected, too; the count is the expected one for elements selected
    at random. A sector of which a part is written is read as well. A GPU that fetches sectors in pairs moves up to
    twice as much for scattered elements. Operations are those that the result needs: of a gradient at selected
    positions one dot product for each, of projections onto fp32 vectors those of a single bf16 product, which no
    implementation in fp32 can reach.

    Attributes:
        bytes, formula: what must be moved, in numbers and in words.
        operations: multiplications and additions of matrix products, in bf16; 0: the rest is no matter beside memory.
        share: of the floor's speed that is asked for. most: seconds that are allowed. most_extra: bytes that a call may
            allocate, its result included. None: nothing is asked.
    """

    bytes: float
    formula: str
    share: float | None = None
    most: float | None = None
    operations: float = 0.0
    most_extra: float | None = None

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The longer of two: at so many bytes, and so many operations, a second."""
        return max(self.bytes / bandwidth, self.operations / rate)


@dataclass(frozen=True, eq=False)
class Case:
    """One job and everybody who can do it.

    Attributes:
        make: builds the problem; not called before somebody needs it.
        contenders: name -> function from the problem to a Contender.
        ours: the contender that a user of this package meets.
        versus: those that it is set beside, with the bar (ours must be so many times faster), or None.
        states: only "warm" where arithmetic, not memory, takes the time.
        tolerance: largest |found - expected| as a share of the largest |expected|.
        calls: how many calls lie before the comparison.
        floor: at the sizes of a GPU; otherwise what the problem counts.
        graph: whether it is timed as replays of a CUDA graph.
    """

    name: str
    make: Callable[[], Problem]
    contenders: Mapping[str, Callable[[Any], Contender]]
    ours: str
    versus: Mapping[str, float | None] = field(default_factory=dict)
    states: Sequence[str] = BOTH
    tolerance: float = 1e-6
    calls: int = 1
    floor: Floor | None = None
    graph: bool = False

    def entrant(self, name: str, problem: Problem) -> tuple[Contender, float]:
        """The contender, ready to be timed, and its error.

        Raises:
            WrongResult: it is further from the oracle than the tolerance, or wrote where it must not.
        """
        contender = self.contenders[name](problem)
        for _ in range(self.calls):
            contender.call()
        found = contender.result()
        expected = problem.expected if contender.expected is None else contender.expected
        tolerance = self.tolerance if contender.tolerance is None else contender.tolerance
        errors = [_error(f, e) for f, e in zip(found, expected, strict=True)]
        if not all(error <= tolerance for error in errors):  # written so that NaN fails
            worst = max(range(len(errors)), key=lambda i: (errors[i] != errors[i], errors[i]))
            raise WrongResult(
                f"{self.name}: result {worst} of {name} is {errors[worst]:.3g} away from what was expected, "
                f"allowed is {tolerance:.3g}; it gets no time"
            )
        for weight, original, index in contender.untouched:
            restored = weight.detach().clone()
            write(restored, index, take(original, index))
            if not torch.equal(restored, original):
                raise WrongResult(f"{self.name}: {name} changed weights that were not selected; it gets no time")
        return contender, max(errors)


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("nan")
    if not expected.numel():
        return 0.0
    difference = (found.detach().to(expected.dtype) - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


def computing(compute: Callable[[], Tensor | Sequence[Tensor]], **more: Any) -> Contender:
    """A contender whose call returns its result, or several."""
    found: list[Tensor] = []

    def call() -> None:
        result = compute()
        found[:] = [result] if isinstance(result, Tensor) else result

    return Contender(call, lambda: found, **more)


def backends(op: str) -> list[str]:
    """The backends that serve `op` here, fastest first; interpreted Triton is no contender."""
    known = ["native", *(["triton"] if DEVICE.type == "cuda" else []), "reference"]
    return [backend for backend in known if why_not(op, backend, DEVICE.type) is None]  # type: ignore[arg-type]


def each_backend(op: str, contender: Callable[..., Contender], served: str | None = None, **options: Any) -> Any:
    """Contenders on each backend of `op`; `served`: the op whose backends there are, where it is called otherwise."""
    return {f"{op} {b}": partial(contender, backend=b, **options) for b in backends(served or op)}


def called(op: str, contender: Callable[..., Contender], served: str | None = None, **options: Any) -> Any:
    """Contenders for an op as it is called by default, and on each backend."""
    return {op: partial(contender, backend=None, **options), **each_backend(op, contender, served, **options)}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def positions(index: sk.Index) -> Tensor:
    """Positions as torch's indexing takes them."""
    return index.positions.long()


def addressed(tensor: Tensor, index: sk.Index) -> Tensor:
    """A view of the tensor whose dimension 0 the positions of the index count."""
    return tensor if index.granularity == "row" else tensor.view(-1)


def take(tensor: Tensor, index: sk.Index) -> Tensor:
    """The selected part, by torch alone."""
    if index.granularity == "column":
        return tensor.detach().index_select(1, positions(index))
    if index.granularity == "block":
        return tiles(tensor.detach(), index)[places(index)]
    return addressed(tensor.detach(), index).index_select(0, positions(index))


def tiles(tensor: Tensor, index: sk.Index) -> Tensor:
    """A view of a matrix that blocks divide without a rest: [down, across, height, width]."""
    height, width = index.tile
    return tensor.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)


def places(index: sk.Index) -> tuple[Tensor, Tensor]:
    """Which of these tiles are selected."""
    across = index.shape[1] // index.tile[1]
    return positions(index) // across, positions(index) % across


def write(tensor: Tensor, index: sk.Index, values: Tensor) -> None:
    """Write the selected part, by torch alone."""
    if index.granularity == "column":
        tensor.index_copy_(1, positions(index), values)
    elif index.granularity == "block":
        tiles(tensor, index)[places(index)] = values
    else:
        addressed(tensor, index).index_copy_(0, positions(index), values)


def random_elements(shape: Sequence[int], density: float) -> sk.Index:
    """Each element with probability `density`."""
    return sk.Index.from_mask(torch.rand(*shape, device=DEVICE) < density)


def random_rows(shape: Sequence[int], count: int) -> sk.Index:
    """`count` rows of dimension 0."""
    return sk.Index(torch.randperm(shape[0], device=DEVICE)[:count].sort().values, shape, granularity="row")


def random_units(shape: Sequence[int], density: float, granularity: Any, block: Any = None) -> sk.Index:
    """A share of the rows, columns or blocks of a matrix."""
    units: dict[str, Any] = {"granularity": granularity, "block": block}
    return sk.Selection.random({"weight": shape}, density, **units)["weight"].to(DEVICE)


def touched(index: sk.Index, itemsize: int) -> int:
    """Bytes of the cache lines that hold the selected part of a tensor."""
    if index.granularity == "row":
        return index.numel * itemsize
    if index.granularity != "element":
        return LINE * int(index.mask().view(-1, LINE // itemsize).any(1).sum())
    return LINE * int(torch.unique_consecutive(positions(index) * itemsize // LINE).numel())


def sector_bytes(numel: int, density: float, itemsize: int) -> float:
    """Bytes of the sectors that hold at least one of the elements of a tensor, each selected with this probability."""
    each = SECTOR // itemsize
    return numel * itemsize * (1 - (1 - density) ** each)
