"""Singular value decompositions of weights: full or truncated, of all rows together or of groups of rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.backend import in_full_precision
from ..ops.common.arguments import DTYPES

OVERSAMPLING, ITERATIONS = 10, 4  # of the randomised method: directions beyond those asked for, power iterations
# Measured on two cores of Zen 4, 1024 to 4096 rows and columns: below this share of all triplets the randomised method
# is faster than the full decomposition.
RANDOMISED_BELOW = 0.25
AT_ONCE = 1 << 26  # elements of one shape that are decomposed together
EQUAL = 10  # singular values this many rounding errors of the largest apart are one repeated value


@dataclass(frozen=True, eq=False)
class Factors:
    """Some rows of a weight [M, N], as u diag(s) v^T.

    Attributes:
        u ([M', R], or [M, R] for all rows), s ([R], descending), v ([N, R]): fp32, or fp64 for fp64 weights.
        rows: which rows of the weight, int64 [M'], ascending; None for all of them.

    Source: ours.

    Examples:
        >>> (factors,) = sk.factorize([torch.diag(torch.tensor([3.0, 2.0, 1.0]))])
        >>> factors.s, factors.complete
        (tensor([3., 2., 1.]), True)
        >>> up, down = factors.truncated(rank=2)
        >>> up.shape, down.shape
        (torch.Size([3, 2]), torch.Size([2, 3]))
    """

    u: Tensor
    s: Tensor
    v: Tensor
    rows: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether these are all min(M', N) triplets."""
        return len(self.s) == min(len(self.u), len(self.v))

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up ([M', rank]) and down ([rank, N]), whose product approximates the rows.

        The best approximation of this rank if these are all triplets; otherwise nearly the best.

        Raises:
            ValueError: there are fewer triplets than `rank`.
        """
        if not 0 <= rank <= len(self.s):
            raise ValueError(f"rank must lie in [0, {len(self.s)}], the number of triplets, got {rank}")
        return self.u[:, :rank] * self.s[:rank], self.v[:, :rank].T.contiguous()


def factorize(weights: Sequence[Tensor], rank: int | None = None, *, seed: int = 0) -> list[Factors]:
    """Decompose weights into singular triplets; those of equal shape are batched.

    Equivalent to `[torch.linalg.svd(w.float(), full_matrices=False) for w in weights]`, full or truncated.

    Args:
        weights ([M, N] each; fp32, fp64, bf16 or fp16): not changed.
        rank: number of triplets wanted; None: all. If rank + 10 is below a quarter of all, the randomised method (Halko
            et al. 2009) is used, with 10 more directions and 4 power iterations, within about 1 % of the best
            approximation; otherwise a full decomposition.
        seed: of the randomised method, which uses no other generator.

    Returns:
        Factors for each weight, with at least min(rank, M, N) triplets.

    Numerics: in fp32, in fp64 for fp64 weights. Deterministic.
    Cost: about 20*M*N*min(M, N) operations for all triplets, 20*M*N*rank for `rank` of them.

    Raises:
        ValueError: a weight that is not two-dimensional, not floating point or not finite; a negative rank.

    Source: Halko, Martinsson and Tropp, arXiv 0909.4061, for the randomised method.

    Examples:
        >>> weights = [torch.randn(8, 6), torch.randn(6, 8)]
        >>> [(f.u.shape, f.s.shape, f.v.shape) for f in sk.factorize(weights[:1])]
        [(torch.Size([8, 6]), torch.Size([6]), torch.Size([6, 6]))]
        >>> f = sk.factorize(weights)[1]
        >>> torch.allclose(f.u * f.s @ f.v.T, weights[1], atol=1e-5)
        True
    """
    if rank is not None and rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for i, w in enumerate(weights):
        if w.dim() != 2 or w.dtype not in DTYPES:
            raise ValueError(
                f"weights[{i}] must be fp32, fp64, bf16 or fp16, of two dimensions, got {w.dtype} {list(w.shape)}"
            )
        alike[w.shape, w.dtype, w.device].append(i)
    found: dict[int, Factors] = {}
    for (shape, dtype, _), places in alike.items():
        compute_dtype = torch.promote_types(dtype, torch.float32)
        for some in torch.tensor(places).split(max(1, AT_ONCE // max(shape.numel(), 1))):
            stack = torch.stack([weights[i].detach().to(compute_dtype) for i in some.tolist()])
            broken = stack.isfinite().flatten(1).all(1).logical_not().nonzero()
            if len(broken):
                raise ValueError(f"weights[{int(some[broken[0]])}] has NaN or infinity, so it has no singular values")
            # LAPACK is twice as fast on a tall matrix as on a wide one.
            tall = stack if shape[0] >= shape[1] else stack.mT
            with in_full_precision(tall):
                u, s, v = _triplets(tall, rank, seed)
            u, v = (u, v) if shape[0] >= shape[1] else (v, u)
            found |= {i: Factors(*parts) for i, *parts in zip(some.tolist(), u, s, v, strict=True)}
    return [found[i] for i in range(len(weights))]


def _triplets(stack: Tensor, rank: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, s and v of [L, M, N] with M >= N."""
    most = stack.shape[2]
    if rank is None or rank + OVERSAMPLING >= RANDOMISED_BELOW * most:
        u, s, vh = torch.linalg.svd(stack, full_matrices=False)
        return u.contiguous(), s, vh.mT.contiguous()
    generator = torch.Generator(stack.device).manual_seed(seed)
    start = torch.randn(most, rank + OVERSAMPLING, generator=generator, device=stack.device, dtype=stack.dtype)
    basis = torch.linalg.qr(stack @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(stack @ torch.linalg.qr(stack.mT @ basis).Q).Q
    small, s, vh = torch.linalg.svd(basis.mT @ stack, full_matrices=False)
    return basis @ small[:, :, :rank], s[:, :rank], vh[:, :rank].mT.contiguous()


def split_rows(rows: int, blocks: int) -> list[Tensor]:
    """Row numbers of `blocks` consecutive blocks of nearly equal size."""
    return list(torch.arange(rows).tensor_split(blocks))


def cluster_rows(weight: Tensor, clusters: int, rank: int, *, iterations: int = 20) -> list[Tensor]:
    """Cluster the rows of a weight by the subspaces they lie near (k-subspaces); the weight is not changed.

    Starting from consecutive blocks, alternate: the best subspace of dimension `rank` for the rows of each cluster,
    then move each row to its nearest subspace, until no row moves. With full decompositions (see `factorize`), the sum
    of squared distances never grows, so clusters fit at least as well as blocks with subspaces of the same dimension.

    Args:
        weight ([M, N]; fp32, fp64, bf16 or fp16): not changed.
        clusters: number of clusters, in [1, M]; empty ones are dropped.
        rank: dimension of the subspaces, in [0, N].
        iterations: maximum number of alternations.

    Returns:
        The rows of each cluster, int64, ascending, on the CPU.

    Numerics: in fp32, in fp64 for fp64 weights. Deterministic.
    Cost: per iteration, the decomposition of all clusters and 2*M*N*clusters*rank operations.

    Raises:
        ValueError: numbers out of range.

    Source: objective and alternation as in projective clustering (Maalouf et al., ICLR 2021). Starting from blocks
    instead of random subspaces is ours.

    Examples:
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])
        >>> sk.cluster_rows(weight, clusters=2, rank=1)
        [tensor([0, 1]), tensor([2, 3, 4])]
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight must be fp32, fp64, bf16 or fp16, of two dimensions, got {weight.dtype} {list(weight.shape)}"
        )
    m, n = weight.shape
    if not 1 <= clusters <= m:
        raise ValueError(f"clusters must lie in [1, {m}], the rows of the weight, got {clusters}")
    if not 0 <= rank <= n:
        raise ValueError(f"rank must lie in [0, {n}], the columns of the weight, got {rank}")
    compute_dtype = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    members = split_rows(m, clusters)
    label = torch.cat([torch.full_like(rows, k) for k, rows in enumerate(members)])
    for _ in range(iterations if rank else 0):
        parts = factorize([compute_dtype[rows.to(compute_dtype.device)] for rows in members], rank)
        with in_full_precision(compute_dtype):
            inside = torch.stack([(compute_dtype @ part.v[:, :rank]).square().sum(1) for part in parts])
        # A row moves only if that reduces its distance; it stays in case of a tie.
        own = inside.gather(0, label.to(compute_dtype.device)[None])[0]
        best = inside.max(0)
        moved = torch.where(best.values > own, best.indices, label.to(compute_dtype.device)).cpu()
        if torch.equal(moved, label):
            break
        _, label = moved.unique(return_inverse=True)
        members = [(label == k).nonzero()[:, 0] for k in range(int(label.max()) + 1)]
    return members


def group_equal(values: Tensor, s: Tensor) -> Tensor:
    """Give every triplet of a repeated singular value the mean of `values` over them, and 0 where the value is zero.

    Only the sum over a repeated singular value is defined: its vectors may be rotated among themselves. For a singular
    value of zero, left and right vectors are unrelated.

    Args:
        values ([..., R]), s ([R], descending): neighbours within 10 rounding errors of s[0] count as repeated.
    """
    if not len(s):
        return values
    eps = torch.finfo(s.dtype).eps
    apart = s[:-1] - s[1:] > EQUAL * eps * s[0]
    if not bool(apart.all()):
        group = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
        sums = torch.zeros_like(values).index_add_(-1, group, values)
        counts = torch.zeros_like(s).index_add_(0, group, torch.ones_like(s))
        values = (sums / counts.clamp_min(1))[..., group]
    return values.masked_fill(s <= len(s) * eps * s[0], 0)
