"""Calls of every op, with what they must give: one file a family, what they share in case.py."""

from __future__ import annotations

import itertools

from .adamw import adamw_samples
from .adamw_rows import adamw_rows_samples
from .case import Sample
from .columns import columns_samples
from .fisher import fisher_samples
from .fisher_vector import fisher_vector_samples
from .gates import gates_samples
from .gather_scatter import gather_scatter_samples, strided_values
from .ks import ks_samples
from .masked_grad import masked_grad_samples
from .singular_values import singular_values_samples
from .topk import topk_samples


def all_samples() -> dict[str, list[Sample]]:
    samples = [
        *gather_scatter_samples(),
        Sample("scatter_", "strided-values", strided_values),
        *adamw_samples(),
        *adamw_rows_samples(),
        *columns_samples(),
        *fisher_samples(),
        *fisher_vector_samples(),
        *gates_samples(),
        *ks_samples(),
        *masked_grad_samples(),
        *singular_values_samples(),
        *topk_samples(),
    ]
    return {op: list(group) for op, group in itertools.groupby(sorted(samples, key=lambda s: s.op), lambda s: s.op)}
