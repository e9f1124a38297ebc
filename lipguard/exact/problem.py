"""What every exact method works on and keeps: the network's pieces, the best region so far, the enclosure at the end."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field

import torch

from lipguard.bounds import bound
from lipguard.certificate import Certificate, Enclosure, Query, SolverReport, Status, Witness
from lipguard.errors import InvalidDomain, NotCertified, SolverUnavailable, UnsupportedQuery
from lipguard.exact.operator_norm import operator_norm, supported
from lipguard.exact.piecewise import Matrix, Pattern, PiecewiseForm, piecewise_form
from lipguard.exact.regions import RADIUS, DomainForm, Interior, cell, domain_form, interior
from lipguard.network import Network
from lipguard.verify import verify

_LOGGER = logging.getLogger("lipguard.exact")


@dataclass(frozen=True, eq=False)
class Incumbent:
    """The best region found: its Jacobian's norm, a point inside it and the direction that attains the norm."""

    value: float
    pattern: Pattern
    point: Matrix
    direction: Matrix


@dataclass(eq=False)
class Problem:
    """A query about one network, with the incumbent of the search.

    Attributes:
        network, query: what was asked.
        form, domain: the same as data of linear programs.
        started, deadline: `time.monotonic()` at the start, and when to stop or None.
        incumbent: the best region with an interior so far.
        notes: what was chosen or fallen back to, and why.
    """

    network: Network
    query: Query
    form: PiecewiseForm
    domain: DomainForm
    started: float
    deadline: float | None
    incumbent: Incumbent | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def lower(self) -> float:
        """The incumbent's value, 0 without one."""
        return self.incumbent.value if self.incumbent else 0.0

    @property
    def expired(self) -> bool:
        """Whether the time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def remaining(self) -> float | None:
        """Seconds left, or None without a limit."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    def norm(self, pattern: Pattern) -> tuple[float, Matrix]:
        """Norm of the Jacobian of a pattern and the direction that attains it."""
        return operator_norm(self.form.jacobian(pattern), self.query.norm)

    def consider(self, pattern: Pattern) -> Interior:
        """Make the region of the pattern the incumbent, if it has an interior and a larger norm than the present one."""
        found = interior(self.domain, cell(self.form, pattern))
        if found.radius > RADIUS:
            value, direction = self.norm(pattern)
            if self.incumbent is None or value > self.incumbent.value:
                self.incumbent = Incumbent(value, pattern.copy(), found.point, direction)
        return found

    def sample(self, count: int = 256, seed: int = 0) -> None:
        """Try the regions of random points of the domain, those of largest norm first until one has an interior."""
        generator = torch.Generator().manual_seed(seed)
        d = self.form.inputs
        if self.query.domain is None:
            # Pre-activations change sign at distances of the order of |b| / |A|; directions far out matter as well.
            spread = 10.0 ** (4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 2)
            points = spread * torch.randn(count, d, generator=generator, dtype=torch.float64)
        else:
            points = self.query.domain.sample(count, d, generator)
        patterns = {tuple(pattern): pattern for pattern in (self.form.pattern_at(x) for x in points.numpy())}
        ranked = sorted(patterns.values(), key=lambda pattern: -self.norm(pattern)[0])
        for pattern in ranked:
            if self.consider(pattern).radius > RADIUS or self.expired:
                return

    def improve(self, tries: int = 64, seconds: float = 10.0) -> None:
        """Climb from the incumbent: change the piece of one neuron at a time, as long as the norm grows.

        Args:
            tries: linear programs a step; the changes with the largest norms are tried first.
            seconds: limit of the climb; a quarter of what remains, if that is less.
        """
        limit = time.monotonic() + min(seconds, math.inf if self.remaining is None else self.remaining / 4)
        while self.incumbent is not None:
            base, best = self.incumbent.pattern, self.incumbent.value
            ranked = []
            for i, neuron in enumerate(self.form.neurons):
                for piece in {int(base[i]) - 1, int(base[i]) + 1} & set(range(len(neuron.slopes))):
                    other = base.copy()
                    other[i] = piece
                    ranked.append((self.norm(other)[0], other))
                if time.monotonic() > limit:
                    return
            ranked = sorted((pair for pair in ranked if pair[0] > best * (1 + 1e-9)), key=lambda pair: -pair[0])
            for _, other in ranked[:tries]:
                if time.monotonic() > limit or self.consider(other).radius > RADIUS:
                    break
            if time.monotonic() > limit or self.incumbent.value <= best:
                return

    def restart(self, seed: int, count: int = 64, seconds: float = 1.0) -> None:
        """Climb from other random points than before, and keep the better incumbent."""
        best, self.incumbent = self.incumbent, None
        try:
            self.sample(count, seed)
            self.improve(seconds=seconds)
        finally:
            if best is not None and best.value >= self.lower:
                self.incumbent = best

    def lower_certificate(self, method: str) -> Certificate:
        """The incumbent as a certificate whose value the checker computed.

        Raises:
            InvalidDomain: no linear region has a point inside this domain where the network is differentiable.
        """
        best = self.incumbent
        if best is None:
            raise InvalidDomain(
                "no point of the domain was found where the network is differentiable: the domain has no interior and "
                "lies on a kink. Enlarge it."
            )
        evidence = Witness(torch.from_numpy(best.point), torch.from_numpy(best.direction))
        certificate = Certificate(best.value, "lower", self.query.norm, self.query.domain, self.network.digest, method, evidence)
        seconds = time.monotonic() - self.started
        return _timed(verify(self.network, certificate), seconds)

    def upper_certificate(self) -> Certificate | None:
        """The best verified upper bound that needs no search (LipSDP for norm 2), or None where there is none."""
        limit = None if self.remaining is None else max(self.remaining / 4, 1.0)
        try:
            return bound(self.network, norm=self.query.norm, domain=self.query.domain, time_limit=limit)
        except (UnsupportedQuery, NotCertified, SolverUnavailable) as error:
            _LOGGER.info("no bound before the search: %s", error)
            return None

    def claim(self, value: float, method: str, solver: str, message: str) -> Certificate:
        """An upper bound that rests on a solver's word: approximate."""
        seconds = time.monotonic() - self.started
        report = SolverReport(solver, message)
        return Certificate(
            value, "upper", self.query.norm, self.query.domain, self.network.digest, method, report, "approximate", seconds
        )

    def enclosure(
        self,
        upper: Certificate,
        status: Status,
        method: str,
        *,
        solver: str = "",
        closed_region: float | None = None,
        details: dict[str, float | int | str] | None = None,
    ) -> Enclosure:
        """The result: the incumbent below, `upper` above."""
        lower = self.lower_certificate(method)
        witness = self.incumbent.point if self.incumbent else None
        return Enclosure(
            lower,
            upper,
            status,
            method,
            time.monotonic() - self.started,
            solver,
            None if witness is None else torch.from_numpy(witness),
            closed_region,
            " ".join(self.notes),
            details or {},
        )


def _timed(certificate: Certificate, seconds: float) -> Certificate:
    return dataclasses.replace(certificate, seconds=seconds)


def problem(network: Network, query: Query, time_limit: float | None = None) -> Problem:
    """The problem of a query, its input checked.

    Raises:
        UnsupportedQuery: an activation that is not piecewise linear, or a norm that cannot be computed.
        InvalidDomain: empty, reversed or of another dimension.
    """
    started = time.monotonic()
    domain = domain_form(query.domain, network.inputs)
    form = piecewise_form(network)
    supported(query.norm, form.outputs, form.inputs)
    return Problem(network, query, form, domain, started, None if time_limit is None else started + time_limit)
