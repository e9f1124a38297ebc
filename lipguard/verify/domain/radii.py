"""Check of `Radius`: all inputs of a ball around a sample have one class, many samples of one network at a time.

Sample x of class y keeps its class on the ball of radius r where f_y - f_j > 0 for every other class j. That is so if
f_y(x) - f_j(x) > L r for a constant L of f_y - f_j, on R^d (Tsuzuku et al. 2018, arXiv:1802.04034) or on the ball and the
box alone, which are convex and hold x; or if linear propagation bounds the difference from below by a positive number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lipguard.certificate import Box, RadiusCertificate
from lipguard.errors import InvalidDomain, NotCertified
from lipguard.network import Network
from lipguard.rounding import FLUSHED, UNIT, flushes_denormals
from lipguard.verify.domain.jacobians import jacobian_magnitude, magnitude_norms
from lipguard.verify.domain.local import of_neurons
from lipguard.verify.domain.localized import Localized, chunk_size, localized, proves
from lipguard.verify.domain.pairs import check_pairs, rows_of
from lipguard.verify.domain.ranges import Propagation, Regions, propagate

_INSIDE = 1 - 2.0**-40
"""Factor that outweighs the few roundings of a quotient and of a square, each of 2^-53, and keeps a strict inequality strict."""


@dataclass(frozen=True, eq=False)
class Samples:
    """K inputs with their classes.

    Attributes:
        network: without coupled nodes.
        x, y: inputs in the box, (K, d) float64, and classes, (K,).
        box: every input that can occur.
        others: the classes other than y in their order, (K, m - 1).
        rows: e_y - e_j for each of them, (K, m - 1, m).
        margins: lower bounds of f_y(x) - f_j(x), rounding included, (K, m - 1).
        spread: bounds of how far above `margins` the differences can be, (K, m - 1).
    """

    network: Network
    x: Tensor
    y: Tensor
    box: Box | None
    others: Tensor
    rows: Tensor
    margins: Tensor
    spread: Tensor

    @staticmethod
    def of(network: Network, x: Tensor, y: Tensor, box: Box | None) -> Samples:
        """The samples' margins, proved by linear propagation of the points themselves."""
        others = other_classes(y, network.outputs)
        pairs = torch.stack([y[:, None].expand_as(others), others], 2)
        rows = rows_of(pairs.reshape(-1, 2), network).reshape(len(y), network.outputs - 1, network.outputs)
        at = propagate(network, Regions.around(x, torch.zeros_like(x[:, 0]), box))
        below, above = at.largest(len(network.nodes) - 1, torch.cat([-rows, rows], 1)).chunk(2, 1)
        return Samples(network, x, y, box, others, rows, -below, above + below)

    def pick(self, which: Tensor) -> Samples:
        """The chosen samples."""
        x, y, *more = (v[which] for v in (self.x, self.y, self.others, self.rows, self.margins, self.spread))
        return Samples(self.network, x, y, self.box, *more)


@dataclass(eq=False)
class Balls:
    """A ball around each of K samples, and what is proved there.

    Attributes:
        samples: their centres.
        radius: (K,), not negative.
        proved: whether f_y - f_j > 0 is proved on the ball for each other class j, (K, m - 1); the methods add to it.
    """

    samples: Samples
    radius: Tensor
    proved: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is proved yet."""
        self.proved = torch.zeros_like(self.samples.margins, dtype=torch.bool)

    @cached_property
    def propagation(self) -> Propagation:
        """Ranges of all values on the balls, within the box."""
        return propagate(self.samples.network, Regions.around(self.samples.x, self.radius, self.samples.box))

    @cached_property
    def maps(self) -> Localized:
        """The network's maps with the slopes on each ball."""
        return localized(self.samples.network, self.propagation)

    @cached_property
    def needed(self) -> Tensor:
        """A constant of f_y - f_j up to which the difference is proved positive, (K, m - 1): a little below margin / radius."""
        return self.samples.margins / self.radius[:, None] * _INSIDE

    @cached_property
    def slopes(self) -> Tensor:
        """Constants of the differences on the balls by slope intervals alone, (K, m - 1)."""
        k, pairs = self.proved.shape
        magnitude = jacobian_magnitude(self.propagation, self.samples.rows)
        return magnitude_norms(magnitude.reshape(k * pairs, 1, -1), (2.0, 2.0)).reshape(k, pairs)

    def by_constants(self, constants: Tensor) -> None:
        """Constants of the differences on R^d, (K, m - 1); inf or nan where none is known."""
        # The product rounds once.
        self.proved |= self.radius[:, None] * constants * (1 + 4 * UNIT) < self.samples.margins

    def by_themselves(self) -> None:
        """By slopes on the balls, and by linear propagation."""
        self.proved |= self.slopes < self.needed
        self.proved |= self.propagation.largest(len(self.samples.network.nodes) - 1, -self.samples.rows) < 0

    def local_maps(self, which: Tensor) -> Localized:
        """The maps of the chosen differences (P, 2), pairs of a sample's and a difference's number."""
        sample, pair = which.unbind(1)
        return self.maps.pick(sample).functionals(self.samples.rows[sample, pair][:, None])

    def by_multipliers(self, which: Tensor, maps: Localized, t: Tensor, reserve: float = 0.0) -> Tensor:
        """By multipliers of the chosen differences; returns which of them are proved, (P,).

        Args:
            which: (P, 2), pairs of a sample's and a difference's number.
            maps: `local_maps` of them.
            t: (P, f), multipliers in the order of the maps' places.
            reserve: prove a constant smaller by this share than the margin asks for.
        """
        sample, pair = which.unbind(1)
        needed = self.needed[sample, pair]
        good = proves(maps, t, (needed * (1 - reserve)).square() * _INSIDE) & (needed > 0)
        self.proved[sample, pair] |= good
        return good


