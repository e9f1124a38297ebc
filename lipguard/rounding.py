"""Rounding-error bounds for float64, outward rounding, and a rigorous positive-definiteness test.

Everything here assumes IEEE 754 double precision with round to nearest, and that sums may be formed in any
order, with or without fused multiply-add. Source of the constants: Higham, Accuracy and Stability of Numerical
Algorithms (2002), section 3.1; Rump, BIT 46 (2006), "Verification of positive definiteness".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

UNIT = 2.0**-53
"""Unit roundoff u of float64."""

TINY = 2.0**-1022
"""Smallest normal number: products below it lose relative accuracy, each by less than this."""


def gamma(n: int) -> float:
    """Upper bound of gamma_n = n u / (1 - n u), the relative error of n successive roundings (Higham, Lemma 3.1)."""
    nu = n * UNIT
    if nu >= 0.01:
        raise ValueError(f"gamma({n}) is meaningless: the sum is too long for float64.")
    return nu * (1 + 2 * nu)


def compounded(*radii: float) -> float:
    """(1 + r_1) (1 + r_2) ... - 1 for relative radii r >= 0, rounded up; nothing rounds where at most one is not 0."""
    total = 0.0
    for radius in (r for r in radii if r):
        total = up(up(total + radius) + up(total * radius)) if total else radius
    return total


def powers_of_two(x: Tensor) -> bool:
    """Whether every entry is 0 or a power of two, of either sign: products with them are exact in the normal range."""
    return bool((x.frexp().mantissa.abs().eq(0.5) | (x == 0)).all())


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what the rounding lost, exactly (Knuth)."""
    s = a + b
    other = s - a
    return s, (a - (s - other)) + (b - other)


FLUSHED = (
    "torch flushes denormal numbers to 0, so that numbers below the normal range are lost; bounds are of the stored weights. "
    "Call torch.set_flush_denormal(False) before."
)
"""What to say where `flushes_denormals`."""


def flushes_denormals() -> bool:
    """Whether this thread's arithmetic takes numbers below the normal range for 0 (`torch.set_flush_denormal(True)`)."""
    return not bool((torch.tensor([TINY / 2], dtype=torch.float64, device="cpu") * 1.0).any())


def up(x: float, ulps: int = 1) -> float:
    """x moved up by `ulps` floating-point numbers."""
    for _ in range(ulps):
        x = math.nextafter(x, math.inf)
    return x


def down(x: float, ulps: int = 1) -> float:
    """x moved down by `ulps` floating-point numbers."""
    for _ in range(ulps):
        x = math.nextafter(x, -math.inf)
    return x


def sqrt_up(x: float) -> float:
    """An upper bound of the square root of x >= 0."""
    return up(math.sqrt(x))


def sum_up(x: Tensor, dim: int | None = None) -> Tensor:
    """Upper bound of the sum of nonnegative entries (along dim): the computed sum times 1 + gamma."""
    count = x.numel() if dim is None else x.shape[dim]
    total = x.sum() if dim is None else x.sum(dim)
    return total * (1 + 2 * gamma(count + 2)) + count * TINY


def norm_up(x: Tensor, p: float) -> float:
    """Upper bound of the p-norm (1, 2 or inf) of a vector of nonnegative entries."""
    largest = float(x.max()) if x.numel() else 0.0
    if p == math.inf or largest == 0 or not math.isfinite(largest):
        return largest
    if p == 1:
        return up(float(sum_up(x)))
    # Scaling by a power of two keeps the squares away from under- and overflow.
    scale = 2.0 ** math.frexp(largest)[1]
    return up(scale * up(math.sqrt(up(float(sum_up((x / scale) ** 2)), 2)), 2))


def proves_positive_definite(matrix: Tensor, radius: Callable[[Tensor], Tensor] | None = None) -> bool:
    """Whether every symmetric matrix within the radius of `matrix` is provably positive semidefinite.

    Args:
        matrix: (n, n) float64, symmetric; only the lower triangle is used.
        radius: v -> an upper bound of R v for v >= 0, where R >= 0 bounds entrywise the distance between `matrix`
            and the matrix that is meant. None means that `matrix` is meant exactly.
    Returns:
        True is a proof. False proves nothing.
    """
    batched = None if radius is None else lambda v: radius(v[0])[None]
    if bool(prove_positive_definite(matrix[None], batched)[0]):
        return True
    if radius is None or matrix.shape[0] == 0:
        return False
    # Where large terms cancel on the diagonal, scaling it to 1 blows their radius up beside entries that did not cancel.
    # Then the radius is made even instead.
    spread = radius(matrix.new_ones(matrix.shape[0]))
    if not bool(((spread > 0) & spread.isfinite()).all()):
        return False
    return bool(prove_positive_definite(matrix[None], batched, (spread / spread.max())[None])[0])


def prove_positive_definite(
    matrices: Tensor, radius: Callable[[Tensor], Tensor] | None = None, size: Tensor | None = None
) -> Tensor:
    """The same for a batch (K, n, n), with `radius` from (K, n) to (K, n); returns (K,) of bool.

    Rows and columns are scaled to a diagonal of ones, or by `size` (K, n) > 0 in its place.

    Method: Rump 2006, Theorem 2.3 with Corollary 2.4. If Cholesky of A - c I, in floating point, runs to
    completion, then A - c I + E = R'R with |E| <= gamma_{n+1} / (1 - gamma_{n+1}) d d', d_i = sqrt(a_ii); hence
    lambda_min(A) >= c - ||E|| and ||E|| <= gamma_{n+1} / (1 - gamma_{n+1}) trace(A). Blocked LAPACK kernels multiply
    by reciprocals of the diagonal, at most two further roundings an entry: the constant is taken at n + 4 and
    doubled. Diagonal scaling by powers of two (exact) makes the trace comparable with every entry.
    """
    n = matrices.shape[-1]
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    if n == 0:
        return torch.ones(len(matrices), dtype=torch.bool, device=matrices.device)
    proved = ((diagonal > 0) & diagonal.isfinite()).all(-1)
    diagonal = torch.where(proved[:, None], diagonal, torch.ones_like(diagonal))
    # s_i a power of two with s_i^2 a_ii in [1/2, 2): exact as long as nothing under- or overflows.
    exponent = torch.frexp(diagonal if size is None else size).exponent
    scale = torch.ldexp(torch.ones_like(diagonal), -torch.div(exponent, 2, rounding_mode="floor"))
    scaled = (matrices * scale[:, :, None]).mul_(scale[:, None, :])
    # The norm of S R S is at most its largest row sum, the largest entry of s * (R s).
    slack = 0.0 if radius is None else (scale * radius(scale)).amax(-1) * (1 + 2**-40)
    trace = sum_up(scaled.diagonal(dim1=-2, dim2=-1).clamp_min(0), dim=-1)
    shift = 2 * gamma(n + 4) * (1 + 4 * gamma(n + 4)) * trace + slack + 4 * n * n * TINY
    # Subtracting the shift from a diagonal entry (below 2, or the largest) rounds by at most u (2 + shift), counted twice.
    top = scaled.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(2)
    shift = shift + 4 * UNIT * (top + shift)
    proved &= shift.isfinite()
    scaled.diagonal(dim1=-2, dim2=-1).sub_(shift[:, None])
    # A nan or an infinity in the matrix makes the factorisation fail or shows in its diagonal.
    factors, info = torch.linalg.cholesky_ex(scaled)
    return proved & (info == 0) & factors.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
