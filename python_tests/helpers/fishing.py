"""What the tests of Fisher information share: ragged batches of many kinds of model, and the loop that is right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from models import FEW_WORDS, LANGUAGE_MODELS, MODELS
from torch import Tensor, nn

from sparsekernels import fisher_diagonal, squared_gradient_norms

SLOW = {
    "bart": "embed_positions",  # parts that are not split by sample, as the warning names them
    "gemma": "embed_tokens",  # its lookup scales what the table holds
    "opt": "embed_positions",
    "mixtral": "experts",
    "t5": "relative_attention_bias",
}


def model(kind: str, seed: int = 0) -> nn.Module:
    """A tiny model with random weights, in train mode, norms and biases random too."""
    torch.manual_seed(seed)
    made = MODELS[kind]().train()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def ragged(kind: str, lengths: Iterable[int] = (9, 4, 9, 1, 7), seed: int = 0) -> dict[str, Tensor]:
    """A batch of samples of these lengths, padded with random tokens that the mask hides."""
    lengths = [max(2, n) if kind in LANGUAGE_MODELS else n for n in lengths]  # one token has no next one
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, FEW_WORDS, (len(lengths), max(lengths)), generator=generator)
    ids[:, 0] = 1  # the end token that BART's classifier reads must occur as often in each sample
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    if kind in LANGUAGE_MODELS:
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.randint(0, 4, (len(lengths),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one(batch: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    return {key: x[b : b + 1] for key, x in batch.items()}


def gradients(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The gradient of each sample's own loss, in fp64: a plain loop over batches of one."""
    twin: Any = copy.deepcopy(model).double().eval().requires_grad_(True)
    found = []
    for batch in batches:
        for b in range(len(batch["input_ids"])):
            twin.zero_grad()
            twin(**one(batch, b)).loss.backward()
            found.append(
                {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in twin.named_parameters()}
            )
    return found


def fisher(grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(grad[name].square() for grad in grads) for name in grads[0]}


def norms(grads: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([sum(grad.square().sum() for grad in one.values()) for one in grads])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative error of each tensor as a whole; one that is zero but for rounding is measured by the largest."""
    assert list(found) == list(expected)
    largest = max(float(x.norm()) for x in expected.values())
    for name, x in expected.items():
        assert found[name].shape == x.shape
        error = float((found[name].double() - x).norm())
        assert error <= tolerance * float(x.norm()) + 1e-12 * largest, f"{name}: {error:.3g} of {float(x.norm()):.3g}"


QUIET = {"progress": False}


def silently(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The result, with no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return function(*args, **kwargs, **QUIET)


def fisher_and_norms(net: nn.Module, batches: Iterable[dict[str, Any]], **options: Any) -> Any:
    """Both, of batches that can be gone through once."""
    batches = list(batches)
    return (
        fisher_diagonal(net, iter(batches), **options),
        squared_gradient_norms(net, iter(batches), **options),
    )
