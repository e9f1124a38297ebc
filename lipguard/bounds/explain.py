"""`explain`: how much of a bound each layer is answerable for.

Unless the evidence is a product of norms, a layer's share is the logarithmic derivative of the squared bound along its weights,

    share_i = d log(bound^2) / d log(c_i)   at c_i = 1, where c_i scales the weights of layer i, biases aside:

the bound falls by about share_i / 2 percent where the weights shrink by one. In a chain of L layers with slope-restricted
neurons every global bound scales as the product of the c_i, so that each share is 2 and their sum 2 L; branches, and slopes
that depend on a domain, set the layers apart. Of a product of norms a layer's share is the logarithm of its norm.

Nothing here is a bound: shares are computed in floating point, and estimates say that they are.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipguard.bounds import bound
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Certificate, Factors, Multipliers, Query, Witness
from lipguard.errors import SolverFailed, UnsupportedQuery
from lipguard.network import Affine, Network
from lipguard.outward import show, show_upper
from lipguard.programs.feedback import feedback_of
from lipguard.registry import METHODS
from lipguard.rendering import table
from lipguard.verify import verify
from lipguard.verify.norms.factors import prove_norm

__all__ = ["Explanation", "Share", "explain"]

_INSIDE = 1e-6
"""Relative distance above the least rho at which multipliers are centred: shares are off by about as much."""

_GAP = 1e-3
"""Relative distance to the least rho up to which its dual variable speaks of the least one."""

_LARGEST = 1500
"""Order of the matrix inequality up to which its dual is computed: some seconds."""

_TURNS, _CENTRED = 300, 1e-6
"""Newton steps at most, and the decrement at which they end."""

_STEP, _SMALL_STEP = 1e-3, 1e-5
"""Relative changes of weights for differences: of bounds that are solved to 1e-7, and of values at a point."""


@dataclass(frozen=True)
class Share:
    """One layer: its name, its share, and a verified bound of its norm (in the input norm)."""

    layer: str
    share: float
    norm: float


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Every layer's share of a bound.

    Attributes:
        rows: the layers in the order of the network; after a product of norms also what is left beside the layers.
        total: the sum of the shares.
        unit: what a share is.
        how: how the shares were found; begins with "estimate" where differences of bounds were taken.
        value, side: of the bound.
    """

    rows: tuple[Share, ...]
    total: float
    unit: str
    how: str
    value: float
    side: str

    def _cells(self) -> list[tuple[str, str, str, str]]:
        whole = sum(abs(row.share) for row in self.rows) or 1.0
        return [
            (row.layer, f"{row.share:.4g}", f"{row.share / whole:.1%}", "" if math.isnan(row.norm) else show_upper(row.norm, 5))
            for row in self.rows
        ]

    def _title(self) -> str:
        return f"{self.side} bound {show(self.value, 'lower' if self.side == 'lower' else 'upper')}"  # type: ignore[arg-type]

    def __repr__(self) -> str:
        cells = [("layer", "share", "", "norm"), *self._cells(), ("sum", f"{self.total:.4g}", "", "")]
        widths = [max(len(row[k]) for row in cells) for k in range(4)]
        lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([f"{self._title()}; share: {self.unit} ({self.how})", *lines])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [*self._cells(), ("sum", f"{self.total:.4g}", "", "")]
        return table(f"{self._title()}: {self.unit} ({self.how})", rows, ("layer", "share", "", "norm"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = dataclasses.asdict(self)
        rows = [row | {"norm": None if math.isnan(row["norm"]) else row["norm"]} for row in plain["rows"]]
        return plain | {"rows": rows}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The shares as a flame graph: modules below, the layers inside them above, as wide as their shares.

        Args:
            path: file to write, its ending says the format; None writes none.
        Returns:
            The matplotlib figure.
        Raises:
            UnsupportedQuery: matplotlib is not installed.
        """
        from lipguard.bounds.flame import flame

        return flame(self, path)


def explain(certificate: Certificate, network: Network | None = None) -> Explanation:
    """Each layer's share of a bound.

    Args:
        certificate: from `lipguard.bound`, `lipguard.exact(...).upper_certificate`, `lipguard.load` or a Tracker.
        network: the network it is of; None takes the one it was proved for, which a certificate keeps in this process.
    Raises:
        UnsupportedQuery: the network is needed or is another one, or the bound is 0.
    """
    network = certificate.network if network is None else network  # type: ignore[assignment]
    if not isinstance(network, Network):
        remedy = "certificate.explain(lipguard.capture(model, example))"
        raise UnsupportedQuery(f"the network of this certificate is not at hand. Give it: {remedy}.")
    if network.digest != certificate.digest:
        raise UnsupportedQuery(f"the certificate is of network {certificate.digest[:12]}, this one is {network.digest[:12]}.")
    if not 0 < certificate.value < math.inf:
        raise UnsupportedQuery(f"a bound of {certificate.value!r} has no shares.")
    layers = [i for i, node in enumerate(network.nodes) if node.map is not None and not node.weightless]
    norms = _norms(network, layers, certificate)
    unit, how = "d log(bound^2) / d log(weights)", "from the multipliers"
    rest: tuple[Share, ...] = ()
    if isinstance(certificate.evidence, Factors):
        unit, how = "log(norm)", "from the factors"
        shares = [math.log(norm) if norm > 0 else -math.inf for norm in norms]
        left = math.log(certificate.value) - sum(shares)
        rest = (Share("(activations, sums, other norms)", left, math.nan),) if abs(left) > 1e-9 else ()
    else:
        found = None
        if isinstance(certificate.evidence, Multipliers) and certificate.method == "lipsdp-neuron":
            found = _from_multipliers(network, certificate.evidence, certificate.value**2, layers)
        shares, how = (found, how) if found is not None else _by_differences(network, certificate, layers)
    names = [network.nodes[i].name or f"node {i}" for i in layers]
    rows = (*map(Share, names, shares, norms), *rest)
    return Explanation(rows, sum(row.share for row in rows), unit, how, certificate.value, certificate.side)


def _norms(network: Network, layers: Iterable[int], certificate: Certificate) -> list[float]:
    p = certificate.norm[0]
    evidence = certificate.evidence
    if not isinstance(evidence, Factors):
        evidence = Spectral()(network, Query(certificate.norm))[0].evidence
    assert isinstance(evidence, Factors)
    toeplitz = evidence.derivation == "toeplitz"
    named = ((i, network.nodes[i].map, network.nodes[i].name) for i in layers)
    return [prove_norm(operator, evidence.norms[i], p, name, toeplitz) for i, operator, name in named if operator is not None]


def scaled(network: Network, i: int, factor: float) -> Network:
    """The network with the weights of layer i times a factor; its bias stays."""
    node = network.nodes[i]
    assert isinstance(node, Affine)
    rows = torch.full((node.operator.shape[0],), factor, dtype=torch.float64, device=network.device)
    operator = node.operator.scaled(rows)
    if operator is None:
        raise UnsupportedQuery(f"{node.name or f'node {i}'}: its weights cannot be scaled.")
    return Network((*network.nodes[:i], dataclasses.replace(node, operator=operator), *network.nodes[i + 1 :]))


def _differences(network: Network, layers: list[int], step: float, value: Callable[[Network], float]) -> list[float]:
    """Of log(value^2), central, for each layer."""
    shares = []
    for i in layers:
        above, below = (value(scaled(network, i, factor)) for factor in (1 + step, 1 - step))
        shares.append(2 * math.log(above / below) / math.log((1 + step) / (1 - step)))
    return shares


def _by_differences(network: Network, certificate: Certificate, layers: list[int]) -> tuple[list[float], str]:
    if isinstance(certificate.evidence, Witness):
        # The witness is held: the value is that of the same point and direction in the changed network.
        return (
            _differences(
                network, layers, _SMALL_STEP, lambda one: verify(one, dataclasses.replace(certificate, digest=one.digest)).value
            ),
            "estimate: differences at the witness",
        )
    method = certificate.method if certificate.method in METHODS else None

    def again(one: Network) -> float:
        return bound(one, method=method, norm=certificate.norm, domain=certificate.domain).value

    own = method or f"lipguard.bound in place of {certificate.method}"
    return _differences(network, layers, _STEP, again), f"estimate: differences of bounds by {own}"


def _from_multipliers(network: Network, evidence: Multipliers, rho: float, layers: list[int]) -> list[float] | None:
    """Shares by the envelope theorem; None where the dual is out of reach.

    That is where the inequality is too large, neurons are tied or respond to themselves, or rho is not the least one.

    Let Z(rho, t; W) >= 0 be the inequality and X >= 0 its dual variable at the least rho: <X, dZ/dt_j> <= 0 with equality
    where t_j > 0, and <X, dZ/drho> = 1. Then d rho = -<X, dZ/dW dW>: how the multipliers follow does not enter. X is
    Z^{-1} up to a factor at multipliers that maximise log det Z + sum log t a little above the least rho.
    """
    form = feedback_of(network)
    n, d = sum(form.sizes), form.inputs
    if form.groups is not None or form.scaling or not n or n + d > _LARGEST or evidence.t.numel() != n:
        return None
    rho *= 1 + _INSIDE
    alpha, beta = form.alpha[:, None], form.beta[:, None]

    def factors(one: Network) -> tuple[Tensor, Tensor, Tensor]:
        """u_j and v_j as rows, and the output's matrix: Z = rho E_x + U'TV + V'TU - Y'Y."""
        a, b, c, d_ = feedback_of(one).dense()
        q, unit = torch.cat([b, a], 1), torch.eye(n, n + d, dtype=torch.float64, device=b.device)
        return unit - alpha * q, unit - beta * q, torch.cat([c, d_], 1)

    def matrix(parts: tuple[Tensor, Tensor, Tensor], t: Tensor) -> Tensor:
        u, v, y = parts
        z = u.mT @ (t[:, None] * v)
        z = z + z.mT - y.mT @ y
        z.diagonal()[n:] += rho
        return z

    here = factors(network)
    try:
        t, inverse = _centred(lambda t: matrix(here, t), here[0], here[1], evidence.t.to(here[0]))
    except (SolverFailed, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
        return None
    dual = inverse / inverse.diagonal()[n:].sum()
    # On the central path rho is above the least one by at most (order of Z + n) / tr(E_x Z^{-1}).
    if (2 * n + d) / float(inverse.diagonal()[n:].sum()) > _GAP * rho:
        return None
    shares = []
    for i in layers:
        # Z is a polynomial in the factor, of degree 2 where a layer stands once on each path: the difference is its derivative.
        above, below = (matrix(factors(scaled(network, i, f)), t) for f in (1 + _STEP, 1 - _STEP))
        shares.append(-float((dual * (above - below)).sum()) / (2 * _STEP) / rho)
    return shares


def _centred(matrix: Callable[[Tensor], Tensor], u: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers that maximise log det Z(t) + sum log t, by damped Newton steps, and the inverse of Z there.

    Raises:
        SolverFailed: Z is not positive definite at the first t, or the iteration does not end.
    """
    t = t.clamp_min(1e-9 * float(t.max().clamp_min(1e-300)))
    for _ in range(_TURNS):
        factor, failed = torch.linalg.cholesky_ex(matrix(t))
        if int(failed):
            raise SolverFailed("the multipliers are not inside the cone.")
        inverse = torch.cholesky_inverse(factor)
        # With A_j = u_j v_j' + v_j u_j':  tr(S A_j) = 2 v_j' S u_j,  tr(S A_j S A_k) = 2 (v_j'Su_k v_k'Su_j + v_j'Sv_k u_j'Su_k).
        su, sv = u @ inverse, v @ inverse
        mixed = sv @ u.mT
        gradient = 2 * mixed.diagonal() + 1 / t
        curvature = 2 * (mixed * mixed.mT + (sv @ v.mT) * (su @ u.mT))
        # Scaled by t the system is about the unit matrix where the barrier of t rules.
        system = t[:, None] * curvature * t + torch.eye(len(t), dtype=t.dtype, device=t.device)
        step = torch.cholesky_solve((t * gradient)[:, None], torch.linalg.cholesky(system))[:, 0]
        decrement = math.sqrt(max(float(step @ (t * gradient)), 0.0))
        if decrement < _CENTRED:
            return t, inverse
        # Inside Dikin's ellipsoid every step stays feasible: t (1 + step / (1 + decrement)) > 0 and Z > 0.
        t = t * (1 + step / (1 + decrement))
    raise SolverFailed("centring the multipliers did not end.")
