"""Differentiable pre-activation intervals on a domain: interval arithmetic through the network's nodes.

Floating point without rounding control: for penalties and losses. A certificate has its own enclosures.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lipguard.certificate import Ball, Domain
from lipguard.errors import UnsupportedQuery
from lipguard.network import Activation, Affine, Conv, Dense, Diagonal, Index, Input, Network, Operator, Sum

Interval = tuple[Tensor, Tensor]
"""Lower and upper ends, each (rows, size)."""


def squared(operator: Operator) -> Operator:
    """The operator with every coefficient squared: applied to ones, it gives the squared lengths of the rows."""
    if isinstance(operator, Dense | Conv):
        return replace(operator, weight=operator.weight.square())
    if isinstance(operator, Diagonal):
        return replace(operator, scale=operator.scale.square())
    assert isinstance(operator, Index)
    return operator


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
    lower, upper = (end.to(network.device)[None] for end in domain.bounds(network.inputs))
    radius, centre = None, None
    if isinstance(domain, Ball) and domain.norm == 2:
        radius, centre = float(domain.radius), (lower + upper) / 2
    values: list[Interval] = []
    found: list[Interval] = []
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                values.append((lower, upper))
            case Affine():
                interval = through(node.operator, node.bias, values[node.source])
                if radius is not None and centre is not None and node.source == 0:
                    middle = node.operator(centre) if node.bias is None else node.operator(centre) + node.bias
                    reach = radius * row_lengths(node.operator, centre)
                    interval = torch.maximum(interval[0], middle - reach), torch.minimum(interval[1], middle + reach)
                values.append(interval)
            case Activation():
                found.append(values[node.source])
                values.append(_image(node, *values[node.source]))
            case Sum():
                parts = [values[s] for s in node.sources]
                values.append((torch.stack([a for a, _ in parts]).sum(0), torch.stack([b for _, b in parts]).sum(0)))
            case _:
                raise UnsupportedQuery(
                    f"{node.name or f'node {i}'}: no interval is known of a {type(node).__name__.lower()} layer."
                )
    return found


def _image(node: Activation, lower: Tensor, upper: Tensor) -> Interval:
    """phi of an interval: its ends where phi rises on it, else around one end by the slopes."""
    left, right = node.function(lower), node.function(upper)
    low, high = node.function.slope_range(lower, upper)
    width = upper - lower
    # phi(z) = phi(lower) + s (z - lower) with s between the slopes, and likewise from the upper end.
    bottom = torch.maximum(left + low.clamp(max=0) * width, right - high.clamp(min=0) * width)
    top = torch.minimum(left + high.clamp(min=0) * width, right - low.clamp(max=0) * width)
    return torch.where(low >= 0, left, bottom), torch.where(low >= 0, right, top)
