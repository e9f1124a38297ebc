"""Check of `Multipliers`: the LipSDP matrix, rebuilt with rounding radii, is positive semidefinite.

With q_j the rows of Q = [B A] (pre-activations in terms of neurons w and inputs x) and e_j the unit vectors of w,

    Z(rho, t) = rho E_x + sum_j t_j [(e_j - alpha_j q_j)(e_j - beta_j q_j)' + transpose] - [C D]'[C D].

If Z >= 0 then ||f(x) - f(y)||_2 <= sqrt(rho) ||x - y||_2 (Fazlyab et al. 2019, arXiv:1906.04893, Theorem 2).

Implicit layers fill diagonal blocks of B. What is proved is Z > 0 strictly (Rump's shift exceeds its error bound), and that
makes every implicit layer well posed, from the last to the first: let all later layers have unique responses, and suppose
w_k = D W w_k != 0 for slopes D. With x = 0, earlier neurons at 0 and later ones responding by any slopes of theirs, every
(w - alpha p)(beta p - w) is >= 0, so that (w, x)'Z(w, x) <= -||y||^2 <= 0: a contradiction. So I - D W is invertible for
all slopes D, and z exists and is unique (`lipguard.network.implicit`). Where a Schur
complement (`batched`) is positive definite, Z is as well, for rho > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipguard.certificate import Multipliers
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.rounding import UNIT, sqrt_up, up
from lipguard.verify.lmi.batched import Inequality
from lipguard.verify.lmi.elimination import by_layers, flops
from lipguard.verify.lmi.form import Form, feedback_form
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
    if form.neurons and not any(rows == columns for rows, columns, _ in form.blocks if rows.stop <= form.neurons):
        # The multipliers of J' are rho / (t (beta - alpha)^2) where both inequalities hold; any positive ones may be tried.
        mirrored = (rho / (t * (form.beta - form.alpha) ** 2)).nan_to_num(0.0, 0.0)
        # Of two orders the one that ends at fewer coordinates is the one in which the multipliers were found.
        late = form.outputs < form.inputs
        for way, multipliers, second in ((form, t, late), (form.transposed(), mirrored, not late)):
            cost = flops(way) + _OVERHEAD * len(form.layers)
            ways.append((cost * (1 + second), lambda way=way, m=multipliers: by_layers(way, m).least_rho()))
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
    inequality = Inequality(form, t[None])
    # Without neurons the Frobenius norm is a bound as well, where rounding leaves no room for a proof.
    enough = math.inf if form.neurons else up(frobenius_bound(form.y.magnitude()) ** 2)
    return lambda rho: rho >= enough or bool(inequality.proves(t.new_tensor([rho])))
