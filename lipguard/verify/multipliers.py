"""Check of `Multipliers`: the LipSDP matrix, rebuilt with rounding radii, is positive semidefinite.

With q_j the rows of Q = [B A] (pre-activations in terms of neurons w and inputs x) and e_j the unit vectors of w,

    Z(rho, t) = rho E_x + sum_j t_j [(e_j - alpha_j q_j)(e_j - beta_j q_j)' + transpose] - [C D]'[C D].

If Z >= 0 then ||f(x) - f(y)||_2 <= sqrt(rho) ||x - y||_2 (Fazlyab et al. 2019, arXiv:1906.04893, Theorem 2).
Where all alpha are 0 and D is 0, the input block is rho I and is eliminated exactly:

    R(rho, t) = 2T - TB - B'T - C'C - (TA)(TA)' / rho >= 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.certificate import Multipliers
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Input, Network, Operator, Sum
from lipguard.rounding import TINY, UNIT, gamma, proves_positive_definite, sqrt_up, up
from lipguard.verify.factors import frobenius_bound

_THINNEST = 1e-6
"""A slope interval thinner than this is widened to it: a superset, and a multiplier can stay finite."""


@dataclass(frozen=True)
class Enclosed:
    """A matrix known up to an entrywise radius (None: exactly)."""

    center: Tensor
    radius: Tensor | None = None

    def magnitude(self) -> Tensor:
        """Upper bound of the absolute values."""
        return self.center.abs() if self.radius is None else (self.center.abs() + self.radius) * (1 + 2.0**-52)


@dataclass(frozen=True)
class Form:
    """The feedback form with rounding radii: Q = [B A] is (n, n + d), Y = [C D] is (m, n + d)."""

    q: Enclosed
    y: Enclosed
    neurons: int
    alpha: Tensor
    beta: Tensor


def check_multipliers(network: Network, evidence: Multipliers, norm: tuple[float, float]) -> float:
    """The smallest provable bound sqrt(rho) at or just above the proposed one.

    Negative and non-finite multipliers are set to zero first.

    Raises:
        NotCertified: the norm is not (2, 2), the number of multipliers is not the number of neurons, or no rho within
            10 % of the proposal is provable.
    """
    if norm != (2.0, 2.0):
        raise NotCertified(f"multipliers prove bounds from 2-norm to 2-norm, not {norm}.")
    form = feedback_form(network)
    t = evidence.t.detach().to(network.device, torch.float64).flatten()
    if t.numel() != form.neurons:
        raise NotCertified(f"{t.numel()} multipliers are given for {form.neurons} neurons.")
    t = torch.where(t.isfinite(), t, torch.zeros_like(t)).clamp_min(0)
    prove = prover(form, t)
    # The test needs the smallest eigenvalue above about n^2 u; a rho closer than that to the least one cannot be proved.
    inflation = 32 * max(form.neurons, 1) ** 2 * UNIT
    while inflation < 0.1:
        rho = up(evidence.rho * (1 + inflation))
        if rho > 0 and prove(rho):
            return sqrt_up(rho)
        inflation *= 8
    raise NotCertified(f"the LMI is not provably positive semidefinite at rho = {evidence.rho:.6g}, nor at a rho 10 % larger.")


def prover(form: Form, t: Tensor) -> Callable[[float], bool]:
    """The test rho -> whether Z(rho, t) >= 0 is proved; what does not depend on rho is computed once."""
    n = form.neurons
    if n == 0:
        bound = frobenius_bound(form.y.magnitude())
        return lambda rho: rho >= up(bound * bound) or _linear(form, rho)
    direct = form.y.center[:, n:]
    eliminates = (
        not bool(form.alpha.any()) and not bool(direct.any()) and (form.y.radius is None or not bool(form.y.radius[:, n:].any()))
    )
    return _reduced(form, t) if eliminates else _full(form, t)


def _linear(form: Form, rho: float) -> bool:
    """rho I - D'D >= 0, for a network without neurons."""
    none = torch.zeros(0, dtype=torch.float64, device=form.y.center.device)
    return _full(form, none)(rho)


