"""Check of `Multipliers`: the LipSDP matrix, rebuilt with rounding radii, is positive semidefinite.

With q_j the rows of Q = [B A] (pre-activations in terms of neurons w and inputs x) and e_j the unit vectors of w,

    Z(rho, t) = rho E_x + sum_j t_j [(e_j - alpha_j q_j)(e_j - beta_j q_j)' + transpose] - [C D]'[C D].

If Z >= 0 then ||f(x) - f(y)||_2 <= sqrt(rho) ||x - y||_2 (Fazlyab et al. 2019, arXiv:1906.04893, Theorem 2).
Where all alpha are 0 and D is 0, the input block is rho I and is eliminated exactly:

    R(rho, t) = 2T - TB - B'T - C'C - (TA)(TA)' / rho >= 0.

Implicit layers fill diagonal blocks of B. What is proved is Z > 0 strictly (Rump's shift exceeds its error bound), and that
makes every implicit layer well posed, from the last to the first: let all later layers have unique responses, and suppose
w_k = D W w_k != 0 for slopes D. With x = 0, earlier neurons at 0 and later ones responding by any slopes of theirs, every
(w - alpha p)(beta p - w) is >= 0, so that (w, x)'Z(w, x) <= -||y||^2 <= 0: a contradiction. So I - D W is invertible for
all slopes D, and z exists and is unique (`lipguard.network.implicit`). Where R > 0, Z > 0 as well, for rho > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipguard.certificate import Multipliers
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.rounding import TINY, UNIT, gamma, proves_positive_definite, sqrt_up, up
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.elimination import blocks, flops, prove_rho
from lipguard.verify.lmi.form import Block, Form, feedback_form
from lipguard.verify.norms.matrix_norm import frobenius_bound
from lipguard.verify.rewriting import tie, with_tied_neurons

_CLOSE, _WIDEST = 1e-6, 1.1
"""A proved rho within _CLOSE of the proposed one ends the search for a better proof; up to _WIDEST times it is accepted."""

_LARGEST_DENSE = 30_000
"""Order up to which one dense matrix is formed (7 GB)."""

_OVERHEAD = 1e7
"""What handling a front costs beside its arithmetic, in floating-point operations."""


def check_multipliers(network: Network, evidence: Multipliers, norm: tuple[float, float]) -> float:
    """The smallest provable bound sqrt(rho) at or just above the proposed one.

    Negative and non-finite multipliers are set to zero first, and those of tied neurons to their group's mean.

    Raises:
        NotCertified: the norm is not (2, 2), the number of multipliers is not the number of neurons, or no rho within
            10 % of the proposal is provable.
    """
    if norm != (2.0, 2.0):
        raise NotCertified(f"multipliers prove bounds from 2-norm to 2-norm, not {norm}.")
    given, network = network, with_tied_neurons(network)
    form = feedback_form(network, precise=network is not given)
    t = evidence.t.detach().to(network.device, torch.float64).flatten()
    if t.numel() != form.neurons:
        raise NotCertified(f"{t.numel()} multipliers are given for {form.neurons} neurons.")
    t = tie(network, torch.where(t.isfinite(), t, torch.zeros_like(t)).clamp_min(0))
    least = math.inf
    for way in _ways(form, t, evidence.rho):
        try:
            least = min(least, way())
        except NotCertified:
            continue
        if least <= evidence.rho * (1 + _CLOSE):
            break
    if not least <= up(evidence.rho * _WIDEST):
        raise NotCertified(
            f"the LMI is not provably positive semidefinite at rho = {evidence.rho:.6g}, nor at a rho 10 % larger."
        )
    return sqrt_up(least)


def _ways(form: Form, t: Tensor, rho: float) -> list[Callable[[], float]]:
    """Proofs of a rho for these multipliers, the cheapest first: by one dense matrix, or by fronts from either end."""
    order = form.neurons + (form.inputs if bool(form.alpha.any()) else 0)
    ways: list[tuple[float, Callable[[], float]]] = []
    if order <= _LARGEST_DENSE:
        ways.append((order**3 / 3, lambda: _dense_rho(form, t, rho)))
    # An implicit layer is proved in one matrix with all others: the fronts know no layer that responds to itself.
    if form.neurons and not any(block.rows == block.columns for block in form.q_blocks):
        backwards = blocks(form)
        forwards = backwards.transposed()
        # The multipliers of J' are rho / (t (beta - alpha)^2) where both inequalities hold; any positive ones may be tried.
        mirrored = (rho / (t * (form.beta - form.alpha) ** 2)).nan_to_num(0.0, 0.0)
        # Of two orders the one that ends at fewer coordinates is the one in which the multipliers were found.
        late = backwards.outputs < backwards.sizes[-1]
        for b, multipliers, second in ((backwards, t, late), (forwards, mirrored, not late)):
            cost = flops(b) + _OVERHEAD * len(b.places)
            ways.append((cost * (1 + second), lambda b=b, m=multipliers: prove_rho(form, b, m)))
    return [way for _, way in sorted(ways, key=lambda pair: pair[0])]


def _dense_rho(form: Form, t: Tensor, proposed: float) -> float:
    prove = prover(form, t)
    # The test needs the smallest eigenvalue above about n^2 u; a rho closer than that to the least one cannot be proved.
    inflation = 32 * max(form.neurons, 1) ** 2 * UNIT
    while inflation < 0.1:
        rho = up(proposed * (1 + inflation))
        if rho > 0 and prove(rho):
            return rho
        inflation *= 8
    raise NotCertified("the LMI is not provably positive semidefinite.")


def prover(form: Form, t: Tensor) -> Callable[[float], bool]:
    """The test rho -> whether Z(rho, t) >= 0 is proved; what does not depend on rho is computed once."""
    n = form.neurons
    if n == 0:
        bound = frobenius_bound(form.y.magnitude())
        return lambda rho: rho >= up(bound * bound) or _linear(form, rho)
    direct = any(columns.start >= n and bool(matrix.magnitude().any()) for _, columns, matrix in form.y_blocks)
    eliminates = not direct and not bool(form.alpha.any())
    return _reduced(form, t) if eliminates else _full(form, t)


def _linear(form: Form, rho: float) -> bool:
    """rho I - D'D >= 0, for a network without neurons."""
    none = torch.zeros(0, dtype=torch.float64, device=form.alpha.device)
    return _full(form, none)(rho)


