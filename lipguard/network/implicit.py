"""Implicit layers z = phi(W z + v): when they have a meaning, and their value.

With slopes of phi in [alpha, beta] and T > 0 diagonal, let P(T) = (I - alpha W)'T (I - beta W) + its transpose. If P(T) > 0
then z exists, is unique and depends on v without jumps. To see this, let D be diagonal with entries in [alpha, beta]. If
z = D W z, then p = W z has (z - alpha p)(beta p - z) >= 0 entry by entry, so that -z'P(T)z =
2 sum_j t_j (z - alpha p)_j (beta p - z)_j >= 0 and z = 0: I - D W is invertible for all these D, a compact set. F(z) =
z - phi(W z + v) has F(z) - F(z') = (I - D W)(z - z') for some such D, hence is injective, open (invariance of domain) and
proper: a homeomorphism.

A layer that contracts in a weighted maximum norm has such a T as well: if I - M > 0 holds for the Metzler majorant M of W in
the sense of M-matrices, then T (I - M) + (I - M)'T > 0 for some T (Berman, Plemmons, Theorem 6.2.3), and |z|'T (I - M) |z| is
at most z'T (I - W) z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.errors import InvalidModel, NotConverged
from lipguard.network.activations import Elementwise
from lipguard.rounding import gamma

_THINNEST = 1e-6
"""Slope intervals thinner than this are widened to it, as in the semidefinite programs."""

_LARGEST_SEARCHED = 200
"""Neurons up to which the best T is searched at once; beyond, T = I is taken where it will do."""

_NEWTON_ENTRIES = 2**23
"""Entries of the stacks of matrices that Newton's method forms at a time: 64 MiB."""


