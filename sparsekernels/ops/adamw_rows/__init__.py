"""One AdamW step over the rows of a table that a sparse gradient lists, duplicates summed on the way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backend import Backend, select


def adamw_rows_(
    param: Tensor,
    grad_values: Tensor,
    ids: Tensor,
    slots: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    scales: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool = False,
    rounding: Sequence[int] = (),
    backend: Backend | None = None,
) -> None:
    """Step the rows of `param` that `ids` lists; rows that it does not list, and their state, are not touched.

    Equivalent, for every row r in ids, with g the sum of grad_values[i] over all i with ids[i] = r, s = r or slots[r],
    and (decay, step_size) = scales[first such i] (or scales[0] if there is one line only):
    m[s] = beta1 m[s] + (1 - beta1) g, v[s] = beta2 v[s] + (1 - beta2) g^2,
    x[r] = (1 - decay) x[r] - step_size m[s] / (sqrt(v[s]) + eps): the rule of `torch.optim.SparseAdam` with
    decoupled decay, for step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t) and decay = lr weight_decay.

    Args:
        param ([V, *row], floating, contiguous): updated at the listed rows.
        grad_values ([T, *row], dtype of param, contiguous): gradient of each occurrence of a row.
        ids ([T], int64): the row of each, in any order, duplicates allowed.
        slots ([V], int32, or None): the line of the state that belongs to each row; None where they are the same.
        exp_avg, exp_avg_sq, max_exp_avg_sq ([S, *row], fp32 or bf16, fp64 for fp64 param): state; updated. The last
            one is None without amsgrad.
        scales ([1, 2] or [T, 2], fp32, fp64 for fp64 param): decay and step size, for all rows or each entry of ids.
        rounding: () rounds what is stored in half precision to nearest; (seed, step, stream) stochastically, by random
            bits (Philox4x32-10) that these three, the position in param and the array determine.

    Numerics: sums and arithmetic in fp32 (fp64 for fp64), duplicates in the order of ids:
        deterministic. What is stored in half precision is rounded once.
    Cost: for R different rows of D elements, fp32: 4 T D + 24 R D bytes.

    Raises:
        RuntimeError: tensors that do not fit each other, entries of ids or slots out of range; nothing is
            written then (native; on a GPU they are not checked).
    """
    select("adamw_rows_", param.device.type, backend)(
        param,
        grad_values,
        ids,
        slots,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        scales,
        beta1,
        beta2,
        eps,
        maximize,
        list(rounding),
    )
