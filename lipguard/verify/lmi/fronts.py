"""Fronts: the pieces into which a block-structured matrix inequality is split, each proved positive semidefinite by itself.

A Hermitian matrix with a chordal block pattern is positive semidefinite iff it is a sum of positive semidefinite
matrices, one on each clique (Agler, Helton, McCullough, Rodman 1988). Block elimination writes the sum down: with

    front = [[P, X], [X*, U]] >= 0,      Z = front + (Z - front),

the rest Z - front lives on the variables that are left, where U has been *added* to what is subtracted from the
diagonal. Any U will do for which the front is proved, so that nothing of one front's rounding enters the next: U is a
floating-point matrix and exact by definition. The least is X* P^-1 X; what `front` returns exceeds it by the shift of
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


def hermitian(matrix: Enclosed) -> Enclosed:
    """The same Hermitian matrices by their lower triangles, centers exactly Hermitian; both triangles' radii count."""
    center = torch.tril(matrix.center) + torch.tril(matrix.center, -1).mH
    if center.is_complex():
        center.diagonal(dim1=-2, dim2=-1).imag.zero_()
    return Enclosed(center, None if matrix.radius is None else torch.maximum(matrix.radius, matrix.radius.mT))


def front(pivot: Enclosed, cross: Enclosed) -> Tensor:
    """U for which [[P, X], [X*, U]] >= 0 is proved for every Hermitian P and every X within their radii.

    Args:
        pivot: P, (F, n, n), center and radius Hermitian.
        cross: X, (F, n, m), real or complex as P.
    Returns:
        (F, m, m), exactly Hermitian, a little above X* P^-1 X.
    Raises:
        NotCertified: a pivot is not provably positive definite; the multipliers lie outside the cone or on its boundary.
    """
    p, x = pivot.center, cross.center
    n, m = x.shape[-2:]
    if m == 0:
        if not bool(definite(pivot).all()):
            raise NotCertified("the pivot of a front is not provably positive definite.")
        return x.new_zeros(len(p), 0, 0)
    s = _roots(p.diagonal(dim1=-2, dim2=-1).real)
    scaled, columns = p * s[:, :, None] * s[:, None, :], s[:, :, None] * x
    # What the test of the whole front gives away: after scaling its diagonal is below 2.
    order = (n + m) * (2 if x.is_complex() else 1)
    least = 4 * gamma(order + 4) * order * (1 + 2.0**-20)
    moved = torch.zeros_like(s) if pivot.radius is None else s * _times(pivot.radius, s)
    reached = torch.zeros(len(p), m, dtype=s.dtype, device=s.device) if cross.radius is None else _times(cross.radius.mT, s)
    shift = 2 * (least + moved.amax(-1))
    proved = torch.zeros(len(p), dtype=torch.bool, device=p.device)
    result = x.new_zeros(len(p), m, m)
    for _ in range(_TRIES):
        u, formed = _schur(scaled, columns, shift)
        size = torch.maximum(u.diagonal(dim1=-2, dim2=-1).real, (reached * _THIN) ** 2)
        size = torch.maximum(size, 2.0**-200 * size.amax(-1, keepdim=True)).clamp_min(TINY * 2.0**60)
        r = _roots(size)
        if cross.radius is not None:
            slack = torch.maximum((moved + s * _times(cross.radius, r)).amax(-1), (r * reached).amax(-1))
            asked = torch.maximum(shift, 2 * (least + slack))
            if bool((asked > shift).any()):
                shift = asked
                u, formed = _schur(scaled, columns, shift)
        u.diagonal(dim1=-2, dim2=-1).add_(shift[:, None] / (r * r))
        u = hermitian(Enclosed(u)).center
        candidates = formed & ~proved & u.isfinite().all(-1).all(-1)
        chosen = candidates.nonzero()[:, 0]
        if len(chosen):
            chosen = chosen[_proves(pivot.at(chosen), cross.at(chosen), u[chosen])]
        result[chosen] = u[chosen]
        proved[chosen] = True
        if bool(proved.all()):
            return result
        shift = torch.where(proved, shift, shift * _GROWTH)
    bad = int((~proved).nonzero()[0])
    raise NotCertified(f"the pivot of front {bad} of {len(p)} is not provably positive definite.")