def widened(function: Elementwise, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slopes of an implicit layer's activation, one per neuron, thin intervals widened."""
    alpha, beta = (s.detach().to(device, torch.float64).expand(size) for s in function.slopes)
    thin = (beta - alpha) < _THINNEST
    return torch.where(thin, alpha - _THINNEST / 2, alpha), torch.where(thin, beta + _THINNEST / 2, beta)


def unit_slopes(weight: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The layer with slopes [0, 1]: p = W~ u + V~ v and z = alpha p + (beta - alpha) u.

    Returns:
        W~ = (I - W alpha)^-1 W (beta - alpha) and V~ = (I - W alpha)^-1, each (n, n).
    """
    eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    inward = torch.linalg.inv(eye - weight * alpha) if bool(alpha.any()) else eye
    return inward @ (weight * (beta - alpha)), inward


def diagonal_scaling(weight: Tensor, alpha: Tensor, beta: Tensor, place: str) -> Tensor:
    """T > 0, (n,), with P(T) positive definite in floating point: what the checker then proves.

    Args:
        weight: W, (n, n), float64.
        alpha, beta: slopes of the neurons, (n,).
        place: name of the layer, for the error.
    Raises:
        InvalidModel: there is no such T, as far as the search can tell: the layer is not known to be well posed.
    """
    reason = "I - alpha W is singular"
    try:
        loop, _ = unit_slopes(weight, alpha, beta)
        scaling, bound = stabilising(torch.eye(len(weight), dtype=weight.dtype, device=weight.device) - loop)
        if scaling is not None:
            return scaling / (beta - alpha) ** 2
        reason = f"its smallest eigenvalue is at most {bound:.3g} for every T of mean 1"
    except RuntimeError:  # torch's LinAlgError
        pass
    slopes = f"[{float(alpha.min()):g}, {float(beta.max()):g}]"
    raise InvalidModel(
        f"{place}: z = phi(W z + v) is not known to be well posed for slopes in {slopes}: no diagonal T > 0 makes "
        f"2T - TW - W'T positive definite (after a change of variables to slopes [0, 1], {reason}). "
        "Parametrise W as lipguard.nn.LipschitzEquilibrium or ContractiveEquilibrium do."
    )


def stabilising(m: Tensor) -> tuple[Tensor | None, float]:
    """T > 0 of mean 1 with T M + M'T > 0, near the one whose smallest eigenvalue is largest, and a bound of that eigenvalue.

    Barrier method for: maximise lambda subject to S(t) - lambda I >= 0, t >= 0, sum t = n, with S(t) = sum_j t_j (e_j m_j' +
    m_j e_j'), m_j the rows of M. Each term has rank two, so that with X = (S - lambda I)^-1 the Hessian of -log det is
    2 (X o MXM' + XM' o MX), two products and no tensor of order three.

    Returns:
        (T, lambda), or (None, an upper bound of lambda) where the bound is not positive.
    """
    n = len(m)
    t = torch.ones_like(m[0]) if n else m.new_zeros(0)
    if n == 0:
        return t, math.inf
    scale = float(m.abs().max())
    if not (math.isfinite(scale) and scale > 0):
        return None, 0.0
    m = m / scale
    low = float(torch.linalg.eigvalsh(m + m.T)[0])
    if low > 0 and n > _LARGEST_SEARCHED:
        return t, low * scale
    value, tau = low - 1.0, 1.0
    eye, ones = torch.eye(n, dtype=m.dtype, device=m.device), torch.ones_like(t)
    bound = math.inf
    for _ in range(200):
        s = t[:, None] * m
        x = torch.linalg.inv(s + s.T - value * eye)
        mx = m @ x
        gradient = torch.cat([-2 * mx.diagonal() - 1 / t, (x.diagonal().sum() - tau)[None]])
        kkt = m.new_zeros(n + 2, n + 2)
        kkt[:n, :n] = 2 * (x * (mx @ m.T) + mx.T * mx) + torch.diag(t**-2)
        kkt[:n, n] = kkt[n, :n] = -2 * (mx * x).sum(1)
        kkt[n, n] = (x * x).sum()
        kkt[:n, n + 1] = kkt[n + 1, :n] = ones
        step = torch.linalg.solve(kkt, torch.cat([-gradient, m.new_zeros(1)]))[: n + 1]
        decrement = math.sqrt(max(-float(gradient @ step), 0.0))
        length = 1.0 if decrement < 0.5 else 1 / (1 + decrement)  # inside the domain: -log det is self-concordant
        t, value = t + length * step[:n], value + length * float(step[n])
        if decrement < 0.5:
            # Nearly centred: the largest lambda is within about 2n / tau of this one.
            bound = value + 3 * n / tau
            if bound <= 1e-12:
                return None, bound * scale
            if value > 0.5 * bound or (value > 0 and tau > 1e14):
                break
            tau *= 8
    s = t[:, None] * m
    info = int(torch.linalg.cholesky_ex(s + s.T).info)
    return (t, value * scale) if value > 0 and info == 0 and bool((t > 0).all()) else (None, bound * scale)


def equilibrium(weight: Tensor, v: Tensor, function: Elementwise, alpha: Tensor, beta: Tensor, place: str = "") -> Tensor:
    """z = phi(W z + v) for every row of v, (..., n), float64; differentiable once in W and v.

    Peaceman-Rachford splitting after the change of variables to slopes [0, 1] comes near from anywhere, Newton's method ends
    it; both converge for every layer with P(T) > 0. It stops where the residual is below the rounding of its own evaluation,
    gamma_n (|W| |z| + |v|), so that nothing is left to gain: about 1e-14 relative.

    Raises:
        NotConverged: the residual stays larger; the message says how large.
    """
    rows = v.reshape(-1, v.shape[-1])
    with torch.no_grad():
        z = _solve(weight.detach(), rows.detach(), function, alpha.detach(), beta.detach(), place)
    if torch.is_grad_enabled() and (v.requires_grad or weight.requires_grad):
        # One more Newton step, of size 0, whose derivative in W and v is that of the implicit function.
        z = z + _newton_step(weight.detach(), z, z - function(z @ weight.T + rows), function, rows.detach())
    return z.reshape(v.shape)


def _newton_step(weight: Tensor, z: Tensor, error: Tensor, function: Elementwise, v: Tensor) -> Tensor:
    p = z @ weight.T + v
    low, high = function.slope_range(p, p)
    slope = (low + high) / 2
    eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    count = max(1, _NEWTON_ENTRIES // max(1, weight.numel()))
    parts = zip(slope.split(count), error.split(count), strict=True)
    return torch.cat([torch.linalg.solve(eye - d[:, :, None] * weight, -e) for d, e in parts])


def _solve(weight: Tensor, v: Tensor, function: Elementwise, alpha: Tensor, beta: Tensor, place: str) -> Tensor:
    n = len(weight)
    if n == 0 or len(v) == 0:
        return torch.zeros_like(v)
    loop, inward = unit_slopes(weight, alpha, beta)
    forcing, width = v @ inward.T, beta - alpha
    inverse = torch.linalg.inv(2 * torch.eye(n, dtype=weight.dtype, device=weight.device) - loop).T
    magnitude = weight.abs().T
    u = state = half = reflected = torch.zeros_like(v)
    best, smallest = torch.zeros_like(v), torch.full_like(v[:, 0], math.inf)

    def consider(z: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the rows of z that are better; the errors of z and which rows are done."""
        nonlocal best, smallest
        error = z - function(z @ weight.T + v)
        mass = (z.abs() @ magnitude + v.abs()).amax(1)
        size = error.abs().amax(1) / mass.clamp_min(torch.finfo(v.dtype).tiny)
        better = size < smallest
        best, smallest = torch.where(better[:, None], z, best), torch.where(better, size, smallest)
        return error, smallest <= gamma(n + 4)

    for sweeps in (50, 200, 1000, 5000, 20000):
        for _ in range(sweeps):
            reflected = 2 * u - state
            half = (reflected + forcing) @ inverse
            state = 2 * half - reflected
            u = (function(state) - alpha * state) / width
        z = alpha * (2 * half - reflected) + width * half
        for _ in range(12):
            error, done = consider(z)
            if bool(done.all()):
                return best
            z = z + _newton_step(weight, z, error, function, v)
        if not bool(z.isfinite().all()):
            continue
        if float(smallest.max()) <= 16 * gamma(n + 4):  # the rounding of Newton's own solve
            return best
    raise NotConverged(
        f"{place or 'an implicit layer'}: the equilibrium is not reached: the relative residual is {float(smallest.max()):.3g}. "
        "The layer is nearly not well posed."
    )
