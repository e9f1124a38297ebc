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
from lipguard.rounding import down, up
from lipguard.verify.domain.jacobians import magnitude_norms
from lipguard.verify.domain.localized import Reduced, proves
from lipguard.verify.phases.flat import is_flat
from lipguard.verify.phases.phase_form import PhaseForm, phase_form
from lipguard.verify.phases.phases import imply, reduce, refutes

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
    ranges = imply(form, phases, torch.tensor([leaf.part for leaf in leaves]))
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
    """Whether `value` is proved to bound the constant from 2-norm to 2-norm over each leaf, by multipliers (K, n)."""
    maps = reduced.maps(form.inputs)
    # value^2 is rounded: down by a unit it is a square that `value` covers.
    return proves(maps, t.gather(1, maps.index), t.new_full((len(t),), down(value * value)))


def interval_norms(form: PhaseForm, reduced: Reduced, norm: tuple[float, float]) -> Tensor:
    """Upper bounds of ||J||_{p -> q} by the entrywise magnitude of all Jacobians, (K,).

    Exact up to rounding where no neuron is free and p = 1 or q = inf.

    Raises:
        NotCertified: another pair of norms.
    """
    if norm[0] != 1 and norm[1] != math.inf:
        raise NotCertified(f"a partition proves bounds for the norms (2, 2), (1, q) and (p, inf), not {norm}.")
    return magnitude_norms(reduced.maps(form.inputs).jacobian_magnitude(), norm)
