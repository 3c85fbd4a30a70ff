"""Sharded, quantised and flattened weights: refused by name before anything trains in vain, or right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Zoo, ids
from processes import in_processes, uses_processes
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError

import sparsekernels as sk
from sparsekernels import Index, Selection

SHARDED = (
    "is sharded.* not supported here. .*parallelize_module before train_only, and fully_shard .FSDP2., .*after it.*"
    "DistributedDataParallel"
)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def refused(call: Callable[[], Any], words: str = SHARDED) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["input_ids"]).square().flatten(1).sum(1)


BATCHES = [{"input_ids": torch.arange(4)}]
METHODS: list[Callable[[nn.Module], Any]] = [
    lambda m: sk.methods.sift(m, BATCHES, loss=lambda m, b: squares(m, b).sum(), targets=["1.weight"], head=()),
    lambda m: sk.fisher_diagonal(m, BATCHES, loss=squares, names=["1.weight"]),
    lambda m: sk.methods.fish(m, BATCHES, 0.5, loss=squares, targets=["1.weight"], head=()),
    lambda m: sk.methods.ird(m, BATCHES, 0.5, loss=squares, targets=["1.weight"], head=(), progress=False),
    lambda m: sk.matrices(m, ["1.weight"]),  # what singular_value_gradients takes
    lambda m: sk.methods.laser.rank(m, BATCHES, names=["1.weight"]),
    lambda m: sk.methods.laser.reduce(m, [sk.methods.laser.Reduction("1.weight", 0.5)]),
    lambda m: sk.methods.gates.attach(m, 0.3, 20, targets=["1.weight"]),
]


def sharding(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, x = init_device_mesh("cpu", (world,)), torch.arange(4)
    selection = Selection.random(net(), 0.3)

    def fully_sharded(model: nn.Module) -> nn.Module:
        for layer in (model[1], model[3]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def flat(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    def tensor_parallel(model: nn.Module) -> nn.Module:
        return parallelize_module(model, mesh, {"1": ColwiseParallel()})

    for shard in (flat, tensor_parallel):
        refuses_after(net(), selection, shard, x)
    refuses_before(tensor_parallel(net()), selection, METHODS)  # the weights of FSDP1 have no shape that one could fit
    refuses_before(fully_sharded(net()), selection, METHODS[3:])
    refused(lambda: sk.train_only(fully_sharded(net()), selection))


def refuses_after(model: nn.Module, selection: Selection, shard: Callable[[nn.Module], nn.Module], x: Tensor) -> None:
    tuned = sk.train_only(model, selection)
    wrapped = shard(model)
    for call in (lambda: wrapped(x), lambda: list(tuned.parameters()), tuned.sync_, tuned.delta):
        refused(call)


def refuses_before(model: nn.Module, selection: Selection, methods: list[Callable[[nn.Module], Any]]) -> None:
    weights = {name: p for name, p in model.named_parameters() if name in selection}
    group = {"params": list(weights.values()), "indices": [selection[name] for name in weights]}
    refused(lambda: selection.param_groups(model))
    refused(lambda: sk.SparseAdamW([group]))
    for method in methods:
        refused(lambda method=method: method(model))


@pytest.mark.compatibility("FSDP", "FSDP1 (`FullyShardedDataParallel`)", "refused")
@pytest.mark.compatibility("Tensor parallelism", "`parallelize_module` after `train_only`", "refused")
@pytest.mark.compatibility("Tensor parallelism", "methods that score, on a model under `parallelize_module`", "refused")
@uses_processes
def test_sharded_models_are_refused(tmp_path: Path) -> None:
    """FSDP1, tensor parallelism after train_only, at the first use; dense weights that are stepped or scored."""
    in_processes(sharding, tmp_path)


class Wrapped(torch.Tensor):
    """A tensor that keeps int8 codes and says that it is fp32, as quantisation libraries make them."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(func)


@pytest.mark.compatibility("Quantised weights", "tensor subclasses that keep codes", "refused")
def test_quantised_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(Wrapped(torch.ones(4, 4, dtype=torch.int8)), requires_grad=False)
    index = Index(torch.arange(3), (4, 4))
    words = "is Wrapped: quantised .* without quantisation"
    refused(lambda: sk.train_only(model, Selection({"0.weight": index})), words)
    refused(lambda: sk.SparseAdamW([{"params": [model[0].weight], "indices": [index]}]), words)
    model = net()
    model[1].weight = nn.Parameter(Wrapped(torch.ones(8, 8, dtype=torch.int8)), requires_grad=False)
    for method in METHODS:
        refused(lambda method=method: method(model), words)


