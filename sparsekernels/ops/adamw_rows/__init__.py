"""One AdamW step for the rows of a table that a sparse gradient lists; duplicates are summed in the same pass."""

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
    """Step the rows of `param` that `ids` lists, in place; other rows and their state are not touched.

    Equivalent, for every row r in ids, with g the sum of grad_values[i] over all i with ids[i] = r, s = r or slots[r],
    and (decay, step_size) = scales[first such i] (or scales[0] if there is only one):
    m[s] = beta1 m[s] + (1 - beta1) g, v[s] = beta2 v[s] + (1 - beta2) g^2,
    x[r] = (1 - decay) x[r] - step_size m[s] / (sqrt(v[s]) + eps)

    Args:
        param ([V, *row], floating, contiguous): updated at the listed rows.
        grad_values ([T, *row], dtype of param, contiguous): gradient of each occurrence of a row.
        ids ([T], int64): the row of each, in any order, duplicates allowed, in [0, V).
        slots ([V], int32, or None): the entry of the state for each row; None if they are the same.
        exp_avg, exp_avg_sq, max_exp_avg_sq ([S, *row], fp32 or bf16, fp64 for fp64 param): state; updated. The last one
            is None without amsgrad.
        scales ([1, 2] or [T, 2], fp32, fp64 for fp64 param): decay and step size, for all rows or each entry of ids.
        beta1, beta2, eps, maximize: as in `torch.optim.AdamW`.
        rounding: () rounds half-precision results to nearest; (seed, step, stream) stochastically, with random bits
            (Philox4x32-10) from these three, the position in param and the array.

    Numerics: sums and arithmetic in fp32 (fp64 for fp64), duplicates in the order of ids; half-precision results are
    rounded once. Deterministic.
    Cost: for R different rows of D elements, fp32: 4 T D + 24 R D bytes.

    Raises:
        RuntimeError: tensors that do not fit each other, entries of ids or slots out of range; nothing is written then
            (native; not checked on a GPU).

    Source: the rule of `torch.optim.SparseAdam` with decoupled decay, for step_size = lr sqrt(1 - beta2^t) / (1 -
    beta1^t) and decay = lr weight_decay.

    Examples:
        >>> param, m, v = torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 2)
        >>> ids, grads, scales = torch.tensor([2, 2]), torch.ones(2, 2), torch.tensor([[0.0, 0.1]])
        >>> sk.ops.adamw_rows_(param, grads, ids, None, m, v, None, scales, beta1=0.0, beta2=0.0, eps=0.0)
        >>> param[2], int(param.count_nonzero())
        (tensor([-0.1000, -0.1000]), 2)
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
