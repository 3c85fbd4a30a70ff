"""LASER where the loss does not tell one matrix from another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from comparing import assert_same, snapshot
from models import ids
from torch import Tensor, nn

from sparsekernels.methods import laser

QUIET = {"progress": False}


def clip() -> tuple[nn.Module, dict[str, Any]]:
    """Its loss compares the texts and images of a batch: of a single one it is zero, whatever the model does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 61, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    return transformers.CLIPModel(config), {
        "input_ids": ids(4, 7),
        "pixel_values": torch.randn(4, 3, 8, 8),
        "return_loss": True,
    }


def test_a_contrastive_loss_of_single_samples_ranks_nothing() -> None:
    model, batch = clip()
    before = snapshot(model)
    for run in (laser.rank, laser.adapt):
        with pytest.raises(
            ValueError, match=r'gradient of the loss is zero in all.*"second_order".*pass score="first_order"'
        ):
            run(model, [batch], **QUIET)
    one = {key: x[:1] if isinstance(x, Tensor) else x for key, x in batch.items()}
    with pytest.raises(ValueError, match=r"zero in all of the matrices.*needs several in a batch"):
        laser.rank(model, [one], score="first_order", **QUIET)
    ranking = laser.rank(model, [batch], score="first_order", **QUIET)
    with torch.no_grad():
        assert ranking.loss == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
    assert ranking.best()[0].predicted > 0
    assert_same(model, before)


class Product(nn.Module):
    """Two Linears one after the other, whose output is to vanish; beside them one whose output is to grow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])

    def forward(self, x: Tensor) -> Any:
        loss = self.blocks[1](self.blocks[0](x)).square().mean()
        if self.grows:
            loss = loss - self.blocks[2](x).square().mean()
        return transformers.modeling_outputs.ModelOutput(loss=loss)

    grows = False


def test_adapt_ends_where_what_it_reduced_cuts_the_others_off() -> None:
    model, batches = Product(), [{"x": torch.randn(5, 4)}]
    reduced = laser.adapt(model, batches, names=["blocks.0.weight", "blocks.1.weight"], rhos=(0.0,), **QUIET)
    assert len(reduced.plan) == 1
    assert reduced.report["after"] == 0.0
    assert (reduced.report["backwards"], len(reduced.report["candidates"])) == (2, 1)


def test_groups_of_rows_of_matrices_that_are_cut_off() -> None:
    """The two that do not matter rank above the one that must not be reduced, and are ranked by themselves then."""
    model, batches = Product(), [{"x": torch.randn(5, 4)}]
    model.grows = True
    with torch.no_grad():
        for block in model.blocks[:2]:
            block.weight.zero_()
    before = snapshot(model)
    for blocks in ((1, 2), (2,)):
        options = {"names": "blocks.*", "rhos": (0.0,), "num_candidates": 2, "score": "first_order", **QUIET}
        reduced = laser.adapt(model, batches, blocks=blocks, **options)
        assert not reduced.plan
        assert_same(model, before)