def test_weights_without_values_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    refused(lambda: sk.train_only(model, Selection({"0.weight": Index(torch.arange(3), (4, 4))})), "no values yet")


def flat_buffer(tuned: sk.SparseModel) -> Tensor:
    """The values moved into one buffer, as DeepSpeed ZeRO-1 and ZeRO-2 do."""
    flat = torch.cat([values.detach().reshape(-1) for values in tuned.parameters()])
    start = 0
    for values in tuned.parameters():
        values.data = flat[start : start + values.numel()].view(values.shape)
        start += values.numel()
    return flat


@pytest.mark.compatibility("DeepSpeed", "values in a flat buffer, as ZeRO-1 and ZeRO-2 keep them", "works")
@pytest.mark.parametrize("names", [None, ["embed.weight"]], ids=["all", "one"])
def test_values_that_change_through_a_flat_buffer_reach_the_weights(names: list[str] | None) -> None:
    """No version of theirs is counted up: SGD by hand on the buffer equals SGD on the values.

    With one tensor the buffer is as large as its values.
    """
    model, oracle = Zoo(), Zoo()
    oracle.load_state_dict(model.state_dict())
    selection = Selection.random(model, 0.3, names=names)
    tuned, plain = sk.train_only(model, selection), sk.train_only(oracle, selection)
    flat = flat_buffer(tuned)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.125)
    for step in range(3):
        losses = [m(ids(4, 7, seed=step)).square().mean() for m in (model, oracle)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        flat -= 0.125 * torch.cat([values.grad.reshape(-1) for values in tuned.parameters()])
        sgd.step()
        for values in (*tuned.parameters(), *plain.parameters()):
            values.grad = None
    state, expected = model.state_dict(), oracle.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    flat += 1.0
    tuned.sync_()
    (first, index), values = next(iter(selection.items())), next(tuned.parameters())
    assert torch.equal(sk.ops.gather(model.get_parameter(first).detach(), index), values.detach())


@pytest.mark.compatibility("DeepSpeed", "the same under torch.compile", "refused")
@pytest.mark.parametrize("names", [None, ["embed.weight"]], ids=["all", "one"])
def test_a_compiled_forward_with_values_in_a_flat_buffer_is_refused(names: list[str] | None) -> None:
    """It writes no weights, and nobody would see that they change."""
    torch._dynamo.reset()
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3, names=names))
    flat = flat_buffer(tuned)
    run = torch.compile(model, backend="aot_eager")
    with pytest.raises((ValueError, InternalTorchDynamoError), match=r"share memory.*do not compile"):
        run(ids(4, 7))
    for values in tuned.parameters():
        values.data = values.data.clone()
    run(ids(4, 7))
    del flat


def test_values_in_new_memory_are_written_once() -> None:
    """After `values.data = ...` the weight follows at the next forward, and later ones leave it alone."""
    model = Zoo()
    tuned = sk.train_only(model, Selection.random(model, 0.3))
    values = next(tuned.parameters())
    values.data = values.detach() + 1
    model(ids(4, 7))
    (name, index), *_ = tuned.selection.items()
    assert torch.equal(sk.ops.gather(model.get_parameter(name).detach(), index), values.detach())
    versions = [p._version for p in model.parameters()]
    model(ids(4, 7))
    assert versions == [p._version for p in model.parameters()]


@pytest.mark.compatibility("DeepSpeed", "ZeRO-3", "refused")
def test_partitioned_parameters_are_refused() -> None:
    """DeepSpeed ZeRO-3 takes the data of all parameters away, and marks them."""
    model = nn.Sequential(nn.Linear(4, 4))
    index = Index(torch.arange(3), (4, 4))
    tuned = sk.train_only(model, Selection({"0.weight": index}))
    for p in model.parameters():
        p.ds_id, p.data = 1, torch.empty(0)
    refused(lambda: model(torch.ones(1, 4)))
    refused(tuned.sync_)
