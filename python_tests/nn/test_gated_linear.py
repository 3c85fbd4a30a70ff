"""Gated layers against fp64 autograd with the same noise; what they keep; the way in and out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparsekernels import ops
from sparsekernels.nn.gated import GatedLinear, Gating, LayerGates, gate, put_back, ungate

KINDS = {"stg": 0.5, "finegates": 0.5, "hard_concrete": 2 / 3}
M, N, GROUP = 24, 20, 4


def layer(
    kind: str = "stg",
    *,
    conv: bool = False,
    bias: bool = True,
    rows: bool = True,
    columns: bool = True,
    group: int = 1,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A gated layer, gates spread over closed, in between and open."""
    torch.manual_seed(0)
    module: nn.Module = Conv1D(M, N) if conv else nn.Linear(N, M, bias=bias)
    if conv:
        nn.init.normal_(module.bias)
    module.to(dtype)
    gate(
        module,
        Gating(kind, KINDS[kind], probing=True),
        rows=torch.randn(M) if rows else None,
        columns=torch.randn(N // group) if columns else None,
        column_group=group,
        lora_rank=rank,
        lora_scale=0.7,
    )
    if rank:
        nn.init.normal_(module.gates.lora_B, std=0.2)
    return module


def differentiable(logits: Tensor | None, gates: LayerGates, key: Tensor | None, stream: int, size: int) -> Tensor:
    """Gates in fp64 that autograd can differentiate, [size]; ones where there are none."""
    if logits is None:
        return torch.ones(size, dtype=torch.float64)
    kind, noise = gates.gating.kind, gates.gating.noise
    values, slopes = ops.gate_values(logits, kind=kind, noise=noise, key=key, stream=stream, backend="reference")
    z = values + slopes * (logits - logits.detach())
    return z.repeat_interleave(size // len(logits))


def oracle(module: nn.Module, x: Tensor, dy: Tensor, key: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients, in fp64, by the definition."""
    gates = module.gates
    wide = {
        name: p.detach().double().requires_grad_(name != "weight") for name, p in (*module.named_parameters(), ("x", x))
    }
    z_r = differentiable(wide.get("gates.rows"), gates, key, 0, M)
    z_c = differentiable(wide.get("gates.columns"), gates, key, 1, N)
    weight = wide["weight"].T if gates.transposed else wide["weight"]
    if gates.lora_A is not None:
        weight = weight + gates.lora_scale * wide["gates.lora_B"] @ wide["gates.lora_A"]
    y = (wide["x"] * z_c) @ weight.T
    y = (y + wide["bias"] if "bias" in wide else y) * z_r
    asked = {name: p for name, p in wide.items() if p.requires_grad}
    return {"y": y.detach()} | dict(zip(asked, torch.autograd.grad(y, list(asked.values()), dy.double()), strict=True))


def found(module: nn.Module, x: Tensor, dy: Tensor, run=None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = (run or module)(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        error = (ours[name].double() - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= tolerance, (name, float(error))


def next_key(seed: int) -> Tensor:
    """The key that a layer draws first after this seed, which is set again."""
    torch.manual_seed(seed)
    key = torch.randint(2**63 - 1, (1,))
    torch.manual_seed(seed)
    return key


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(3, 7, width, generator=generator).to(dtype) for width in (N, M))  # type: ignore[return-value]


SHAPES = {
    "both": {},
    "conv1d": {"conv": True},
    "no-bias": {"bias": False},
    "rows": {"columns": False},
    "columns": {"rows": False},
    "groups": {"rows": False, "group": GROUP},
    "low-rank": {"rank": 3},
    "low-rank-conv1d-groups": {"rank": 3, "conv": True, "group": GROUP},
    "low-rank-alone": {"rank": 3, "rows": False, "columns": False},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients(kind: str, shape: str, mode: str) -> None:
    module = layer(kind, **SHAPES[shape]).train(mode == "train")
    x, dy = data()
    key = next_key(11)
    compare(found(module, x, dy), oracle(module, x, dy, key if mode == "train" else None))


def test_gradients_fp64() -> None:
    module = layer(rank=2, dtype=torch.float64)
    x, dy = data(torch.float64)
    key = next_key(5)
    compare(found(module, x, dy), oracle(module, x, dy, key), 1e-12)


def test_gradient_by_the_value_also_where_gates_are_open() -> None:
    module = layer().eval()
    with torch.no_grad():
        module.gates.rows[:3], module.gates.columns[:3] = 2.0, -2.0
    module.train()
    module.gates.gating.noise = 1e-6
    x, dy = data()
    ours = found(module, x, dy)
    assert ours["gates.rows"][:3].eq(0).all()
    assert ours["gates.columns"][:3].eq(0).all()
    z_r, z_c = (
        ops.gate_values(p.detach(), kind="stg", noise=0.5)[0].double().requires_grad_()
        for p in (module.gates.rows, module.gates.columns)
    )
    y = ((x.double() * z_c) @ module.weight.double().T + module.bias.double()) * z_r
    expected = torch.autograd.grad(y, [z_r, z_c], dy.double())
    for name, z, by_value in zip(("rows", "columns"), (z_r, z_c), expected, strict=True):
        probe = module.gates.probes[name].grad.double()
        assert torch.equal(probe[z == 0], torch.zeros_like(probe[z == 0]))
        torch.testing.assert_close(probe[z > 0], by_value[z > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_noise(reentrant: bool) -> None:
    module = layer(rank=2)
    x, dy = data()

    def twice(x: Tensor) -> Tensor:
        return module(module(x) @ torch.eye(M, N))

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(twice, x, use_reentrant=reentrant)

    torch.manual_seed(2)
    plain = found(module, x, dy, twice)
    torch.manual_seed(2)
    ours = found(module, x, dy, checkpointed)
    for name, expected in plain.items():
        assert torch.equal(ours[name], expected), name


def test_noise_comes_from_the_seed_in_train_mode_alone() -> None:
    module = layer()
    x, _ = data()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(module(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    module.eval()
    assert torch.equal(module(x), module(x))


def test_half_precision_and_autocast() -> None:
    x, dy = data()
    module = layer(rank=2)
    key = next_key(1)
    expected = oracle(module, x, dy, key)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        return y.float()

    ours = found(module, x, dy, autocast)
    assert ours["gates.rows"].dtype == torch.float32
    compare(ours, expected, 0.02)
    half = layer(rank=2, dtype=torch.bfloat16)
    assert half.gates.rows.dtype == torch.float32
    next_key(1)
    compare(found(half, x.bfloat16(), dy.bfloat16()), oracle(half, x, dy, key), 0.03)


def test_nothing_as_large_as_the_weight_is_kept() -> None:
    module = layer(rank=2)
    kept: list[Tensor] = []
    x, _ = data()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x.requires_grad_())
    own = {x.data_ptr(), y.data_ptr(), *(p.data_ptr() for p in module.parameters())}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert sum(tensor.numel() for tensor in others) <= 2 * (M + N)


def test_the_weight_stays_frozen() -> None:
    module = layer()
    x, dy = data()
    module(x).backward(dy)
    assert module.weight.grad is None
    module.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        module(x)


@pytest.mark.parametrize("conv", [False, True])
def test_in_and_out(conv: bool) -> None:
    torch.manual_seed(0)
    module: nn.Module = Conv1D(M, N) if conv else nn.Linear(N, M)
    kind, names, x = type(module), list(module.state_dict()), data()[0]
    before = module(x)
    gate(module, Gating("stg", 0.5), rows=torch.full((M,), -1.0), columns=torch.ones(N))
    assert isinstance(module, kind)
    assert conv or type(module) is GatedLinear
    assert list(module.state_dict()) == [*names, "gates.rows", "gates.columns"]
    module.eval()
    assert torch.equal(copy.deepcopy(module)(x), torch.zeros_like(before))
    gates = ungate(module)
    assert type(module) is kind
    assert list(module.state_dict()) == names
    assert torch.equal(module(x), before)
    put_back(module, gates)
    assert torch.equal(module(x), torch.zeros_like(before))


def test_folded() -> None:
    for conv in (False, True):
        module = layer(conv=conv, rank=3).eval()
        x, _ = data()
        weight, bias = module.gates.folded(module.weight, module.bias)
        assert weight.shape == (M, N)
        torch.testing.assert_close(nn.functional.linear(x, weight, bias), module(x))