def _schur(pivot: Tensor, cross: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """X* (P - c)^-1 X, and whether P - c > 0: with it in place of X* P^-1 X, c can be taken off the pivot's diagonal."""
    lowered = pivot.clone()
    lowered.diagonal(dim1=-2, dim2=-1).sub_(shift[:, None])
    factor, info = torch.linalg.cholesky_ex(lowered)
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    return half.mH @ half, info == 0


def _proves(pivot: Enclosed, cross: Enclosed, u: Tensor) -> Tensor:
    """Whether each front is positive semidefinite throughout the radii, (F,) of bool."""
    # Each front has its own radius, lest one that all of them share exceed what most of them need.
    pivot, cross = (Enclosed(e.center, None if e.radius is None else e.radius.expand(e.center.shape)) for e in (pivot, cross))
    upper, lower = Enclosed.cat([pivot, cross], -1), Enclosed.cat([cross.mH, Enclosed(u)], -1)
    return definite(Enclosed.cat([upper, lower], -2))


def definite(matrix: Enclosed) -> Tensor:
    """Whether the Hermitian matrices (F, n, n), real or complex, are proved positive semidefinite throughout their radii."""
    center, spread, n = matrix.center, matrix.radius, matrix.center.shape[-1]
    parts = 2 if center.is_complex() else 1

    if spread is None:
        return prove_positive_definite(real(center) if parts == 2 else center)

    def radius(v: Tensor) -> Tensor:
        # Real and imaginary parts of an entry are each within its radius: [[R, R], [R, R]].
        return (_times(spread, v.unflatten(-1, (parts, n)).sum(-2)) * (1 + 8 * UNIT)).repeat(1, parts)

    return prove_positive_definite(real(center) if parts == 2 else center, radius)


def largest_eigenvalue(matrix: Enclosed, pivot: Enclosed | None = None) -> float:
    """A proved rho >= 0 with rho P - S >= 0 for every Hermitian P and S within their radii, close to the least one.

    Args:
        matrix: S, (F, n, n), center and radius Hermitian.
        pivot: P, (F, n, n), likewise; None for the identity.
    Raises:
        NotCertified: the pivot is not provably positive definite, or the matrix is not finite.
    """
    s, n = matrix.center, matrix.center.shape[-1]
    p = torch.eye(n, dtype=s.dtype, device=s.device)[None] if pivot is None else pivot.center
    congruent = s
    if pivot is not None:
        factor, info = torch.linalg.cholesky_ex(p)
        half = torch.linalg.solve_triangular(factor, s, upper=False)
        congruent = torch.linalg.solve_triangular(factor, half.mH, upper=False)
        congruent = congruent if not bool(info.any()) else congruent * torch.nan
    if not bool(congruent.isfinite().all()):
        raise NotCertified("the last front's pivot is not provably positive definite.")
    value = max(float(torch.linalg.eigvalsh(congruent).max()), TINY * 2.0**60) if n else TINY
    spread = 0.0 if matrix.radius is None or not n else float(matrix.radius.sum(-1).max()) / value
    inflation = 16 * max(n, 1) ** 2 * UNIT + (2 * spread if pivot is None else 0.0)
    start = Enclosed(p) if pivot is None else pivot
    for _ in range(_TRIES):
        rho = up(value * (1 + inflation))
        if bool(definite(start * p.new_tensor(rho) - matrix).all()):
            return rho
        inflation *= _GROWTH
    raise NotCertified("the last front is not provably positive semidefinite at any rho.")


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
