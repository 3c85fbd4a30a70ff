"""What forward keeps and backward allocates: never the dense gradient of a selected Linear or Embedding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekernels as sk
from sparsekernels import Selection
from sparsekernels.ops import backend
from sparsekernels.training.layers import SLOTS

OUT, IN, TOKENS = 640, 512, 8  # 1.3 MB of weight, 20 kB of activations
WEIGHT_BYTES = OUT * IN * 4


class Largest(TorchDispatchMode):
    """The most elements that any result of any op has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views of what is there already cost nothing; t(weight) is one.
        if not func.is_view:
            found = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self.numel = max([self.numel, *found])
        return out


def largest_result(run: Callable[[], Any]) -> int:
    # Autograd runs the backward of a CPU graph in the calling thread, where the mode is active.
    with Largest() as mode:
        run()
    return mode.numel


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes of the largest block that is allocated, in C++ too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(IN, OUT), torch.randn(TOKENS, IN)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Embedding(OUT, IN), torch.arange(TOKENS) % 5


KINDS = {"linear": linear, "embedding": embedding}
UNITS = {
    "elements": {},
    "rows": {"granularity": "row"},
    "columns": {"granularity": "column"},
    "blocks": {"granularity": "block", "block": (32, 16)},
}


@pytest.mark.parametrize("measure", [largest_result, largest_allocation])
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_makes_no_dense_gradient(kind: str, units: str, measure: Callable[[Any], int]) -> None:
    model, x = KINDS[kind]()
    limit = WEIGHT_BYTES // 4
    dense = copy.deepcopy(model)(x).sum()
    assert measure(dense.backward) >= limit, "the dense model shows that the measure sees a dense gradient"
    selection = Selection.random(model, 0.01, names=["weight"], **UNITS[units])
    tuned = sk.train_only(model, selection)
    loss = model(x).sum()
    found = measure(loss.backward)
    assert next(tuned.parameters()).grad is not None
    # The reference works through rows of the weight in blocks; a native kernel copies activations alone.
    assert 0 < found < limit / 2


@pytest.mark.parametrize("name", ["reference", "triton", "native"])
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("op", [sk.ops.masked_grad_linear, sk.ops.masked_grad_embedding])
def test_no_backend_makes_a_dense_gradient(op: Callable[..., Tensor], units: str, name: str) -> None:
    if reason := backend.why_not(op.__name__, name, "cpu"):
        pytest.skip(reason)
    index = Selection.random({"weight": (OUT, IN)}, 0.01, **UNITS[units])["weight"]
    linear = op is sk.ops.masked_grad_linear
    x, grad = (
        (torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT))
        if linear
        else (torch.arange(TOKENS), torch.randn(TOKENS, IN))
    )
    assert 0 < largest_allocation(lambda: op(grad, x, index, backend=name)) < WEIGHT_BYTES / 2


@pytest.mark.parametrize("kind", KINDS)
def test_forward_makes_no_copy_of_the_weight(kind: str) -> None:
    model, x = KINDS[kind]()
    assert largest_allocation(lambda: model(x) + (model.weight + 1).sum()) >= WEIGHT_BYTES
    sk.train_only(model, Selection.random(model, 0.01))
    assert largest_allocation(lambda: model(x)) < WEIGHT_BYTES // 4


def held(model: nn.Module) -> list[Tensor]:
    """The parameters of a model, and what its slots keep."""
    slots = [slot for module in model.modules() for slot in module.__dict__.get(SLOTS, {}).values()]
    narrow = [slot.narrow.index.positions for slot in slots if slot.narrow is not None]
    return [*model.parameters(), *narrow, *(t for slot in slots for t in (slot.positions, slot.originals))]


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a graph keeps beside what the model holds; every storage once."""
    own = {t.untyped_storage().data_ptr() for t in held(model)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("input_needs_grad", [False, True])
@pytest.mark.parametrize("kind", ["linear", "stack", "embedding", "norm"])
def test_forward_keeps_no_more_than_the_dense_model(
    kind: str, input_needs_grad: bool, dtype: torch.dtype | None
) -> None:
    model, x = KINDS.get(kind, linear)()
    if kind == "stack":
        model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN))
    if kind == "norm":
        model = nn.LayerNorm(IN)
    if x.is_floating_point():
        x.requires_grad_(input_needs_grad)

    def run(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return m(x)

    dense = copy.deepcopy(model)
    expected = saved_bytes(dense, lambda: run(dense))
    sk.train_only(model, Selection.random(model, 0.1))
    assert saved_bytes(model, lambda: run(model)) <= expected


def test_an_input_is_not_kept_where_nothing_needs_it() -> None:
    """A Linear without selected positions keeps no activations, as a frozen one does."""
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    sk.train_only(model, Selection.random(model, 0.1, names=["0.weight"]))
    x = torch.randn(TOKENS, IN)
    assert saved_bytes(model, lambda: model(x)) <= x.nbytes


def test_memory_of_the_compact_form() -> None:
    """values and their gradient 4 B an element, positions 4 B, originals the dtype of the weight, moments 8 B."""
    model = nn.Linear(IN, OUT, bias=False).to(torch.bfloat16)
    before = sum(t.nbytes for t in held(model))
    tuned = sk.train_only(model, Selection.random(model, 0.1))
    k = tuned.selection.numel
    assert sum(t.nbytes for t in held(model)) - before == k * (4 + 4 + 2)
    optimizer = sk.SparseAdamW(tuned.parameters())
    model(torch.randn(2, IN, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) == 4 * k
    (state,) = optimizer.state.values()
    assert state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes == 8 * k


def test_general_path_frees_each_dense_gradient_at_once() -> None:
    """Norms, Conv1D and experts have dense gradients, but no two of them at a time, and none after backward."""
    layers = 6
    model = nn.Sequential(*(nn.LayerNorm(4096) for _ in range(layers)))
    tuned = sk.train_only(model, Selection.random(model, 0.01))
    model(torch.randn(3, 4096)).sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("_values"))
    assert all(values.grad is not None for values in tuned.parameters())
    alive: list[int] = []

    class Dense(torch.autograd.Function):
        """Counts its own gradients that are alive."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            return x * weight.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            dense = torch.ones(500, 500)
            alive.append(1 + sum(reference() is not None for reference in references))
            references.append(weakref_to(dense))
            return grad, dense

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(500, 500))

        def forward(self, x: Tensor) -> Tensor:
            return Dense.apply(x, self.weight)

    references: list[Any] = []
    stack = nn.Sequential(*(Layer() for _ in range(layers)))
    sk.train_only(stack, Selection.random(stack, 0.01))
    stack(torch.ones(2, requires_grad=True)).sum().backward()
    assert len(alive) == layers
    assert max(alive) <= 2  # the one that is made, and the one before until its node is done


def weakref_to(t: Tensor) -> Any:
    import weakref

    return weakref.ref(t.untyped_storage())
