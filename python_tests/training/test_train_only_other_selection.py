"""A checkpoint that changes weights which are not selected is refused: no delta would hold them."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from models import Zoo, ids, transformer
from torch import nn

import sparsekernels as sk
from sparsekernels import Selection

REFUSED = r"changes [\d,]+ weights of '{}' that are not selected.*save the Selection with each checkpoint"


def trained(base: nn.Module, selection: Selection) -> dict[str, torch.Tensor]:
    """The state_dict of a copy of the base, trained at the selection."""
    model = copy.deepcopy(base)
    tuned = sk.train_only(model, selection)
    optimizer = sk.SparseAdamW(tuned.parameters(), lr=0.1)
    model(ids(4, 7)).square().sum().backward()
    optimizer.step()
    return model.state_dict()


def refuse(model: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Loading raises, and nothing has changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED.format(name)):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_another_selection(dtype: torch.dtype) -> None:
    """Other positions of one tensor, and tensors that are not selected at all."""
    base = Zoo().to(dtype)
    for names, other, first in (
        (["up.weight"], ["up.weight"], "up.weight"),
        (["up.weight"], ["conv.bias"], "conv.bias"),
    ):
        state = trained(base, Selection.random(base, 0.3, names=other, seed=1))
        model = copy.deepcopy(base)
        tuned = sk.train_only(model, Selection.random(base, 0.3, names=names))
        refuse(model, state, first)
        model.load_state_dict(trained(base, tuned.selection))
        model.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
        tuned.restore()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.state_dict().items())
        model.load_state_dict(state)


def test_one_weight_is_enough() -> None:
    """A sign of zero, the last element of a table of rows."""
    base = Zoo()
    base.embed.weight.data[-1, -1] = 0.0
    model = copy.deepcopy(base)
    sk.train_only(
        model, Selection({"embed.weight": sk.Index(torch.arange(5), base.embed.weight.shape, granularity="row")})
    )
    state = copy.deepcopy(base.state_dict())
    state["embed.weight"][:5] += 1
    model.load_state_dict(state)
    state["embed.weight"][-1, -1] = -0.0
    refuse(model, state, "embed.weight")


def test_parts_and_wrappers() -> None:
    """Also where load_state_dict of a part is called, or of a module around the model."""
    base = Zoo()
    model = nn.ModuleDict({"inner": copy.deepcopy(base)})
    sk.train_only(model["inner"], Selection.random(base, 0.3, names=["up.weight"]))
    other = trained(base, Selection.random(base, 0.3, names=["conv.weight", "up.weight"], seed=1))
    refuse(model, {f"inner.{key}": value for key, value in other.items()}, "(up|conv).weight")
    for part in ("up", "conv"):
        refuse(
            model["inner"].get_submodule(part),
            {"weight": other[f"{part}.weight"], "bias": other[f"{part}.bias"]},
            "weight",
        )


def test_a_wrapper_around_a_part() -> None:
    """It does not hold the model, so the part is the first that the load comes to."""
    base = Zoo()
    sk.train_only(base, Selection.random(base, 0.3, names=["conv.bias"]))
    wrapper = nn.ModuleDict({"up": base.up, "conv": base.conv})
    for name in ("up.weight", "conv.weight"):
        state = copy.deepcopy(wrapper.state_dict())
        state[name] = state[name] + 1
        refuse(wrapper, state, name.partition(".")[2])
    wrapper.load_state_dict(wrapper.state_dict())


def test_an_adapter_that_comes_later_may_be_loaded(tmp_path: Path) -> None:
    """PEFT loads it frozen, for inference."""
    base = transformer("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(ids(2, 7)).logits
    sk.train_only(base, Selection.random(base, 0.3, names=["model.embed_tokens.weight"]))
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(wrapped(ids(2, 7)).logits, expected)


def test_tied_weights() -> None:
    base = transformer("llama")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    selection = Selection.random({names[1]: base.lm_head.weight.shape}, 0.3)
    model = copy.deepcopy(base)
    sk.train_only(model, selection)
    state = copy.deepcopy(base.state_dict())
    changed = state[names[0]].clone()
    changed.view(-1)[selection[names[1]].positions.long()] += 1
    model.load_state_dict({**state, **dict.fromkeys(names, changed)})
    changed = changed + 1
    refuse(model, {**state, **dict.fromkeys(names, changed)}, names[0])


def test_weights_that_the_user_trains_beside_may_change() -> None:
    model = Zoo()
    sk.train_only(model, Selection.random(model, 0.3, names=["up.weight"]))
    model.head.weight.requires_grad_(True)
    state = copy.deepcopy(model.state_dict())
    state["head.weight"] += 1
    model.load_state_dict(state)
    assert torch.equal(model.head.weight.detach(), state["head.weight"])


def test_what_a_reselection_left_as_trained_may_change() -> None:
    """In a new process the calls of reselect are repeated, then the checkpoint is loaded."""
    base = Zoo()
    first, second = (Selection.random(base, 0.3, names=["up.weight", "embed.weight"], seed=s) for s in range(2))
    second = Selection({"up.weight": second["up.weight"]})
    states = []
    for _ in range(2):
        model = copy.deepcopy(base)
        tuned = sk.train_only(model, first)
        if not states:
            for values in tuned.parameters():
                values.data += 1
            tuned.sync_()
        tuned.reselect(second, restore=False)
        if states:
            model.load_state_dict(states[0])
            assert set(tuned.delta().changes) == {"up.weight", "embed.weight"}
            tuned.restore()
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.state_dict().items())
        else:
            states.append(copy.deepcopy(model.state_dict()))


def test_models_without_memory() -> None:
    """A model under train_only runs on meta; positions and originals are still there when it comes back empty."""
    base = Zoo()
    model = copy.deepcopy(base)
    selection = Selection.random(base, 0.3)
    tuned = sk.train_only(model, selection)
    model.to("meta")
    for _ in range(2):
        model(ids(4, 7).to("meta")).sum().backward()
    assert all(values.grad.is_meta for values in tuned.parameters())
    model.to_empty(device="cpu")
    assert dict(tuned.selection) == dict(selection)
    tuned.restore()
    for name, index in selection.items():
        original = base.get_parameter(name).detach()
        assert torch.equal(sk.ops.gather(model.get_parameter(name).detach(), index), sk.ops.gather(original, index))


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_that_is_on_meta_at_first(assign: bool) -> None:
    """It trains once the weights are loaded; what they were before nobody knows."""
    base = Zoo()
    selection = Selection.random(base, 0.3)
    with torch.device("meta"):
        model = Zoo()
    tuned = sk.train_only(model, selection)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(base.state_dict()), assign=assign)
    plain = sk.train_only(base, selection)
    states = []
    for each in (tuned, plain):
        optimizer = sk.SparseAdamW(each.parameters(), lr=0.1)
        each.model(ids(4, 7)).square().sum().backward()
        optimizer.step()
        states.append(copy.deepcopy(each.model.state_dict()))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    for refused in (tuned.restore, tuned.delta):
        with pytest.raises(ValueError, match=r"meta device when train_only was called.*load the weights first"):
            refused()
    tuned.merge()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_nothing_selected_in_one_tensor(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tuned = sk.train_only(model, Selection({"0.weight": sk.Index(torch.zeros(0, dtype=torch.int64), (4, 4))}))
    model.to(device)
    for _ in range(2):
        model(torch.ones(2, 4, device=device)).sum().backward()
    assert all(values.grad.numel() == 0 for values in tuned.parameters())


def test_nothing_is_restored_where_one_weight_cannot_be() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    tuned = sk.train_only(model, Selection.random(model, 0.5, names=["0.weight", "1.weight"]))
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        next(tuned.parameters()).add_(1)
    tuned.sync_()
    changed = model[0].weight.detach().clone()
    assert not torch.equal(before, changed)
    with pytest.raises(ValueError, match=r"merge\(\) gives the model back"):
        tuned.restore()
    assert torch.equal(model[0].weight.detach(), changed)
    tuned.merge()


def test_assigned_weights_of_another_dtype_are_refused() -> None:
    """The frozen ones would not be what restore() gives back."""
    model = Zoo().bfloat16()
    tuned = sk.train_only(model, Selection.random(model, 0.3, names=["up.weight"]))
    state = {name: x.float() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"assign=True.*torch.float32, and it is torch.bfloat16"):
        model.load_state_dict(state, assign=True)
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if not name.endswith("_values"))
    model.load_state_dict(state)
    tuned.restore()