def _reduced(form: Form, t: Tensor) -> Callable[[float], bool]:
    """R(rho, t) >= 0 for slopes [0, beta].

    beta != 1: w = beta * w' with w' of slope [0, 1] gives, with e_j - alpha_j q_j = e_j,
    2T - T diag(beta) B - B' diag(beta) T - C'C - (T diag(beta) A)(...)'/ rho.
    """
    n = form.neurons
    b = Enclosed(form.q.center[:, :n], None if form.q.radius is None else form.q.radius[:, :n])
    a = Enclosed(form.q.center[:, n:], None if form.q.radius is None else form.q.radius[:, n:])
    seen = a.center.any(1) if a.radius is None else a.center.any(1) | a.radius.any(1)
    rows = seen.nonzero()[:, 0].tolist()
    # Only the rows that see the input; commonly the first layer, which needs no copy.
    span = slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)
    a = Enclosed(a.center[span], None if a.radius is None else a.radius[span])
    c = Enclosed(form.y.center[:, :n], None if form.y.radius is None else form.y.radius[:, :n])
    tb = t * form.beta
    ta = tb[span]
    coupling = tb[:, None] * b.center
    fixed = torch.zeros_like(coupling).addmm_(c.center.T, c.center, alpha=-1)
    fixed.sub_(coupling).sub_(coupling.T).diagonal().add_(2 * t)
    gram = a.center @ a.center.T
    # Cauchy-Schwarz: sum_k |a_ik| |a_jk| <= ||a_i|| ||a_j||, with ||a_i||^2 on the diagonal of A A'.
    abs_b = b.magnitude()
    norm_a, norm_c = _row_norms(a, gram.diagonal()), _row_norms(Enclosed(c.center.T, None if c.radius is None else c.radius.T))
    abs_a, abs_c = (None if e.radius is None else e.magnitude() for e in (a, c))
    gram.mul_(ta[:, None]).mul_(ta)
    # Every entry of R is a sum of at most six terms, each with at most max(d, m) + 6 roundings.
    count = max(a.center.shape[1], c.center.shape[0]) + 16
    error = gamma(count)
    top = 1 + float(t.sum()) + float(tb.sum())

    def prove(rho: float) -> bool:
        matrix = fixed.clone()
        matrix[span, span].sub_(gram, alpha=1 / rho)

        def radius(v: Tensor) -> Tensor:
            va = ta * v[span]
            mass = 2 * t * v + tb * (abs_b @ v) + abs_b.T @ (tb * v) + norm_c * (norm_c @ v)
            mass[span] += ta * norm_a * (norm_a @ va) / rho
            total = error * mass
            if b.radius is not None:
                total += tb * (b.radius @ v) + b.radius.T @ (tb * v)
            if abs_c is not None:
                total += _square_radius(c, abs_c, v)
            if a.radius is not None and abs_a is not None:
                total[span] += ta * _square_radius(Enclosed(a.center.T, a.radius.T), abs_a.T, va) / rho
            # Products below the normal range lose less than TINY each, before they are multiplied by t, t^2 / rho or 1 / rho.
            lost = count * TINY * (top + top * top / rho)
            return total * (1 + 8 * gamma(v.numel() + count)) + lost * v.sum()

        return proves_positive_definite(matrix, radius)

    return prove


def _row_norms(e: Enclosed, squares: Tensor | None = None) -> Tensor:
    """Upper bounds of the 2-norms of the rows; `squares`: their computed squares, where there is no radius."""
    if squares is None or e.radius is not None:
        squares = (e.magnitude() ** 2).sum(1)
    count = e.center.shape[1]
    # Squares that underflow lose less than TINY each.
    return (squares * (1 + 2 * gamma(count + 4)) + count * TINY).sqrt() * (1 + 4 * UNIT)


def _square_radius(c: Enclosed, abs_c: Tensor, v: Tensor) -> Tensor:
    """Bound of (|C'C - center'center|) v for |C - center| <= radius."""
    if c.radius is None:
        return torch.zeros_like(v)
    return c.radius.T @ (abs_c @ v) + abs_c.T @ (c.radius @ v)


def _full(form: Form, t: Tensor) -> Callable[[float], bool]:
    """Z(rho, t) >= 0 over (w, x), for any slopes and a direct path from input to output."""
    n = form.neurons
    q, y = form.q.center, form.y.center
    total = q.shape[1]
    cross = t * (form.alpha + form.beta)
    curve = 2 * t * form.alpha * form.beta
    fixed = q.T @ (curve[:, None] * q) - y.T @ y
    coupling = cross[:, None] * q
    fixed[:n] -= coupling
    fixed[:, :n] -= coupling.T
    fixed.diagonal()[:n] += 2 * t
    count = max(n, y.shape[0]) + 24
    error = gamma(count)
    abs_q, abs_y = form.q.magnitude(), form.y.magnitude()
    slope = t * (form.alpha.abs() + form.beta.abs())
    bend = 2 * t * (form.alpha * form.beta).abs() * (1 + 2.0**-50)
    # Products below the normal range lose less than TINY each, before they are multiplied by an entry of Q or by t.
    lost = 4 * count * TINY * (1 + float(abs_q.max()) + float(t.sum())) if n else 4 * count * TINY

    def prove(rho: float) -> bool:
        matrix = fixed.clone()
        matrix.diagonal()[n:] += rho

        def radius(v: Tensor) -> Tensor:
            w = v[:n]
            mass = abs_q.T @ (bend * (abs_q @ v)) + abs_y.T @ (abs_y @ v) + abs_q.T @ (slope * w)
            mass[:n] += slope * (abs_q @ v) + 2 * t * w
            mass[n:] += rho * v[n:]
            out = error * mass
            if form.q.radius is not None:
                r = form.q.radius
                out += r.T @ (bend * (abs_q @ v)) + abs_q.T @ (bend * (r @ v)) + r.T @ (slope * w)
                out[:n] += slope * (r @ v)
            out += _square_radius(form.y, abs_y, v)
            return out * (1 + 8 * gamma(total + n + y.shape[0] + 24)) + lost * v.sum()

        return proves_positive_definite(matrix, radius)

    return prove


