"""Implicit layers z = phi(W z + v) in the checker: that they are well posed, their gains, and enclosures of their values.

Every increment of the layer has dz = D (W dz + dv) with D diagonal between the slopes of phi. A gain g with ||dz||_2 <=
g ||dv||_2 for all these D is proved as the bound of the layer by itself, with its multipliers, by the linear matrix
inequality, which proves the layer well posed on the way (see `check_multipliers`).

In the maximum and the sum norm absolute values do: dz_i (1 - d_i W_ii) = d_i (sum_{j != i} W_ij dz_j + dv_i). Where
1 - d W_ii > 0 on the slopes, d / (1 - d W_ii) grows with d and is at most k_i in magnitude, so that

    |dz| <= N |dz| + K |dv|,  N = K |W - diag W|.

If y > N y + K b for a vector y > 0 and |dv| <= b, then N has spectral radius below 1 (Collatz, Wielandt), hence the layer is
well posed, and |dz| <= (I - N)^-1 K b <= y. With slopes [0, 1], N y < y says that I - M is an M-matrix for the Metzler
majorant M of W: that the weighted measure mu_inf(W) of arXiv:2106.03194 is below 1 for the weights 1 / y. The transposed layer
a = D (W'a + g) has the same K, and W' for W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import Multipliers
from lipguard.errors import InvalidModel, NotCertified
from lipguard.network import Implicit, Input, Network
from lipguard.rounding import TINY, UNIT, gamma, norm_up, sqrt_up, up
from lipguard.verify.enclosed import Enclosed, image, slopes_at
from lipguard.verify.lmi.multipliers import check_multipliers


def prove_gain(node: Implicit, p: float = 2.0) -> float:
    """g with ||dz||_p <= g ||dv||_p for all increments of the layer: a proof that it is well posed.

    For p of 1 and inf absolute values prove it, or, where the layer does not contract in these norms, n^(1/2) times the gain
    for p = 2: ||z||_inf <= ||z||_2 <= n^(1/2) ||z||_inf, and likewise for the 1-norm.

    Raises:
        NotCertified: it is not provably well posed.
    """
    if p == 2:
        return _gain(node)
    ones = torch.ones_like(node.widened[0])
    try:
        y = propose_magnitude(node, ones, p == 1)
        prove_magnitude(node, ones, y, p == 1)
        return float(y.max())
    except NotCertified:
        return up(_gain(node) * sqrt_up(len(ones)))


def _gain(node: Implicit) -> float:
    weight = node.operator.dense().to(torch.float64)
    n = len(weight)
    try:
        scaling, (alpha, beta) = node.scaling, node.widened
    except InvalidModel as error:
        raise NotCertified(str(error)) from error
    eye = torch.eye(n, dtype=torch.float64, device=weight.device)
    # Z over (z, v) at rho = 0, with C = 0: P(T) in the corner.
    q = torch.cat([weight, eye], 1)
    e = torch.cat([eye, torch.zeros_like(eye)], 1)
    half = (e - alpha[:, None] * q).T @ (scaling[:, None] * (e - beta[:, None] * q))
    z = half + half.T
    smallest = float(torch.linalg.eigvalsh(z[:n, :n])[0])
    best: tuple[float, Tensor] = (math.inf, scaling)
    for factor in (1.1, 1.4, 2.0, 3.0):
        scale = factor / max(smallest, torch.finfo(torch.float64).tiny)
        corner, info = torch.linalg.cholesky_ex(scale * z[:n, :n] - eye)
        if int(info) == 0:
            felt = torch.linalg.solve_triangular(corner, scale * z[:n, n:], upper=False)
            rho = float(torch.linalg.eigvalsh(felt.T @ felt - scale * z[n:, n:])[-1])
            best = min(best, (max(rho, 1e-300), scale * scaling), key=lambda pair: pair[0])
    if not math.isfinite(best[0]):
        raise NotCertified(f"{node.name or 'an implicit layer'} is not provably well posed: P(T) is not positive definite.")
    alone = Network((Input(n), Implicit(0, node.operator, node.function, node.name)))
    return check_multipliers(alone, Multipliers(best[1], best[0]), (2.0, 2.0))


def propose_magnitude(node: Implicit, b: Tensor, transposed: bool) -> Tensor:
    """y in floating point, a little above (I - N)^-1 K b; whatever it is, `prove_magnitude` decides."""
    weight = node.operator.dense().T if transposed else node.operator.dense()
    k = _amplification(node, weight)
    n = k[:, None] * (weight - torch.diag(weight.diagonal())).abs()
    system = torch.eye(len(k), dtype=k.dtype, device=k.device) - n
    y, info = torch.linalg.solve_ex(system, k * b)
    if int(info) != 0:
        return torch.full_like(y, math.nan)
    # What rounding may take from the inequality is added to it, and a smallest share where the input does not reach.
    least = 1e-12 * float((k * b).max()) + torch.finfo(torch.float64).tiny ** 0.5
    return torch.linalg.solve(system, k * b + 16 * gamma(len(k) + 8) * (y.abs() + n @ y.abs()) + least)


def prove_magnitude(node: Implicit, b: Tensor, y: Tensor, transposed: bool = False) -> None:
    """Prove that |dv| <= b implies |dz| <= y (transposed: that |g| <= b implies |a| <= y).

    Raises:
        NotCertified: y > N y + K b does not hold, or y is not positive.
    """
    weight = node.operator.dense().T if transposed else node.operator.dense()
    place = node.name or "an implicit layer"
    if y.shape != b.shape or not bool(y.isfinite().all()) or not bool((y > 0).all()):
        raise NotCertified(f"{place} is not known to contract in a maximum norm: no positive weights were found.")
    k = _amplification(node, weight)
    off = (weight - torch.diag(weight.diagonal())).abs()
    count = len(k) + 4
    needed = k * (off @ y + b) * (1 + 4 * gamma(count)) + (2 * count * TINY) * (1 + k)
    if not bool((needed < y).all()):
        raise NotCertified(f"{place} does not provably contract in the maximum norm with these weights.")


def _amplification(node: Implicit, weight: Tensor) -> Tensor:
    """K, (n,), rounded up: max |d / (1 - d W_ii)| over the slopes d.

    Raises:
        NotCertified: 1 - d W_ii is not provably positive.
    """
    own, found = weight.diagonal(), torch.zeros_like(weight[0])
    for d in node.widened:
        # Two roundings, of the product and of the difference.
        below = (1 - d * own) - 4 * UNIT * (1 + (d * own).abs()) - TINY
        if not bool((below > 0).all()):
            raise NotCertified(
                f"{node.name or 'an implicit layer'} does not contract in a maximum norm: a diagonal entry of W reaches "
                f"{float(own.max()):.4g} and the slopes {float(d.max()):.4g}."
            )
        found = torch.maximum(found, d.abs() / below * (1 + 4 * UNIT) + TINY)
    return found


def enclose(node: Implicit, v: Enclosed, dv: Enclosed) -> tuple[Enclosed, Enclosed]:
    """Enclosures of z and of dz = D (W dz + dv), D = diag of the slopes at z, from those of v and dv.

    For a point with residual r, z - phi(W z + v) = r, the error e against the solution satisfies e = D W e + r for some D
    between the slopes, so that e - r is the layer's response to W r: ||e||_2 <= ||r||_2 + g || |W| |r| ||_2. The tangent at
    fixed D is a layer of the same kind.

    Raises:
        NotCertified: the layer is not provably well posed.
    """
    gain, weight, size = prove_gain(node), node.operator, len(v.center)

    def spread_out(r: Tensor) -> Tensor:
        """Entrywise bound of the error that a residual of magnitude r leaves: r + g || |W| r ||_2, both sums rounded up."""
        reached = weight.abs()(r) * (1 + 4 * gamma(weight.terms + 6)) + size * TINY
        return (r + up(gain * norm_up(reached, 2.0), 2)) * (1 + 2 * UNIT)

    z = Enclosed(node.value(v.center))
    residual = z - image(node.function, z.through(weight) + v)
    z = Enclosed(z.center, spread_out(residual.magnitude()))
    slopes = slopes_at(node.function, z.through(weight) + v)
    eye = torch.eye(size, dtype=torch.float64, device=z.center.device)
    dz = Enclosed(torch.linalg.solve(eye - slopes.center[:, None] * weight.dense(), slopes.center * dv.center))
    residual = dz - (dz.through(weight) + dv) * slopes
    return z, Enclosed(dz.center, spread_out(residual.magnitude()))
