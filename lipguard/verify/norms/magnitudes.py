"""Check of `Magnitudes`: absolute values carried through the network, implicit layers by positive vectors.

For p = inf: |dx| <= 1 entry by entry implies |d value| <= r for every node, r computed forwards, and ||dy||_q <= ||r||_q.
For q = 1: sum_i |dy_i| <= g'|dx| with g computed backwards from ones, and g'|dx| <= ||g||_{p*} ||dx||_p.
Both are at most the product of the layers' norms, and for one implicit layer at most the bound of Jafarpour et al. 2021,
arXiv:2106.03194, Theorem 6, for every choice of its weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import Magnitudes
from lipguard.errors import NotCertified
from lipguard.network import Activation, Affine, Coupled, Coupling, Implicit, Input, Network, Operator, Sum
from lipguard.rounding import TINY, UNIT, gamma, norm_up, sum_up
from lipguard.verify.norms.implicit import prove_magnitude


def check_magnitudes(network: Network, evidence: Magnitudes, norm: tuple[float, float]) -> float:
    """Upper bound of the constant, rounded up.

    Raises:
        NotCertified: neither p = inf nor q = 1, or a vector of the evidence does not prove its implicit layer's response.
    """
    p, q = norm
    vectors = {i: y.detach().to(network.device, torch.float64).flatten() for i, y in evidence.vectors.items()}
    if p == math.inf:
        return norm_up(_forwards(network, vectors), q)
    if q == 1:
        return norm_up(_backwards(network, vectors), math.inf if p == 1 else 2.0)
    raise NotCertified(f"magnitudes prove bounds from the inf-norm or to the 1-norm, not {norm}.")


def _forwards(network: Network, vectors: dict[int, Tensor]) -> Tensor:
    values: list[Tensor] = []
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                values.append(torch.ones(node.size, dtype=torch.float64, device=network.device))
            case Affine():
                values.append(_apply(node.operator.abs(), values[node.source]))
            case Activation():
                values.append(_steepest(node) * values[node.source] * (1 + 2 * UNIT) + TINY)
            case Implicit():
                values.append(_response(node, i, values[node.source], vectors, False))
            case Coupled():
                values.append(coupled_magnitude(node.function, values[node.source]))
            case Sum():
                values.append(sum_up(torch.stack([values[s] for s in node.sources]), 0))
    return values[-1]


def _backwards(network: Network, vectors: dict[int, Tensor]) -> Tensor:
    found: dict[int, list[Tensor]] = {
        len(network.nodes) - 1: [torch.ones(network.outputs, dtype=torch.float64, device=network.device)]
    }

    def total(i: int) -> Tensor:
        parts = found.get(i)
        if parts is None:
            return torch.zeros(network.sizes[i], dtype=torch.float64, device=network.device)
        return parts[0] if len(parts) == 1 else sum_up(torch.stack(parts), 0)

    for i in reversed(range(1, len(network.nodes))):
        if i not in found:
            continue
        node, g = network.nodes[i], total(i)
        match node:
            case Affine():
                found.setdefault(node.source, []).append(_apply(node.operator.abs().transpose(), g))
            case Activation():
                found.setdefault(node.source, []).append(_steepest(node) * g * (1 + 2 * UNIT) + TINY)
            case Implicit():
                found.setdefault(node.source, []).append(_response(node, i, g, vectors, True))
            case Coupled():
                found.setdefault(node.source, []).append(coupled_magnitude(node.function, g, network.sizes[node.source]))
            case Sum():
                for source in node.sources:
                    found.setdefault(source, []).append(g)
            case Input():
                pass
    return total(0)


def coupled_magnitude(function: Coupling, r: Tensor, size: int | None = None) -> Tensor:
    """Upper bound of |J| r over all Jacobians of the function, entry by entry; with its number of inputs, of |J'| r."""
    return function.magnitude(r, size)


def _apply(magnitude: Operator, x: Tensor) -> Tensor:
    count = magnitude.shape[1]
    return magnitude(x) * (1 + 2 * gamma(count + 2)) + count * TINY


def _steepest(node: Activation) -> Tensor:
    alpha, beta = node.function.slopes
    return torch.maximum(alpha.abs(), beta.abs())


def _response(node: Implicit, i: int, b: Tensor, vectors: dict[int, Tensor], transposed: bool) -> Tensor:
    if i not in vectors:
        raise NotCertified(f"no vector is given for the implicit layer {node.name or f'node {i}'}.")
    prove_magnitude(node, b, vectors[i], transposed)
    return vectors[i]