def feedback_form(network: Network) -> Form:
    """The feedback form of the network's nodes, every product enclosed.

    A value is a linear combination of the input (-1) and of activations' outputs (0, 1, ...); None stands for the
    identity. Affine nodes directly behind an input or an activation are exact; compositions carry a radius.
    """
    position = {node: k for k, node in enumerate(network.activations)}
    size = {-1: network.inputs} | {k: network.sizes[i] for k, i in enumerate(network.activations)}
    offset, n = {}, 0
    for k in range(len(position)):
        offset[k], n = n, n + size[k]
    offset[-1] = n
    columns = n + network.inputs
    combos: list[dict[int, Enclosed | None]] = []
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                combos.append({-1: None})
            case Affine():
                combos.append({s: _compose(node.operator, e) for s, e in combos[node.source].items()})
            case Activation():
                combos.append({position[i]: None})
            case Sum():
                combos.append(_add([combos[s] for s in node.sources], size, network.device))

    def place(rows: list[tuple[int, dict[int, Enclosed | None]]], height: int) -> Enclosed:
        center = torch.zeros(height, columns, dtype=torch.float64, device=network.device)
        radius: Tensor | None = None
        for start, combo in rows:
            for s, e in combo.items():
                block = _explicit(e, size[s], network.device)
                where = (slice(start, start + block.center.shape[0]), slice(offset[s], offset[s] + size[s]))
                center[where] = block.center
                if block.radius is not None:
                    radius = torch.zeros_like(center) if radius is None else radius
                    radius[where] = block.radius
        return Enclosed(center, radius)

    rows, alphas, betas = [], [], []
    for i, k in position.items():
        node = network.nodes[i]
        assert isinstance(node, Activation)
        rows.append((offset[k], combos[node.source]))
        alpha, beta = (s.to(network.device, torch.float64).expand(size[k]) for s in node.function.slopes)
        thin = (beta - alpha) < _THINNEST
        alphas.append(torch.where(thin, alpha - _THINNEST / 2, alpha))
        betas.append(torch.where(thin, beta + _THINNEST / 2, beta))
    empty = torch.zeros(0, dtype=torch.float64, device=network.device)
    return Form(
        place(rows, n), place([(0, combos[-1])], network.outputs), n, torch.cat([empty, *alphas]), torch.cat([empty, *betas])
    )


def _compose(operator: Operator, e: Enclosed | None) -> Enclosed:
    if e is None:
        return Enclosed(operator.dense())
    center = operator(e.center.T).T
    k = operator.shape[1] + 2
    magnitude = operator.abs()
    radius = gamma(k) * magnitude(e.center.abs().T).T
    if e.radius is not None:
        radius = radius + magnitude(e.radius.T).T
    return Enclosed(center, radius * (1 + 4 * gamma(k)))


def _explicit(e: Enclosed | None, size: int, device: torch.device) -> Enclosed:
    return Enclosed(torch.eye(size, dtype=torch.float64, device=device)) if e is None else e


def _add(parts: list[dict[int, Enclosed | None]], size: dict[int, int], device: torch.device) -> dict[int, Enclosed | None]:
    """Sum of linear combinations; where only one part has a source, its block is taken over unchanged."""
    result: dict[int, Enclosed | None] = {}
    for source in {s: None for part in parts for s in part}:
        blocks = [part[source] for part in parts if source in part]
        if len(blocks) == 1:
            result[source] = blocks[0]
            continue
        explicit = [_explicit(e, size[source], device) for e in blocks]
        center = torch.stack([e.center for e in explicit]).sum(0)
        error = gamma(len(explicit) + 2)
        radius = error * torch.stack([e.center.abs() for e in explicit]).sum(0)
        for e in explicit:
            if e.radius is not None:
                radius = radius + e.radius
        result[source] = Enclosed(center, radius * (1 + 4 * error))
    return result
