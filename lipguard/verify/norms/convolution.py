"""Upper bounds of a convolution's norm from 2 to 2, proved from its kernel: the unrolled matrix is never formed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.network import Conv
from lipguard.rounding import TINY, UNIT, gamma, sqrt_up, up
from lipguard.verify.lmi.fronts import real
from lipguard.verify.norms.matrix_norm import frobenius_bound, largest_row_sum, norm_test, prove_matrix_norm, times, unscaled

_WORK = 1e11
"""Multiplications up to which the frequencies are gone through: some ten seconds of one core."""

_INFLATIONS = (1e-12, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
_CHUNK = 2**22
_PHASE = 256 * UNIT
"""Error of a computed phase exp(2 pi i r): at most 3 real phases multiplied, each with an angle below 2 pi that is wrong by
25 units and a sine and cosine wrong by a few more."""


def convolution_bound(conv: Conv) -> float:
    """The better of the bound by the kernel as a matrix and the one by frequencies."""
    largest = float(conv.weight.abs().max())
    if largest == 0:
        return 0.0

    def bound(scale: float) -> float:
        scaled = replace(conv, weight=conv.weight.detach() * scale)
        kernel, frequency = kernel_bound(scaled), frequency_bound(scaled)
        return up(kernel if frequency is None else min(kernel, frequency))

    return unscaled(bound, largest)


def kernel_bound(conv: Conv) -> float:
    """Upper bound of a convolution's norm from 2 to 2 without its unrolled matrix: the least of three.

    ||W||^2 <= ||W||_1 ||W||_inf, row and column sums of |W|. Let K be the kernel as a matrix from one patch (channels times
    taps) to one place, and let every entry lie in at most m patches: ||W x||^2 = sum over patches ||K x_patch||^2
    <= ||K||^2 m ||x||^2. And the same for the adjoint, where every entry meets at most as many places as there are taps.
    Groups make the matrix block-diagonal: the largest of theirs counts.
    """
    magnitude = conv.abs()
    best = sqrt_up(times(largest_row_sum(magnitude), largest_row_sum(magnitude.transpose())))
    kernel = conv.weight.shape[2:]
    # Places i with s i + d t = x for taps t: t runs through multiples of s / gcd(d, s), and i follows from t.
    patches = math.prod(
        min(m, -(-k * math.gcd(d, s) // s)) for m, k, d, s in zip(conv.small, kernel, conv.dilation, conv.stride, strict=True)
    )
    taps = math.prod(min(n, k) for n, k in zip(conv.large, kernel, strict=True))
    parts = conv.weight.detach().reshape(conv.groups, -1, *conv.weight.shape[1:])
    for matrices, count in ((parts.flatten(2), patches), (parts.transpose(1, 2).flatten(2), taps)):
        norms = [_matrix_bound(matrix) for matrix in matrices]
        best = min(best, times(max(norms), sqrt_up(count)))
    return best


def _matrix_bound(matrix: Tensor) -> float:
    try:
        return prove_matrix_norm(matrix, float(torch.linalg.matrix_norm(matrix, 2)), "a kernel")
    except NotCertified:  # its square overflows
        return math.inf


def torus_of(conv: Conv) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """(place, phase) of every tap along each axis, and the lengths of a torus on which no two places fall together.

    Tap t of output i reads entry s i + d t - p = s (i + a) + b of the large side: place a relative to i, phase b.
    """
    axes, lengths = [], []
    for n, m, s, p, d, k in zip(
        conv.large, conv.small, conv.stride, conv.padding, conv.dilation, conv.weight.shape[2:], strict=True
    ):
        taps = [divmod(d * t - p, s) for t in range(k)]
        places = [a for a, _ in taps]
        lengths.append(max((n - 1) // s, m - 1 + max(places)) - min(0, *places) + 1)
        axes.append(taps)
    return axes, lengths


def frequency_bound(conv: Conv) -> float | None:
    """Upper bound by the convolution on a torus, of which the zero-padded one is a part; None where it takes too long.

    Every entry x(q) is put into phase b = q mod s and place a = (q - b) / s: the stride becomes 1, y(i) is the sum over taps t
    of K(t) x_b(i + a), with d t - p = s a + b. If the torus is long enough that no two places a that are read or filled fall
    together, W is C restricted to the inputs and outputs that exist, with C block-circulant. The norm of C is the largest over
    the torus's own frequencies w of ||K(w)||, K(w) = sum_t K(t) exp(i w a): a finite grid, and nothing lies between. The
    kernel is real, so that w and -w have one norm.
    """
    weight = conv.weight.detach()
    axes, lengths = torus_of(conv)
    kernel = weight.reshape(conv.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
    phases: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for t, tap in enumerate(product(*axes)):
        phases.setdefault(tuple(b for _, b in tap), []).append((t, tuple(a for a, _ in tap)))
    few = min(kernel.shape[1], kernel.shape[2] * len(phases))
    many = max(kernel.shape[1], kernel.shape[2] * len(phases))
    count = math.prod(lengths) // 2 + 1
    if count * conv.groups * 8 * few * few * many > _WORK or not bool(weight.any()):
        return None if bool(weight.any()) else 0.0

    def symbols() -> Iterator[Tensor]:
        """K(w) for every frequency up to sign and every group, in chunks (frequencies times groups, few, many), complex."""
        halves = [*(range(length) for length in lengths[:-1]), range(lengths[-1] // 2 + 1)]
        grid = torch.cartesian_prod(*(torch.arange(len(half), device=weight.device) for half in halves)).reshape(-1, len(lengths))
        for part in grid.split(max(1, _CHUNK // (4 * conv.groups * few * many))):
            blocks = []
            for taps in phases.values():
                turns = torch.ones(len(part), len(taps), dtype=torch.complex128, device=weight.device)
                for axis, length in enumerate(lengths):
                    places = torch.tensor([a[axis] for _, a in taps], device=weight.device)
                    # the angle's multiple of 1 / length is exact
                    turn = (part[:, axis, None] * places).remainder(length).to(torch.float64) * (2 * math.pi / length)
                    turns = turns * torch.complex(turn.cos(), turn.sin())
                chosen = kernel[..., [t for t, _ in taps]]
                blocks.append(
                    torch.complex(
                        torch.einsum("ft,goct->fgoc", turns.real, chosen), torch.einsum("ft,goct->fgoc", turns.imag, chosen)
                    )
                )
            symbol = torch.cat(blocks, -1).flatten(0, 1)
            yield symbol if symbol.shape[1] <= symbol.shape[2] else symbol.mH

    top = max(_estimate(symbol) for symbol in symbols())
    # |K(w) - computed| <= sum_t |K(t)| (phase + rounding of the sum), for the real and the imaginary part.
    taps = kernel.shape[-1]
    error = 2 * (_PHASE + 2 * gamma(taps + 8)) * kernel.abs().sum(-1)
    slack = (
        max(frobenius_bound(torch.cat([part] * len(phases), 1)) for part in error)
        + 2 * taps * len(phases) * kernel[0, ..., 0].numel() * TINY
    )
    for inflation in _INFLATIONS:
        bound = up(top * (1 + inflation))
        if math.isfinite(bound) and all(norm_test(real(symbol))(bound) for symbol in symbols()):
            return up(up(bound + slack))
    return None


def _estimate(symbol: Tensor) -> float:
    """The largest norm in a batch, in floating point: of the few matrices whose fourth powers are largest."""
    gram = symbol @ symbol.mH
    if not bool(gram.isfinite().all()):
        return math.inf
    score = torch.linalg.matrix_norm(gram @ gram)
    chosen = gram[score.topk(min(16, len(score))).indices]
    return math.sqrt(max(float(torch.linalg.eigvalsh(chosen)[:, -1].max()), 0.0))
