"""Fronts: the pieces into which a block-structured matrix inequality is split, each proved positive semidefinite by itself.

A symmetric matrix with a chordal block pattern is positive semidefinite iff it is a sum of positive semidefinite
matrices, one on each clique (Agler, Helton, McCullough, Rodman 1988). Block elimination writes the sum down: with

    front = [[P, X], [X', U]] >= 0,      Z = front + (Z - front),

the rest Z - front lives on the variables that are left, where U has been *added* to what is subtracted from the
diagonal. Any U will do for which the front is proved, so that nothing of one front's rounding enters the next: U is a
floating-point matrix and exact by definition. The least is X' P^-1 X; what `front` returns exceeds it by the shift of
the proof (Rump 2006), about n^2 u relative to the pivot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.rounding import TINY, UNIT, gamma, prove_positive_definite, up
from lipguard.verify.enclosed import Enclosed

_GROWTH, _TRIES = 8.0, 14
"""Shifts of the pivot are tried from the least that can succeed, each this factor above the one before."""

_THIN = 2.0**36
"""A column of X whose radius is not this much smaller than its own size is treated as if it were that size."""


def real(z: Tensor) -> Tensor:
    """Complex matrices (..., n, m) as real ones (..., 2n, 2m): Hermitian positive semidefinite iff their images are."""
    return torch.cat([torch.cat([z.real, -z.imag], -1), torch.cat([z.imag, z.real], -1)], -2)


def front(pivot: Enclosed, cross: Enclosed) -> Tensor:
    """U for which [[P, X], [X', U]] >= 0 is proved for every symmetric P and every X within their radii.

    Args:
        pivot: P, (F, n, n), center and radius symmetric.
        cross: X, (F, n, m).
    Returns:
        (F, m, m) float64, exactly symmetric, a little above X' P^-1 X.
    Raises:
        NotCertified: a pivot is not provably positive definite; the multipliers lie outside the cone or on its boundary.
    """
    p, x = pivot.center, cross.center
    n, m = x.shape[-2:]
    if m == 0:
        empty = p.new_zeros(len(p), 0, 0)
        if not bool(_proves(pivot, cross, empty).all()):
            raise NotCertified("the pivot of a front is not provably positive definite.")
        return empty
    s = _roots(p.diagonal(dim1=-2, dim2=-1))
    scaled, columns = p * s[:, :, None] * s[:, None, :], s[:, :, None] * x
    # What the test of the whole front gives away: after scaling its diagonal is below 2.
    least = 4 * gamma(n + m + 4) * (n + m) * (1 + 2.0**-20)
    moved = torch.zeros_like(s) if pivot.radius is None else s * _times(pivot.radius, s)
    felt = x.new_zeros(len(p), m) if cross.radius is None else _times(cross.radius.mT, s)
    shift = 2 * (least + moved.amax(-1))
    proved = torch.zeros(len(p), dtype=torch.bool, device=p.device)
    result = p.new_zeros(len(p), m, m)
    for _ in range(_TRIES):
        u, formed = _schur(scaled, columns, shift)
        size = torch.maximum(u.diagonal(dim1=-2, dim2=-1), (felt * _THIN) ** 2)
        size = torch.maximum(size, 2.0**-200 * size.amax(-1, keepdim=True)).clamp_min(TINY * 2.0**60)
        r = _roots(size)
        if cross.radius is not None:
            slack = torch.maximum((moved + s * _times(cross.radius, r)).amax(-1), (r * felt).amax(-1))
            asked = torch.maximum(shift, 2 * (least + slack))
            if bool((asked > shift).any()):
                shift = asked
                u, formed = _schur(scaled, columns, shift)
        u.diagonal(dim1=-2, dim2=-1).add_(shift[:, None] / (r * r))
        u = torch.tril(u) + torch.tril(u, -1).mT
        candidates = formed & ~proved & u.isfinite().all(-1).all(-1)
        chosen = candidates.nonzero()[:, 0]
        chosen = chosen[_proves(pivot[chosen], cross[chosen], u[chosen])]
        result[chosen] = u[chosen]
        proved[chosen] = True
        if bool(proved.all()):
            return result
        shift = torch.where(proved, shift, shift * _GROWTH)
    bad = int((~proved).nonzero()[0])
    raise NotCertified(f"the pivot of front {bad} of {len(p)} is not provably positive definite.")


def _schur(pivot: Tensor, cross: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """X' (P - c)^-1 X, and whether P - c > 0: with it in place of X' P^-1 X, c can be taken off the pivot's diagonal."""
    lowered = pivot.clone()
    lowered.diagonal(dim1=-2, dim2=-1).sub_(shift[:, None])
    factor, info = torch.linalg.cholesky_ex(lowered)
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    return half.mT @ half, info == 0


def _proves(pivot: Enclosed, cross: Enclosed, u: Tensor) -> Tensor:
    """Whether each front is positive semidefinite throughout the radii, (F,) of bool."""
    n = pivot.center.shape[-1]
    matrix = torch.cat([torch.cat([pivot.center, cross.center], -1), torch.cat([cross.center.mT, u], -1)], -2)

    def radius(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        if pivot.radius is not None:
            out[:, :n] += _times(pivot.radius, v[:, :n])
        if cross.radius is not None:
            out[:, :n] += _times(cross.radius, v[:, n:])
            out[:, n:] += _times(cross.radius.mT, v[:, :n])
        return out * (1 + 4 * UNIT)

    return prove_positive_definite(matrix, radius)


def largest_eigenvalue(matrix: Enclosed, pivot: Enclosed | None = None) -> float:
    """A proved rho >= 0 with rho P - S >= 0 for every symmetric P and S within their radii, close to the least one.

    Args:
        matrix: S, (n, n), center and radius symmetric.
        pivot: P, (n, n), likewise; None for the identity.
    Raises:
        NotCertified: the pivot is not provably positive definite, or the matrix is not finite.
    """
    s = matrix.center
    p = torch.eye(len(s), dtype=s.dtype, device=s.device) if pivot is None else pivot.center
    factor, info = torch.linalg.cholesky_ex(p)
    half = torch.linalg.solve_triangular(factor, s, upper=False)
    congruent = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    if int(info) != 0 or not bool(congruent.isfinite().all()):
        raise NotCertified("the last front's pivot is not provably positive definite.")
    value = max(float(torch.linalg.eigvalsh(congruent)[-1]), TINY * 2.0**60) if len(s) else TINY
    spread = 0.0 if matrix.radius is None else float(matrix.radius.sum(-1).max()) / value
    inflation = 16 * max(len(s), 1) ** 2 * UNIT + (2 * spread if pivot is None else 0.0)
    for _ in range(_TRIES):
        rho = up(value * (1 + inflation))
        if _reaches(matrix, p, None if pivot is None else pivot.radius, rho):
            return rho
        inflation *= _GROWTH
    raise NotCertified("the last front is not provably positive semidefinite at any rho.")


def _reaches(matrix: Enclosed, pivot: Tensor, pivot_radius: Tensor | None, rho: float) -> bool:
    scaled = rho * pivot
    # The product and the difference each round once.
    rounded = 3 * UNIT * (scaled.abs() + matrix.center.abs()) + TINY

    def radius(v: Tensor) -> Tensor:
        total = _times(rounded, v[0])
        if matrix.radius is not None:
            total = total + _times(matrix.radius, v[0])
        if pivot_radius is not None:
            total = total + rho * _times(pivot_radius, v[0])
        return (total * (1 + 8 * UNIT))[None]

    return bool(prove_positive_definite((scaled - matrix.center)[None], radius)[0])


def _roots(diagonal: Tensor) -> Tensor:
    """Powers of two near the inverse roots of positive entries, 1 elsewhere."""
    good = (diagonal > 0) & diagonal.isfinite()
    exponent = torch.frexp(torch.where(good, diagonal, torch.ones_like(diagonal))).exponent
    return torch.ldexp(torch.ones_like(diagonal), -torch.div(exponent, 2, rounding_mode="floor"))


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    """Upper bound of the product of nonnegative (..., n, m) and (..., m)."""
    m = matrix.shape[-1]
    product = (matrix @ v[..., None])[..., 0]
    return product * (1 + 2 * gamma(m + 4)) + m * TINY * (1 + v.sum(-1, keepdim=True))
