"""Check of `ChannelMultipliers`: the LipSDP matrix of a network on tori is positive semidefinite, proved block by block.

Over the input x, the layers u (slopes [0, 1] after w = alpha p + width u) and the output y, the inequality is

    |x|^2 rho + sum_k t_k (2 |u_k|^2 - 2 Re u_k* p_k) + |y|^2 - 2 Re y* f(x, u) >= 0,

the largest |f|^2 being what y = f leaves. Multiplied by 1 / rho it has |x|^2 at one end and rho |y|^2 at the other. From the end
that is an image, one variable after another is eliminated (`lmi.elimination`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import ChannelMultipliers
from lipguard.errors import NotCertified
from lipguard.network import Network
from lipguard.rounding import sqrt_up
from lipguard.verify.lmi.elimination import Elimination
from lipguard.verify.rewriting import neurons_only
from lipguard.verify.torus.frequencies import finer
from lipguard.verify.torus.torus_form import TorusForm, Variable


def check_channels(network: Network, evidence: ChannelMultipliers, norm: tuple[float, float]) -> float:
    """The least bound sqrt(rho) that the multipliers provably give.

    Negative and non-finite multipliers are set to zero first.

    Raises:
        NotCertified: the norm is not (2, 2), the multipliers or the tori do not fit the network, or they prove nothing.
    """
    if norm != (2.0, 2.0):
        raise NotCertified(f"multipliers prove bounds from 2-norm to 2-norm, not {norm}.")
    if not (0 < evidence.rho < math.inf):
        raise NotCertified(f"rho = {evidence.rho:g} scales nothing.")
    if any(node.loop is not None for node in network.nodes):
        raise NotCertified("an implicit layer on a torus is not known.")
    network = neurons_only(network)
    activations, nodes = set(network.activations), set(range(len(network.nodes)))
    if not activations <= set(evidence.t) <= nodes or not set(evidence.sides) <= nodes:
        raise NotCertified("the multipliers are not those of the network's activations.")
    form = TorusForm(network, frozenset(set(evidence.t) - activations), evidence.sides)
    multipliers: dict[int, Tensor] = {}
    for i, layer in form.layers.items():
        t = evidence.t[i].detach().to(network.device, torch.float64).flatten()
        if t.numel() != form.widths[i].numel():
            raise NotCertified(f"node {i}: {t.numel()} multipliers are given for {form.widths[i].numel()} channels.")
        t = torch.where(t.isfinite(), t, torch.zeros_like(t)).clamp_min(0) * form.widths[i] ** 2
        # Any positive number is a multiplier: nothing rounds here.
        multipliers[i] = (t / evidence.rho if form.forward else t).repeat(layer.components // t.numel())
    return sqrt_up(_inequality(form, multipliers).least_rho())


def _inequality(form: TorusForm, t: dict[int, Tensor]) -> Elimination:
    """The inequality's blocks in the order of elimination: from the end on the finer torus, vectors before the other end."""
    variables = [form.ends[0], *form.layers.values(), form.ends[1]]
    first, *middle, last = variables if form.forward else variables[::-1]
    order: list[Variable] = [first, *sorted(middle, key=lambda v: not v.counts), last]
    place = {v.node: k for k, v in enumerate(order)}
    weights = [t.get(v.node, torch.ones(v.components, dtype=torch.float64, device=form.network.device)) for v in order]
    # 2 t is exact.
    diagonal = [2 * weight if v.node in t else weight for v, weight in zip(order, weights, strict=True)]
    z = Elimination(diagonal, [v.counts for v in order])
    for k, v in enumerate(order):
        for source, matrix in v.reads.items():
            there = place[source]
            block = matrix * -weights[k][:, None]
            if finer(v.counts, order[there].counts) != order[min(k, there)].counts:
                raise NotCertified("a layer on a finer torus would be eliminated after a coarser one that it meets.")
            z.add(min(k, there), max(k, there), block.mH if there < k else block)
    return z
