"""The op table: every kernel of the package, one row each. Start reading here.

A row names an op, its schema, what it computes, and its reference. torch's dispatcher picks the implementation: C++ if
a native library registered the op for the device, Triton on CUDA if none did, else the PyTorch reference. Arguments
that are the same everywhere:

    positions   sorted unique int32 or int64 numbers of units; CPU kernels that read others raise before they change
                anything
    tile        height and width of a unit: 1 x 1 an element, 1 x N a row, M x 1 a column, else a block; see
                common/units.py. `tiles` has one for each tensor of a list, flat
    rows        whether a position stands for a whole row of a matrix or for one element
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .adamw import reference as adamw
from .adamw_rows import reference as adamw_rows
from .columns import reference as columns
from .fisher import reference as fisher
from .gates import reference as gates
from .gather_scatter import reference as gather_scatter
from .ks import reference as ks
from .masked_grad import reference as masked_grad
from .singular_values import reference as singular_values
from .topk import reference as topk


def nothing(*args: object, **kwargs: object) -> None:
    """Fake of every op that only mutates."""


@dataclass(frozen=True)
class Op:
    """One row: `family` is the stem that csrc/, ops/, python_tests/ and benchmarks/ share."""

    name: str
    family: str
    schema: str
    doc: str
    reference: Callable[..., Any]
    fake: Callable[..., Any] = nothing


OPS: tuple[Op, ...] = (
    Op(
        "gather",
        "gather_scatter",
        "(Tensor source, Tensor positions, int[] tile) -> Tensor",
        "read the selected elements, rows, columns or blocks into a compact tensor",
        gather_scatter.gather,
        gather_scatter.gather_fake,
    ),
    Op(
        "scatter_",
        "gather_scatter",
        "(Tensor(a!) target, Tensor positions, Tensor values, int[] tile) -> ()",
        "write compact values over the selected elements, rows, columns or blocks",
        gather_scatter.scatter_,
    ),
    Op(
        "adamw_",
        "adamw",
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor[] steps, Tensor[] positions, Tensor(e!)[] weights, int[] tiles, "
        "float lr, float beta1, float beta2, float weight_decay, float eps, bool maximize, "
        "Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None, int[] rounding=[]) -> ()",
        "AdamW at selected positions of dense parameters, or on compact ones, written through into dense weights",
        adamw.adamw_,
    ),
    Op(
        "adamw_rows_",
        "adamw_rows",
        "(Tensor(a!) param, Tensor grad_values, Tensor ids, Tensor? slots, Tensor(b!) exp_avg, "
        "Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, Tensor scales, float beta1, float beta2, float eps, "
        "bool maximize, int[] rounding) -> ()",
        "AdamW on the rows that a sparse gradient lists, duplicates summed on the way",
        adamw_rows.adamw_rows_,
    ),
    Op(
        "masked_grad_linear",
        "masked_grad",
        "(Tensor grad_output, Tensor input, Tensor positions, int[] tile) -> Tensor",
        "weight gradient of a Linear at selected elements, rows, columns or blocks, without the dense gradient",
        masked_grad.masked_grad_linear,
        masked_grad.masked_grad_linear_fake,
    ),
    Op(
        "masked_grad_embedding",
        "masked_grad",
        "(Tensor grad_output, Tensor ids, Tensor positions, int[] tile, int padding_idx) -> Tensor",
        "weight gradient of an Embedding at selected elements, rows or blocks, without the dense gradient",
        masked_grad.masked_grad_embedding,
        masked_grad.masked_grad_embedding_fake,
    ),
    Op(
        "fisher_squares_",
        "fisher",
        "(Tensor(a!)[] totals, Tensor[] grads) -> ()",
        "add the squares of gradients, elementwise, over a list of tensors",
        fisher.fisher_squares_,
    ),
    Op(
        "fisher_linear_",
        "fisher",
        "(Tensor grad_output, Tensor input, Tensor(a!)? total, Tensor(b!)? norms, Tensor? positions, bool rows) -> ()",
        "add squared per-sample weight gradients of a Linear, and per-sample norms, at all or at selected positions",
        fisher.fisher_linear_,
    ),
    Op(
        "fisher_embedding_",
        "fisher",
        "(Tensor grad_output, Tensor ids, Tensor(a!)? total, Tensor(b!)? norms, Tensor? positions, bool rows, "
        "int padding_idx) -> ()",
        "the same for an Embedding's table: tokens of one id are summed within their sample, then squared",
        fisher.fisher_embedding_,
    ),
    Op(
        "fisher_vector_",
        "fisher",
        "(Tensor grad_output, Tensor? input, Tensor(a!)? total, Tensor(b!)? norms, Tensor? positions) -> ()",
        "the same for a bias, or for the weight of a norm",
        fisher.fisher_vector_,
    ),
    Op(
        "topk",
        "topk",
        "(Tensor[] scores, int k, bool magnitude) -> (Tensor positions, Tensor counts)",
        "positions of the k largest entries over a list of tensors; ties go to the lowest position",
        topk.topk,
        topk.topk_fake,
    ),
    Op(
        "ks_2samp",
        "ks",
        "(Tensor x, Tensor y, int alternative) -> (Tensor differences, Tensor locations)",
        "Kolmogorov-Smirnov test of two samples, row by row: statistics as exact integers, and where they are reached",
        ks.ks_2samp,
        ks.ks_2samp_fake,
    ),
    Op(
        "singular_value_grad",
        "singular_values",
        "(Tensor grad, Tensor u, Tensor v) -> Tensor",
        "gradient of singular values from the gradient of the weights: the diagonal of U^T G V, without the rest",
        singular_values.singular_value_grad,
        singular_values.singular_value_grad_fake,
    ),
    Op(
        "singular_value_grad_linear",
        "singular_values",
        "(Tensor grad_output, Tensor input, Tensor u, Tensor v, bool per_sample) -> Tensor",
        "the same straight from the activations of a Linear, per sample if wanted: no weight gradient is formed",
        singular_values.singular_value_grad_linear,
        singular_values.singular_value_grad_linear_fake,
    ),
    Op(
        "gate_values",
        "gates",
        "(Tensor logits, int kind, float noise, Tensor? key, int stream) -> (Tensor values, Tensor slopes)",
        "stochastic gates drawn for logits, and their derivatives",
        gates.gate_values,
        gates.gate_values_fake,
    ),
    Op(
        "gate_probabilities",
        "gates",
        "(Tensor[] logits, int kind, float noise) -> (Tensor probabilities, Tensor slopes)",
        "the chance of each gate to be open, over a list of tensors, and its derivative",
        gates.gate_probabilities,
        gates.gate_probabilities_fake,
    ),
    Op(
        "gated_weight",
        "gates",
        "(Tensor weight, Tensor? bias, Tensor? rows, Tensor? columns, int kind, float noise, Tensor? key, "
        "bool transposed, ScalarType dtype, int column_group) -> (Tensor gated, Tensor gated_bias)",
        "a weight times gates on its rows and columns, drawn on the way",
        gates.gated_weight,
        gates.gated_weight_fake,
    ),
    Op(
        "gate_gradient",
        "gates",
        "(Tensor a, Tensor b, Tensor logits, int kind, float noise, Tensor? key, int stream, int group) "
        "-> (Tensor gradient, Tensor of_values, Tensor scaled_sum)",
        "gradients of gates and of their logits from activations on one of their sides, and that of a gated bias",
        gates.gate_gradient,
        gates.gate_gradient_fake,
    ),
    Op(
        "take_columns",
        "columns",
        "(Tensor x, Tensor columns) -> Tensor",
        "read selected columns of every row into a narrower tensor",
        columns.take_columns,
        columns.take_columns_fake,
    ),
    Op(
        "put_columns",
        "columns",
        "(Tensor x, Tensor columns, int width) -> Tensor",
        "spread columns over wider rows, zeros between them",
        columns.put_columns,
        columns.put_columns_fake,
    ),
)
