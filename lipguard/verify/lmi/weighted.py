"""Check of `WeightedMultipliers`: bounds between 1-, 2- and inf-norms from matrix inequalities with weights.

Scale the inputs by s > 0 (x = s x', entry by entry) or the outputs by r > 0 (y' = r y): numbers of the checker's own, so that
no rounding enters. A proved bound b of the scaled network, ||y'||_2 <= b ||x'||_2, gives

    ||y||_2 <= b ||x / s||_2 <= b (sum_k 1 / s_k^2)^(1/2) ||x||_inf,
    ||y||_1 = sum_i |y'_i| / r_i <= (sum_i 1 / r_i^2)^(1/2) ||y'||_2 <= b (sum_i 1 / r_i^2)^(1/2) ||x||_2.

An output norm inf is the largest over single outputs, where all norms agree. An input norm 1 is the largest over single
inputs: increments along a coordinate are bounded one at a time, and y(x') - y(x) is a sum of such increments whose lengths
add up to ||x' - x||_1.

With s_k = mu_k^(-1/2) the scaled inequality is LipSDP's with diag(mu) on the inputs: the one constraint x_k^2 <= 1 for each
input in the dual of arXiv:2401.14033, section 5, and for one hidden layer the natural program of Wang et al. 2022,
arXiv:2203.01212.
"""

from __future__ import annotations

import math

import torch

from lipguard.certificate import Multipliers, Part, WeightedMultipliers
from lipguard.errors import NotCertified
from lipguard.network import Affine, Diagonal, Index, Input, Network, Node, Operator
from lipguard.rounding import TINY, UNIT, sqrt_up, sum_up, up
from lipguard.verify.lmi.multipliers import check_multipliers
from lipguard.verify.norms.matrix_norm import times

NORMS = ((math.inf, math.inf), (1.0, 1.0), (2.0, math.inf), (1.0, 2.0), (math.inf, 2.0), (2.0, 1.0))
"""Pairs of norms that have such a proof."""


def check_weighted(network: Network, evidence: WeightedMultipliers, norm: tuple[float, float]) -> float:
    """Upper bound of the constant, rounded up: the largest over the parts.

    Raises:
        NotCertified: another pair of norms, a part too many or too few, or one that proves nothing.
    """
    if norm not in NORMS:
        raise NotCertified(f"weighted multipliers prove no bound for the norms {norm}.")
    count = parts_of(network, norm)
    if len(evidence.parts) != count:
        raise NotCertified(f"{len(evidence.parts)} parts are given where the norms {norm} need {count}.")
    return max(check_part(network, part, i, norm) for i, part in enumerate(evidence.parts))


def parts_of(network: Network, norm: tuple[float, float]) -> int:
    """How many matrix inequalities a bound in these norms takes."""
    return network.outputs if norm[1] == math.inf else network.inputs if norm[0] == 1 else 1


def check_part(network: Network, part: Part, i: int, norm: tuple[float, float]) -> float:
    """The bound of part i, rounded up.

    Raises:
        NotCertified: its weights are not positive, or the matrix inequality is not proved.
    """
    p, q = norm
    inward: Operator | None = None
    outward: Operator | None = None
    device, factor = network.device, 1.0
    size = network.inputs if p == math.inf else network.outputs if q == 1 else 0
    if (part.weights is None) != (size == 0):
        raise NotCertified(f"the norms {norm} need {'weights' if size else 'no weights'}.")
    if part.weights is not None:
        weights = part.weights.detach().to(device, torch.float64).flatten()
        scale = weights.rsqrt()
        if weights.numel() != size or not bool((scale.isfinite() & (scale > 0)).all()):
            raise NotCertified(f"{weights.numel()} weights are given for {size} entries, or one is not positive and finite.")
        # Three roundings in each 1 / s^2; sum_up covers the sum.
        factor = sqrt_up(up(float(sum_up(1 / (scale * scale)) * (1 + 8 * UNIT)) + size * TINY))
        inward, outward = (Diagonal(scale, size), None) if p == math.inf else (None, Diagonal(scale, size))
    chosen = torch.tensor([i], device=device)
    if q == math.inf:
        outward = Index(chosen, network.outputs)
    if p == 1:
        inward = Index(chosen, network.inputs, transposed=True)
    return times(factor, check_multipliers(_between(network, inward, outward), Multipliers(part.t, part.rho), (2.0, 2.0)))


def _between(network: Network, inward: Operator | None, outward: Operator | None) -> Network:
    """x -> outward(network(inward(x))). Affine maps of the input are multiplied out, so that sparse ones cost nothing."""
    nodes: list[Node] = list(network.nodes)
    if inward is not None:
        nodes = [Input(inward.shape[1]), Affine(0, inward, None, "inputs"), *(node.moved(lambda s: s + 1) for node in nodes[1:])]
    if outward is not None:
        nodes.append(Affine(len(nodes) - 1, outward, None, "outputs"))
    return Network(tuple(nodes))
