"""The matrices inside of parameters: which there are, what they are called, and that writing one changes no other."""

import pytest
import torch
from models import TRANSFORMERS, transformer

from sparsekernels.matrices import matrices


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_matrices_of_a_parameter_cover_it_once(kind):
    model = transformer(kind)
    found = matrices(model, "*")
    parameters = dict(model.named_parameters())
    counts = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for matrix in found.values():
        count = counts[matrix.parameter]
        matrix.write_(count, matrix.read(count) + 1)
    for name, count in counts.items():
        assert torch.equal(count, torch.full_like(count, parameters[name].dim() == 2)), name
    assert list(found) == [m.label for m in found.values()]
    assert list(dict.fromkeys(m.parameter for m in found.values())) == [
        n for n, p in parameters.items() if p.dim() == 2
    ]