def _reduced(form: Form, t: Tensor) -> Callable[[float], bool]:
    """R(rho, t) >= 0 for slopes [0, beta].

    beta != 1: w = beta * w' with w' of slope [0, 1] gives, with e_j - alpha_j q_j = e_j,
    2T - T diag(beta) B - B' diag(beta) T - C'C - (T diag(beta) A)(...)'/ rho.
    """
    n = form.neurons
    b = [block for block in form.q_blocks if block.columns.start < n]
    c = [block for block in form.y_blocks if block.columns.start < n]
    span, a = _input_rows(form)
    tb = t * form.beta
    ta = tb[span]
    fixed = torch.zeros(n, n, dtype=torch.float64, device=t.device)
    for rows, columns, matrix in b:
        coupling = tb[rows, None] * matrix.center
        fixed[rows, columns] -= coupling
        fixed[columns, rows] -= coupling.T
    for _, i, left in c:
        for _, j, right in c:
            fixed[i, j] -= left.center.T @ right.center
    fixed.diagonal().add_(2 * t)
    kept = fixed[span, span].clone()
    gram = a.center @ a.center.T
    # Cauchy-Schwarz: sum_k |a_ik| |a_jk| <= ||a_i|| ||a_j||, with ||a_i||^2 on the diagonal of A A'.
    norm_a, norm_c = _row_norms(a, gram.diagonal()), torch.zeros_like(t)
    for _, columns, matrix in c:
        norm_c[columns] = _row_norms(Enclosed(matrix.center.T, None if matrix.radius is None else matrix.radius.T))
    abs_a = None if a.radius is None else a.magnitude()
    abs_b, radius_b = _magnitudes(b), _radii(b)
    abs_c, radius_c = (_magnitudes(c), _radii(c)) if _radii(c) else ([], [])
    gram.mul_(ta[:, None]).mul_(ta)
    # Every entry of R is a sum of at most six terms, each with at most max(d, m) + 6 roundings.
    count = max(form.inputs, form.outputs) + 16
    error = gamma(count)
    top = 1 + float(t.sum()) + float(tb.sum())

    def prove(rho: float) -> bool:
        fixed[span, span] = torch.sub(kept, gram, alpha=1 / rho)

        def radius(v: Tensor) -> Tensor:
            va, vb = ta * v[span], tb * v
            mass = 2 * t * v + tb * _apply(abs_b, v, n) + _apply_transposed(abs_b, vb, n) + norm_c * (norm_c @ v)
            mass[span] += ta * norm_a * (norm_a @ va) / rho
            total = error * mass + tb * _apply(radius_b, v, n) + _apply_transposed(radius_b, vb, n)
            m = form.outputs
            total += _apply_transposed(radius_c, _apply(abs_c, v, m), n) + _apply_transposed(abs_c, _apply(radius_c, v, m), n)
            if a.radius is not None and abs_a is not None:
                total[span] += ta * _square_radius(Enclosed(a.center.T, a.radius.T), abs_a.T, va) / rho
            # Products below the normal range lose less than TINY each, before they are multiplied by t, t^2 / rho or 1 / rho.
            lost = count * TINY * (top + top * top / rho)
            return total * (1 + 8 * gamma(v.numel() + count)) + lost * v.sum()

        return proves_positive_definite(fixed, radius)

    return prove


def _input_rows(form: Form) -> tuple[slice, Enclosed]:
    """The rows of A from the first to the last that sees the input; commonly one layer's, which is not copied."""
    seeing = [block for block in form.q_blocks if block.columns.start >= form.neurons]
    if len(seeing) == 1:
        return seeing[0].rows, seeing[0].matrix
    span = slice(min((block.rows.start for block in seeing), default=0), max((block.rows.stop for block in seeing), default=0))
    n, radius = form.neurons, form.q.radius
    return span, Enclosed(form.q.center[span, n:], None if radius is None else radius[span, n:])


Placed = list[tuple[slice, slice, Tensor]]


def _magnitudes(blocks: list[Block]) -> Placed:
    return [(rows, columns, matrix.magnitude()) for rows, columns, matrix in blocks]


def _radii(blocks: list[Block]) -> Placed:
    return [(rows, columns, matrix.radius) for rows, columns, matrix in blocks if matrix.radius is not None]


def _apply(blocks: Placed, v: Tensor, size: int) -> Tensor:
    out = v.new_zeros(size)
    for rows, columns, matrix in blocks:
        out[rows] += matrix @ v[columns]
    return out


def _apply_transposed(blocks: Placed, v: Tensor, size: int) -> Tensor:
    return _apply([(columns, rows, matrix.T) for rows, columns, matrix in blocks], v, size)


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
