"""Differentiable pre-activation intervals on a domain: interval arithmetic through the network's nodes.

Floating point without rounding control: for penalties and losses. A certificate has its own enclosures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.certificate import Ball, Domain
from lipguard.network import Activation, Affine, Input, Network, Operator, Sum, Walk

Interval = tuple[Tensor, Tensor]
"""Lower and upper ends, each (rows, size)."""


def squared(operator: Operator) -> Operator:
    """The operator with every coefficient squared: applied to ones, it gives the squared lengths of the rows."""
    return operator.mapped(torch.square)


def row_lengths(operator: Operator, like: Tensor) -> Tensor:
    """2-norm of every row of the operator, (out,)."""
    ones = torch.ones(operator.shape[1], dtype=like.dtype, device=like.device)
    return squared(operator)(ones).clamp_min(torch.finfo(like.dtype).tiny).sqrt()


def through(operator: Operator, bias: Tensor | None, interval: Interval) -> Interval:
    """The affine image of an interval, by centre and radius."""
    centre, radius = (interval[0] + interval[1]) / 2, (interval[1] - interval[0]) / 2
    middle = operator(centre) if bias is None else operator(centre) + bias
    reach = operator.abs()(radius)
    return middle - reach, middle + reach


def preactivations(network: Network, domain: Domain) -> list[Interval]:
    """An interval of every activation node's input on a domain, each (1, size), attached to the weights.

    On a 2-ball the first affine layer uses the lengths of its rows, which is exact; everything else is interval arithmetic.

    Args:
        network: in one floating-point precision.
        domain: a `Box` or a `Ball`.
    Raises:
        InvalidDomain: the domain does not fit the network's input.
    """
    walk = _Intervals(network, domain)
    network.fold(walk)
    return walk.found


class _Intervals(Walk[Interval]):
    """Interval arithmetic; `found` collects what activations read."""

    lacks = "no interval is known"

    def __init__(self, network: Network, domain: Domain) -> None:
        lower, upper = (end.to(network.device)[None] for end in domain.bounds(network.inputs))
        self.start = lower, upper
        self.radius = float(domain.radius) if isinstance(domain, Ball) and domain.norm == 2 else None
        self.found: list[Interval] = []

    def input(self, i: int, node: Input) -> Interval:
        return self.start

    def affine(self, i: int, node: Affine, read: Interval) -> Interval:
        interval = through(node.operator, node.bias, read)
        if self.radius is None or node.source != 0:
            return interval
        centre = (self.start[0] + self.start[1]) / 2
        middle = node.value(centre)
        reach = self.radius * row_lengths(node.operator, centre)
        return torch.maximum(interval[0], middle - reach), torch.minimum(interval[1], middle + reach)

    def activation(self, i: int, node: Activation, read: Interval) -> Interval:
        self.found.append(read)
        return _image(node, *read)

    def total(self, i: int, node: Sum, *read: Interval) -> Interval:
        return torch.stack([a for a, _ in read]).sum(0), torch.stack([b for _, b in read]).sum(0)


def _image(node: Activation, lower: Tensor, upper: Tensor) -> Interval:
    """phi of an interval: its ends where phi rises on it, else around one end by the slopes."""
    left, right = node.function(lower), node.function(upper)
    low, high = node.function.slope_range(lower, upper)
    width = upper - lower
    # phi(z) = phi(lower) + s (z - lower) with s between the slopes, and likewise from the upper end.
    bottom = torch.maximum(left + low.clamp(max=0) * width, right - high.clamp(min=0) * width)
    top = torch.minimum(left + high.clamp(min=0) * width, right - low.clamp(max=0) * width)
    return torch.where(low >= 0, left, bottom), torch.where(low >= 0, right, top)
