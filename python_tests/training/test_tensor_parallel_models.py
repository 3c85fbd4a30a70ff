"""Models under the tensor parallelism of transformers, with experts too, and GPT-2 divided by hand."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import ids, moe, transformer
from parallel_models import step
from processes import in_processes, uses_processes
from sharded_models import UNITS, loss_of, optimizer_of, same, selection, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sparsekernels as sk

DIVIDED = {"llama": lambda: transformer("llama"), "moe": moe}


class DividedConv1D(ParallelStyle):
    """Conv1D of GPT-2, whose weight is transposed; torch's own styles take Linear and Embedding alone."""

    def __init__(self, dim: int) -> None:
        self.dim = dim  # of the weight

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        outputs = self.dim == 1
        placements = {"weight": Shard(self.dim), "bias": Shard(0) if outputs else Replicate()}

        def divide(_: str, conv: Any, mesh: Any) -> None:
            for name, placement in placements.items():
                setattr(conv, name, nn.Parameter(distribute_tensor(getattr(conv, name), mesh, [placement])))

        def given(_: nn.Module, inputs: Any, mesh: Any) -> Any:
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False) if outputs else inputs[0]

        def returned(_: nn.Module, output: Any, mesh: Any) -> Any:
            return output if outputs else output.redistribute(placements=[Replicate()]).to_local()

        return distribute_module(module, mesh, divide, given, returned)


def gpt2() -> nn.Module:
    """Biases of GPT-2 are zero at first, and no measure of an error."""
    model = transformer("gpt2")
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.02)
    return model


def gpt2_by_hand(rank: int, world: int, folder: str) -> None:
    plan = {"transformer.h.*.mlp.c_fc": DividedConv1D(1), "transformer.h.*.mlp.c_proj": DividedConv1D(0)}
    for units in UNITS:
        results = []
        for divided in (False, True):
            model = gpt2()
            if divided:
                parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
            tuned = sk.train_only(model, selection(gpt2(), units))
            optimizer = optimizer_of(tuned)
            for seed in range(3):
                step(model, optimizer, seed)
            results.append((whole(model), tuned.delta()))
        same(results[1][0], results[0][0])
        assert results[1][1].selection == results[0][1].selection


def of_transformers(rank: int, world: int, folder: str) -> None:
    """from_pretrained divides a model by its own plan, and replaces the forward of each layer."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    for kind in DIVIDED:
        for units in UNITS:
            results = []
            for plan in (None, "auto"):
                model = loaded(f"{folder}/{kind}", plan)
                before = whole(model)
                tuned = sk.train_only(model, selection(loaded(f"{folder}/{kind}"), units))
                optimizer = optimizer_of(tuned)
                for seed in range(2):
                    step(model, optimizer, seed)
                    with torch.no_grad():
                        logits = model(ids(2, 7)).logits
                results.append((whole(model), logits, tuned.delta()))
            (wanted, logits, delta), (found, others, shipped) = results
            same(found, wanted)
            assert torch.allclose(others, logits, atol=1e-6)
            assert shipped.selection == delta.selection
            assert all(shipped.changes[name].base == change.base for name, change in delta.changes.items())
            for name, index in delta.selection.items():
                unselected = ~index.mask()
                assert torch.equal(found[name][unselected], before[name][unselected]), name
                assert not torch.equal(found[name], before[name]), name
    interrupted(model, tuned)
    resumed(f"{folder}/moe")


def resumed(folder: str) -> None:
    """Weights and optimizer of fused weights are loaded; the plan they were divided by is told; undone or kept."""
    before = whole(loaded(folder, "auto"))
    model, other = loaded(folder, "auto"), loaded(folder, "auto")
    tuned, again = (sk.train_only(each, selection(loaded(folder), "block")) for each in (model, other))
    optimizer, next_one = optimizer_of(tuned), optimizer_of(again)
    step(model, optimizer)
    saved = {name: x.clone() for name, x in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, 1)
    other.load_state_dict(saved[0])
    next_one.load_state_dict(saved[1])
    step(other, next_one, 1)
    trained = whole(model)
    same(whole(other), trained, 0.0)
    for state in saved[1]["state"].values():
        if len(state.get("layout", ())) == 4:
            state["layout"] = state["layout"][:3]
    with pytest.raises(ValueError, match="another number of tensor-parallel ranks, or another plan"):
        next_one.load_state_dict(saved[1])
    tuned.merge()
    same(whole(model), trained, 0.0)
    again.restore()
    same(whole(other), before, 0.0)


def interrupted(model: nn.Module, tuned: sk.SparseModel) -> None:
    """A forward that ends in the middle of a layer leaves the weights, and what comes next is right."""
    experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr]
    before, weight = whole(model), experts.gate_up_proj

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = experts.register_forward_pre_hook(interrupt)
    for look in (refuses_others, whole):
        with pytest.raises(KeyboardInterrupt):
            loss_of(model, ids(2, 7))
        assert experts.gate_up_proj is not weight
        found = look(model)
        same(before if found is None else found, before, 0.0)
    hook.remove()
    assert experts.gate_up_proj is weight
    loss_of(model, ids(2, 7)).backward()
    assert experts.gate_up_proj is weight
    assert all(p.grad is not None for p in tuned.parameters())


def refuses_others(model: nn.Module) -> None:
    state = {name: x.clone() for name, x in model.state_dict().items()}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, ids(2, 7))  # the state_dict removed what the first one left over
    with pytest.raises(ValueError, match=r"changes [\d,]+ weights of 'model.layers.0.mlp.experts.gate_up_proj'"):
        model.load_state_dict({**state, name: state[name] + 1})


def loaded(folder: str, plan: str | None = None) -> nn.Module:
    options = {"distributed_config": DistributedConfig(tp_plan=plan)} if plan else {}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)
    return model


def compiled_hooks(rank: int, world: int, folder: str) -> None:
    """Modules whose weights are views in forward: a norm, and one whose forward was replaced, each compiled or not."""
    mesh = init_device_mesh("cpu", (world,))
    for replaced in (False, True):
        results = []
        for compiled in (False, True):
            torch.manual_seed(5)
            norm = nn.LayerNorm(8)
            parallelize_module(norm, mesh, SequenceParallel())
            if replaced:
                norm.forward = norm.forward  # type: ignore[method-assign]
            tuned = sk.train_only(norm, sk.Selection({"weight": sk.Index(torch.tensor([1, 5]), (8,))}))
            if compiled:
                norm.compile(backend="aot_eager", fullgraph=True)
            optimizer = optimizer_of(tuned)
            for _ in range(2):
                norm(torch.randn(2, 6, 8)).to_local().square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(whole(norm))
        same(results[1], results[0])


def both(rank: int, world: int, folder: str) -> None:
    compiled_hooks(rank, world, folder)
    dist.barrier()
    gpt2_by_hand(rank, world, folder)
    dist.barrier()
    of_transformers(rank, world, folder)


@pytest.mark.compatibility("Tensor parallelism", "`from_pretrained` of transformers with a `tp_plan`", "works")
@uses_processes
def test_two_processes(tmp_path: Path) -> None:
    for kind, make in DIVIDED.items():
        make().save_pretrained(tmp_path / kind)
    in_processes(both, tmp_path)
