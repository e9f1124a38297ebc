"""Whether two readings of a module show one network."""

from __future__ import annotations

import torch

from lipguard.network import Network, Node

ROUNDINGS = 64
"""Units of roundoff by which the same constant may differ, computed for one sample and for several."""


def equal(a: Network, b: Network, dtype: torch.dtype) -> bool:
    """Whether two networks are the same, up to the rounding of constants that the forward computes in a precision."""
    if len(a.nodes) != len(b.nodes):
        return False
    close = ROUNDINGS * torch.finfo(dtype).eps
    return all(
        s.sources == t.sources and (_same(s, t, close) if s.structure() == t.structure() else _same_map(s, t, close))
        for s, t in zip(a.nodes, b.nodes, strict=True)
    )


def _same(a: Node, b: Node, close: float) -> bool:
    """Whether two nodes of one structure have the same numbers."""
    for v, w in zip(a.tensors(), b.tensors(), strict=True):
        if v.shape != w.shape:
            return False
        if torch.equal(v, w):
            continue
        if not v.is_floating_point() or float((v - w).detach().abs().max()) > close * float(v.detach().abs().max()):
            return False
    return True


def _same_map(a: Node, b: Node, close: float) -> bool:
    """Whether two affine nodes, written otherwise for one sample than for several, are one map: so are random vectors' images."""
    if a.map is None or b.map is None or a.map.shape != b.map.shape:
        return False
    x = torch.randn(4, a.map.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(a.map.device)
    with torch.no_grad():
        size = a.map.abs()(x.abs()) + (0 if a.bias is None else a.bias.abs())
        return bool(((a.value(x) - b.value(x)).abs() <= close * size).all())
