"""Check of `Partition`: the leaves cover the domain, and each leaf's bound is proved."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lipguard.certificate import Domain, Leaf, Partition
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.rounding import gamma, prove_positive_definite, up
from lipguard.verify.phases.flat import is_flat
from lipguard.verify.phases.phase_form import PhaseForm, phase_form
from lipguard.verify.phases.phases import propagate, refutes
from lipguard.verify.phases.substitution import Reduced, compact, reduce

_CHUNK = 256


def check_partition(network: Network, evidence: Partition, norm: tuple[float, float], domain: Domain | None) -> float:
    """The largest of the leaves' provable bounds, at or just above the claimed value.

    Raises:
        NotCertified: the leaves leave a gap, a region claimed empty or without interior is not proved to be so, or a
            bound is not provable within 1e-6 of the claim.
    """
    if not 0 <= evidence.value < math.inf:
        raise NotCertified(f"the partition claims {evidence.value:g}: a bound is a number that is not negative.")
    form = phase_form(network, domain)
    leaves = evidence.leaves
    if not leaves or any(leaf.phases.numel() != form.neurons for leaf in leaves):
        raise NotCertified("the partition has no leaves, or phases for another number of neurons.")
    if any(v is not None and v.shape != (form.neurons,) for leaf in leaves for v in (leaf.t, leaf.farkas, leaf.flat)):
        raise NotCertified("a leaf has multipliers for another number of neurons.")
    if any(leaf.part not in range(len(form.lower)) for leaf in leaves):
        raise NotCertified("a leaf lies in no part of the domain.")
    phases, parts = torch.stack([leaf.phases for leaf in leaves]).long(), torch.tensor([leaf.part for leaf in leaves])
    if not all(covers(phases[parts == part], len(form.pieces)) for part in range(len(form.lower))):
        raise NotCertified("the leaves do not cover every phase of every neuron.")
    value = 0.0
    for start in range(0, len(leaves), _CHUNK):
        value = max(value, _chunk(form, leaves[start : start + _CHUNK], evidence.value, norm))
    return value


def covers(phases: Tensor, pieces: int) -> bool:
    """Whether the assignments (K, n), -1 where free, cover all assignments: as the leaves of a branching do.

    Some neuron must be fixed in all of them; each of its pieces must then be covered by the leaves that have it.
    """
    table = phases.numpy()
    everything = np.ones(table.shape[1], dtype=bool)
    stack = [(table, everything)]
    while stack:
        leaves, open_ = stack.pop()
        if len(leaves) == 0:
            return False
        fixed = (leaves >= 0) & open_
        if not fixed.any(1).all():
            continue  # a leaf that is free in all that is left covers it
        common = fixed.all(0)
        if not common.any():
            return False
        # Any common neuron will do as the first to branch on: the others stay fixed below it.
        neuron = int(common.argmax())
        below = open_.copy()
        below[neuron] = False
        stack += [(leaves[leaves[:, neuron] == piece], below) for piece in range(pieces)]
    return True


def _chunk(form: PhaseForm, leaves: tuple[Leaf, ...], claim: float, norm: tuple[float, float]) -> float:
    phases = torch.stack([leaf.phases for leaf in leaves]).long()
    ranges = propagate(form, phases, torch.tensor([leaf.part for leaf in leaves]))
    n = form.neurons
    claimed = torch.tensor([leaf.empty for leaf in leaves])
    farkas = torch.stack([torch.zeros(n, dtype=torch.float64) if leaf.farkas is None else leaf.farkas for leaf in leaves])
    refuted = ranges.empty.clone()
    asked = claimed & ~refuted
    if bool(asked.any()):
        refuted[asked] |= refutes(form, ranges.pick(asked), farkas[asked])
    if bool((claimed & ~refuted).any()):
        raise NotCertified("a region claimed empty is not refuted by its multipliers.")
    for i, leaf in enumerate(leaves):
        if leaf.flat is not None and not refuted[i]:
            if not is_flat(form, ranges.phases[i], leaf.flat.to(torch.float64), leaf.part):
                raise NotCertified("a region claimed to have no interior is not proved to have none.")
            refuted[i] = True
    alive = ~refuted
    if not bool(alive.any()):
        return 0.0
    reduced = reduce(form, ranges.pick(alive))
    if norm != (2.0, 2.0):
        return float(interval_norms(form, reduced, norm).max())
    ones = torch.ones(n, dtype=torch.float64)
    t = torch.stack(
        [ones if leaf.t is None else leaf.t.to(torch.float64) for leaf, a in zip(leaves, alive.tolist(), strict=True) if a]
    )
    left = torch.arange(len(t))
    value = claim
    inflation = 1e-13
    while len(left):
        value = up(claim * (1 + inflation))
        proved = semidefinite(form, reduced.pick(left), t[left], value)
        left = left[~proved]
        inflation *= 4
        if inflation > 1e-6:
            raise NotCertified(f"{len(left)} leaves are not provably bounded by {show_upper(claim, 9)}.")
    return value


def semidefinite(form: PhaseForm, reduced: Reduced, t: Tensor, value: float) -> Tensor:
    """Whether value^2 E + 2T - TQ - Q'T - Y'Y >= 0 over (u, x) is proved, leaf by leaf."""
    index, present, q, q_mass, y, y_mass = compact(reduced, form.tangent)
    f, total = index.shape[1], q.shape[2] if index.shape[1] else y.shape[2]
    t = torch.where(present, t.gather(1, index).clamp_min(0), torch.zeros_like(index, dtype=torch.float64))
    t = torch.where(t.isfinite(), t, torch.zeros_like(t))
    rho = value * value
    z = -(y.mT @ y)
    if f:
        coupling = t[:, :, None] * q
        z[:, :f] -= coupling
        z[:, :, :f] -= coupling.mT
    diagonal = z.diagonal(dim1=-2, dim2=-1)
    # A place without a neuron gets a one: it is decoupled.
    diagonal[:, :f] += torch.where(present, 2 * t, torch.ones_like(t))
    diagonal[:, f:] += rho
    error = gamma(y.shape[1] + 32) + 4 * reduced.error

    def radius(v: Tensor) -> Tensor:
        column = v[:, :, None]
        out = y_mass.mT @ (y_mass @ column)
        if f:
            out = out + q_mass.mT @ (t[:, :, None] * column[:, :f])
            out[:, :f] += t[:, :, None] * (q_mass @ column)
        out = out[:, :, 0]
        out[:, :f] += torch.where(present, 2 * t, torch.ones_like(t)) * v[:, :f]
        out[:, f:] += rho * v[:, f:]
        return error * out * (1 + gamma(8 * total))

    # rho = value^2 is rounded: one unit, far below `error` of the diagonal.
    return prove_positive_definite(z, radius)


def interval_norms(form: PhaseForm, reduced: Reduced, norm: tuple[float, float]) -> Tensor:
    """Upper bounds of ||J||_{p -> q} by the entrywise magnitude of all Jacobians, (K,).

    Exact up to rounding where no neuron is free and p = 1 or q = inf.

    Raises:
        NotCertified: another pair of norms.
    """
    p, q = norm
    if p != 1 and q != math.inf:
        raise NotCertified(f"a partition proves bounds for the norms (2, 2), (1, q) and (p, inf), not {norm}.")
    magnitude = jacobian_magnitude(form, reduced)
    k = magnitude.shape[1] + magnitude.shape[2]
    grow = 1 + 8 * gamma(k + 8)
    if p == 1:
        return torch.linalg.vector_norm(magnitude, q, dim=1).amax(1) * grow
    dual = 1.0 if p == math.inf else 2.0
    return torch.linalg.vector_norm(magnitude, dual, dim=2).amax(1) * grow


def jacobian_magnitude(form: PhaseForm, reduced: Reduced) -> Tensor:
    """Entrywise upper bound of |J| over all slopes of the free neurons, (K, m, d)."""
    n = form.neurons
    inputs = n + form.tangent.nonzero()[:, 0]
    center, radius = (torch.zeros(*reduced.p.shape[:2], len(inputs), dtype=torch.float64) for _ in range(2))

    def rows(direct: Tensor, mass: Tensor, until: int) -> tuple[Tensor, Tensor]:
        """J of rows over (u, x), u_j = s p_j with s in [0, 1], in terms of the rows before."""
        mid = direct[:, :, inputs].clone()
        rad = reduced.error * mass[:, :, inputs]
        for here in form.layers[:until]:
            block = direct[:, :, here]
            # s = 1/2 +- 1/2.
            mid += block @ center[:, here] / 2
            rad += block.abs() @ (radius[:, here] + center[:, here].abs() / 2)
            rad += reduced.error * (mass[:, :, here] @ (center[:, here].abs() + radius[:, here]))
        return mid, rad

    for index, here in enumerate(form.layers):
        center[:, here], radius[:, here] = rows(reduced.p[:, here], reduced.p_mass[:, here], index)
    mid, rad = rows(reduced.y, reduced.y_mass, len(form.layers))
    return (mid.abs() + rad) * (1 + 64 * form.error)
