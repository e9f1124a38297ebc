"""The product of the layers' norms with the Toeplitz bound for convolutions: no matrix is formed, none is factorised.

||W||^2 <= sum_i max_w sum_j |K_ij(w)|^2 over the frequencies w of the convolution's symbol K(w), channels by channels, the
outer sum over rows or columns, whichever gives less (Araujo et al. 2021, arXiv:2006.08391). At most sqrt(channels) above the
norm, and at most sqrt(taps) times the Frobenius norm of the kernel.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipguard.bounds.method import Method
from lipguard.bounds.spectral import layer_norm
from lipguard.certificate import Certificate, Factors, Query
from lipguard.network import Conv, Network
from lipguard.verify import verify

_MARGIN = 1 + 2.0**-30
"""Of a proposal over the floating-point value: the checker's error bounds are some thousand units."""

_CHUNK = 2**22
"""Complex numbers held at once."""


@dataclass(frozen=True)
class Toeplitz(Method):
    """Product of norms along the graph with Toeplitz bounds of convolutions, exact norms of matrices."""

    def __call__(self, network: Network, query: Query, state: object = None) -> tuple[Certificate, None]:
        """The verified product bound; valid on every domain.

        Raises:
            UnsupportedQuery: a weight is so large or small that its square leaves the range of float64.
        """
        del state
        began = time.perf_counter()
        norms: dict[int, float] = {}
        for i, node in enumerate(network.nodes):
            if node.map is not None:
                kernel = node.map.convolution if query.norm[0] == 2 else None
                norms[i] = layer_norm(node.map, query.norm[0]) if kernel is None else _proposal(kernel)
        factors = Factors(norms, "toeplitz")
        proposed = Certificate(math.nan, "upper", query.norm, query.domain, network.digest, "toeplitz", factors)
        verified = verify(network, proposed)
        return replace(verified, seconds=time.perf_counter() - began), None


def toeplitz_norm(conv: Conv, grid: int | None = None) -> Tensor:
    """The Toeplitz bound as a differentiable function of the kernel, 0-d, in floating point.

    Args:
        conv: the convolution, its weight in the autograd graph or not.
        grid: points S an axis. None takes the frequencies of a torus that holds the image, where the formula is a bound up
            to rounding; with S points it is one only after division by the square root of cos(n pi / S) for every axis, n the
            degree of the symbol there (k - 1 for a kernel of k taps without stride or dilation).
    """
    kernel, lengths = _by_place(conv)
    sizes = [*lengths] if grid is None else [max(grid, n) for n in kernel.shape[4:]]
    dims = tuple(range(4, kernel.ndim))
    rows: list[Tensor] = []
    columns: Tensor | None = None
    height = max(1, _CHUNK // (kernel.shape[0] * kernel[0, 0, ..., :1].numel() // kernel.shape[-1] * math.prod(sizes) + 1))
    for part in kernel.split(height, dim=1):
        power = torch.fft.fftn(part, sizes, dim=dims).abs().square().flatten(4)  # (groups, out, in, phases, frequencies)
        rows.append(power.sum((2, 3)).amax(-1))
        inner = power.sum(1)
        columns = inner if columns is None else columns + inner
    assert columns is not None
    by_row, by_column = torch.cat(rows, 1).sum(1), columns.amax(-1).flatten(1).sum(1)
    return torch.minimum(by_row.amax(), by_column.amax()).sqrt()


def _proposal(conv: Conv) -> float:
    """A little more than the bound that the checker will find, without repeating its work."""
    with torch.no_grad():
        if 1 in (math.prod(conv.weight.shape[2:]), math.prod(conv.small)):  # one tap, or one place: a matrix
            matrices = conv.weight.reshape(conv.groups, -1, *conv.weight.shape[1:]).flatten(2)
            value = float(torch.linalg.matrix_norm(matrices, 2).max())
        else:
            value = float(toeplitz_norm(conv))
    return value * _MARGIN if math.isfinite(value) else math.inf


def _by_place(conv: Conv) -> tuple[Tensor, list[int]]:
    """The kernel as (groups, out, in, phases, *places): stride s splits position q of the large side into q mod s and q // s."""
    weight = conv.weight
    kernel = weight.reshape(conv.groups, -1, *weight.shape[1:])
    lengths: list[int] = []
    for axis, (n, m, s, p, d, k) in enumerate(
        zip(conv.large, conv.small, conv.stride, conv.padding, conv.dilation, weight.shape[2:], strict=True)
    ):
        # Dilated taps in a row of d (k - 1) + 1 places that starts p before a multiple of s.
        first, last = -p // s, (d * (k - 1) - p) // s
        row = torch.arange(k, device=weight.device) * d + (-p - first * s)
        lengths.append(max((n - 1) // s, m - 1 + last) - min(0, first) + 1)
        dim = 3 + axis
        shape = [*kernel.shape]
        shape[dim] = (last - first + 1) * s
        kernel = kernel.new_zeros(shape).index_add(dim, row, kernel)
    # (g, o, c, A1 s1, A2 s2, ...) -> (g, o, c, s1 s2 ..., A1, A2, ...)
    split: list[int] = []
    for length, s in zip(kernel.shape[3:], conv.stride, strict=True):
        split += [length // s, s]
    dims = len(conv.stride)
    opened = kernel.reshape(*kernel.shape[:3], *split)
    phases, places = [4 + 2 * a for a in range(dims)], [3 + 2 * a for a in range(dims)]
    return opened.permute(0, 1, 2, *phases, *places).flatten(3, 2 + dims), lengths
