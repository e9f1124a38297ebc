"""The product of layer norms along a graph: what branches read and write decides how their bounds are put together.

Of every node v and every node u that all paths to v lead through, a bound is kept of the form

    ||dv||_p <= L ||du restricted to R||_p,     d the difference of two evaluations, R the entries of u that v depends on.

At a sum of parts with bounds L_i and entries R_i the parts' bounds are put together by what is known of their places:

    written places disjoint:  ||dv||^p = sum_i ||dv_i||^p <= sum_i L_i^p ||du|R_i||^p <= max_j sum_{i: j in R_i} L_i^p ||du||^p
                              (p = inf: the largest L_i): a concatenation;
    read places disjoint:     ||dv|| <= sum_i L_i ||du|R_i|| <= (sum_i L_i^q)^(1/q) ||du||, 1/p + 1/q = 1, by Hölder;
    neither:                  ||dv|| <= sum_i L_i ||du||.

Both disjoint: the first line gives the largest L_i, as it should be for a block-diagonal map.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.network import Network, Node
from lipguard.rounding import gamma, norm_up, sqrt_up, up
from lipguard.verify.norms.matrix_norm import times


@dataclass(frozen=True, eq=False)
class Reading:
    """||dv|| <= bound ||du restricted to places||; `places` is a mask of the entries of u, None for all."""

    bound: float
    places: Tensor | None = None


def product_bound(network: Network, factors: Mapping[int, float], p: float) -> float:
    """Upper bound of the constant from p to p, from an upper bound of every other node's own constant."""
    readers = Counter(source for node in network.nodes for source in node.sources)
    readings: list[dict[int, Reading]] = []
    written: list[Tensor | None] = []
    for i, node in enumerate(network.nodes):
        operator = node.map
        if not node.sources:
            found: dict[int, Reading] = {}
            written.append(None)
        elif node.variable or operator is not None:
            (source,) = node.sources
            found = {u: Reading(times(r.bound, factors[i]), r.places) for u, r in readings[source].items()}
            if operator is not None and (index := operator.selection) is not None and source in found:
                places = torch.zeros(operator.shape[1], dtype=torch.bool, device=operator.device)
                places[index[index >= 0]] = True
                found[source] = Reading(found[source].bound, places)
            written.append(_written(node, written[source]))
        else:
            found = _sum([readings[s] for s in node.sources], [written[s] for s in node.sources], readings, p)
            written.append(_union([written[s] for s in node.sources]))
        if i == 0 or readers[i] > 1:
            found[i] = Reading(1.0)
        readings.append(found)
    return readings[-1][0].bound


def _sum(
    parts: Sequence[Mapping[int, Reading]], written: Sequence[Tensor | None], readings: Sequence[Mapping[int, Reading]], p: float
) -> dict[int, Reading]:
    common = sorted(set.intersection(*(set(part) for part in parts)), reverse=True)
    separate = _disjoint(written)
    found: dict[int, Reading] = {}
    for u in common:
        terms = [part[u] for part in parts]
        if separate:
            bound = _separate(terms, p)
        elif _disjoint([term.places for term in terms]):
            bound = _norm([term.bound for term in terms], math.inf if p == 1 else p / (p - 1) if p < math.inf else 1.0)
        else:
            bound = _norm([term.bound for term in terms], 1.0)
        best = Reading(bound, _union([term.places for term in terms]))
        # By way of a later node that all of the parts go through, slices of it being told apart there.
        for later, reading in found.items():
            if u in readings[later]:
                way = times(reading.bound, readings[later][u].bound)
                if way < best.bound:
                    best = Reading(way, readings[later][u].places)
        found[u] = best
    return found


def _separate(terms: Sequence[Reading], p: float) -> float:
    """(max over entries j of the sum of L_i^p over the terms that read j)^(1/p)."""
    mask = next((term.places for term in terms if term.places is not None), None)
    if mask is None or p == math.inf:
        return _norm([term.bound for term in terms], p)
    scale = max(term.bound for term in terms)
    if scale == 0 or not math.isfinite(scale):
        return scale
    exponent = math.frexp(scale)[1]
    total = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    for term in terms:
        share = math.ldexp(term.bound, -exponent)  # exact, but for bounds that vanish beside the largest one
        share = up(share * share) if p == 2 else share
        # a number times a mask would be rounded to float32
        total += share if term.places is None else share * term.places.to(torch.float64)
    largest = float(total.max()) * (1 + 2 * gamma(len(terms) + 2))
    return math.ldexp(sqrt_up(largest) if p == 2 else up(largest), exponent) if largest else 0.0


def _norm(bounds: Sequence[float], p: float) -> float:
    """Upper bound of the p-norm (1, 2 or inf) of nonnegative numbers; nothing rounds where at most one is not 0."""
    present = [b for b in bounds if b]
    if len(present) < 2 or p == math.inf:
        return max(present, default=0.0)
    return norm_up(torch.tensor(present, dtype=torch.float64, device="cpu"), p)


def _written(node: Node, source: Tensor | None) -> Tensor | None:
    """Mask of the entries that may vary, None for all: what works entry by entry keeps constants where they are."""
    if node.in_place:
        return source
    operator = node.map
    if operator is None or not operator.weightless:  # an implicit layer, a sort or a matrix moves its entries about
        return None
    varies = torch.ones(operator.shape[1], dtype=torch.float64, device=operator.device) if source is None else source.double()
    return operator(varies) > 0


def _disjoint(masks: Sequence[Tensor | None]) -> bool:
    total = None
    for mask in masks:
        if mask is None:
            return False
        if total is not None and bool((total & mask).any()):
            return False
        total = mask if total is None else total | mask
    return True


def _union(masks: Sequence[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for mask in masks:
        if mask is None:
            return None
        total = mask if total is None else total | mask
    return None if total is None or bool(total.all()) else total