def verify_radii(network: Network, certificates: Sequence[RadiusCertificate]) -> list[RadiusCertificate | None]:
    """Each certificate as verified; None where its evidence proves nothing.

    Raises:
        NotCertified: a certificate is of another network, or no statement about this one.
    """
    return [None if reason else replace(c, rigor="verified") for c, reason in _reasons(network, certificates)]


def verify_radius(network: Network, certificate: RadiusCertificate) -> RadiusCertificate:
    """The certificate as verified: every input of its ball and box has its class, in real arithmetic.

    Raises:
        NotCertified: it is of another network, or its evidence does not prove it.
    """
    [(_, reason)] = _reasons(network, [certificate])
    if reason:
        raise NotCertified(reason)
    return replace(certificate, rigor="verified")


def _reasons(network: Network, certificates: Sequence[RadiusCertificate]) -> list[tuple[RadiusCertificate, str]]:
    """Why each statement is not proved, in words; "" where it is."""
    neurons = of_neurons(network)
    for certificate in certificates:
        _check_statement(network, neurons, certificate)
    pairs = {id(b): b for c in certificates for b in c.evidence.constants.values()}
    constants = dict(zip(pairs, check_pairs(network, list(pairs.values())), strict=True))
    boxes: dict[int, list[int]] = {}
    for i, certificate in enumerate(certificates):
        boxes.setdefault(id(certificate.ball.box), []).append(i)
    reasons = [""] * len(certificates)
    step = chunk_size(neurons)
    for which in [alike[k : k + step] for alike in boxes.values() for k in range(0, len(alike), step)]:
        balls = _proved(neurons, [certificates[i] for i in which], constants)
        for i, row, others in zip(which, balls.proved, balls.samples.others, strict=True):
            if not bool(row.all()):
                radius = certificates[i].radius
                reasons[i] = f"class {int(others[~row][0])} is not excluded on the ball of radius {radius:.6g}."
    return list(zip(certificates, reasons, strict=True))


def _proved(neurons: Network, certificates: list[RadiusCertificate], constants: dict[int, float]) -> Balls:
    """Balls in one box with what their evidence proves; `constants` are by the identity of their evidence."""
    options = {"dtype": torch.float64, "device": neurons.device}
    x = torch.stack([c.ball.checked_center(neurons.inputs) for c in certificates]).to(neurons.device)
    y = torch.tensor([c.label for c in certificates], device=neurons.device)
    samples = Samples.of(neurons, x, y, certificates[0].ball.box)
    balls = Balls(samples, torch.tensor([c.radius for c in certificates], **options))
    table = torch.full((len(certificates), neurons.outputs), torch.inf, **options)
    for k, certificate in enumerate(certificates):
        for j, bound in certificate.evidence.constants.items():
            table[k, j] = constants[id(bound)]
    balls.by_constants(table.gather(1, samples.others))
    if not bool(balls.proved.all()):
        balls.by_themselves()
    given = [(k, j - (j > c.label), t) for k, c in enumerate(certificates) for j, t in c.evidence.multipliers.items()]
    given = [item for item in given if not bool(balls.proved[item[0], item[1]])]
    if given:
        which = torch.tensor([(k, pair) for k, pair, _ in given], device=neurons.device)
        t = torch.stack([t.detach().to(**options).flatten() for _, _, t in given])
        maps = balls.local_maps(which)
        balls.by_multipliers(which, maps, t.gather(1, maps.index))
    return balls


def _check_statement(network: Network, neurons: Network, certificate: RadiusCertificate) -> None:
    """Refuse what is no statement about this network, before anything is computed."""
    ball, label, evidence = certificate.ball, certificate.label, certificate.evidence
    if flushes_denormals():
        raise NotCertified(FLUSHED)
    if certificate.digest != network.digest:
        raise NotCertified(f"the certificate is of network {certificate.digest[:12]}, this one is {network.digest[:12]}.")
    if network.outputs < 2 or label not in range(network.outputs):
        raise NotCertified(f"{label} is no class of {network.outputs} outputs.")
    if float(ball.norm) != 2.0:
        raise NotCertified(f"radii are proved in the 2-norm, not in the norm {ball.norm}.")
    try:
        ball.checked_center(network.inputs)
    except InvalidDomain as error:
        raise NotCertified(f"the ball is none of this network's inputs: {error}") from error
    if not {*evidence.constants, *evidence.multipliers} <= {*range(network.outputs)} - {label}:
        raise NotCertified(f"the evidence is of other classes than the {network.outputs - 1} beside {label}.")
    if any(t.numel() != neurons.neurons for t in evidence.multipliers.values()):
        raise NotCertified(f"there are multipliers for another number than {neurons.neurons} neurons.")
    for j, bound in evidence.constants.items():
        if bound.pair is not None and {*bound.pair} != {label, j}:
            raise NotCertified(f"the constant for class {j} is of the outputs {bound.pair}.")


def other_classes(y: Tensor, m: int) -> Tensor:
    """The classes other than y in their order, (B, m - 1)."""
    every = torch.arange(m - 1, device=y.device).expand(len(y), -1)
    return every + (every >= y[:, None])
