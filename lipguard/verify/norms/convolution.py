"""Upper bounds of a convolution's norm from 2 to 2, proved from its kernel: the unrolled matrix is never formed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from lipguard.network import Conv
from lipguard.rounding import TINY, gamma, sqrt_up, up
from lipguard.verify.lmi.fronts import real
from lipguard.verify.norms.matrix_norm import frobenius_bound, matrix_norms, norm_test, sums_bound, times, unscaled
from lipguard.verify.torus.frequencies import PHASE, waves

_WORK = 1e11
"""Multiplications up to which the frequencies are gone through: some ten seconds of one core."""

_INFLATIONS = (1e-12, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
_CHUNK = 2**22


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
    best = sums_bound(conv)
    kernel = conv.weight.shape[2:]
    # Places i with s i + d t = x for taps t: t runs through multiples of s / gcd(d, s), and i follows from t.
    patches = math.prod(
        min(m, -(-k * math.gcd(d, s) // s)) for m, k, d, s in zip(conv.small, kernel, conv.dilation, conv.stride, strict=True)
    )
    taps = math.prod(min(n, k) for n, k in zip(conv.large, kernel, strict=True))
    parts = conv.weight.detach().reshape(conv.groups, -1, *conv.weight.shape[1:])
    for matrices, count in ((parts.flatten(2), patches), (parts.transpose(1, 2).flatten(2), taps)):
        best = min(best, times(float(matrix_norms(matrices).max()), sqrt_up(count)))
    return best


def polyphase(conv: Conv) -> tuple[Tensor, list[int]]:
    """The kernel by phase and place, (groups, out, in, phases, *places), and the lengths of a torus that holds the image.

    Entry x(q) has phase b = q mod s and place a = (q - b) / s; tap t of output i reads d t - p = s a + b, relative to s i. On
    the torus no two places that are read or filled fall together.
    """
    taps, lengths = [], []
    for n, m, s, p, d, k in zip(
        conv.large, conv.small, conv.stride, conv.padding, conv.dilation, conv.weight.shape[2:], strict=True
    ):
        found = [divmod(d * t - p, s) for t in range(k)]
        first, last = min(a for a, _ in found), max(a for a, _ in found)
        lengths.append(max((n - 1) // s, m - 1 + last) - min(0, first) + 1)
        taps.append([(a - first, b) for a, b in found])
    phases = {phase: k for k, phase in enumerate(sorted(set(product(*({b for _, b in axis} for axis in taps)))))}
    kernel = conv.weight.detach().reshape(conv.groups, -1, *conv.weight.shape[1:])
    spread = kernel.new_zeros(*kernel.shape[:3], len(phases), *(max(a for a, _ in axis) + 1 for axis in taps))
    for tap in product(*(range(len(axis)) for axis in taps)):
        places, own = zip(*(axis[t] for axis, t in zip(taps, tap, strict=True)), strict=True)
        spread[(..., phases[own], *places)] = kernel[(..., *tap)]
    return spread, lengths


def frequency_bound(conv: Conv) -> float | None:
    """Upper bound by the convolution on a torus, of which the zero-padded one is a part; None where it takes too long.

    By phases and places (see `polyphase`) the stride becomes 1, and y(i) is the sum over places a and phases b of
    K_b(a) x_b(i + a). On the torus W is C restricted to the inputs and outputs that exist, with C block-circulant. The norm of C
    is the largest over the torus's own frequencies w of ||K(w)||, K(w) = sum_a K(a) exp(i w a): a finite grid, and nothing lies
    between. The kernel is real, so that w and -w have one norm.
    """
    spread, lengths = polyphase(conv)
    places = torch.cartesian_prod(*(torch.arange(n, device=spread.device) for n in spread.shape[4:])).reshape(-1, len(lengths))
    kernel = spread.flatten(4).flatten(2, 3)
    taken = kernel.flatten(0, 2).any(0)
    kernel, places = kernel[..., taken], places[taken]
    few, many = sorted(kernel.shape[1:3])
    count = math.prod(lengths) // 2 + 1
    if count * conv.groups * 8 * few * few * many > _WORK or not len(places):
        return None if len(places) else 0.0

    def symbols() -> Iterator[Tensor]:
        """K(w) for every frequency up to sign and every group, in chunks (frequencies times groups, few, many), complex."""
        halves = [*lengths[:-1], lengths[-1] // 2 + 1]
        grid = torch.cartesian_prod(*(torch.arange(n, device=kernel.device) for n in halves)).reshape(-1, len(lengths))
        for part in grid.split(max(1, _CHUNK // (4 * conv.groups * few * many))):
            turns = torch.ones((), dtype=torch.complex128, device=kernel.device)
            for axis, length in enumerate(lengths):
                turns = turns * waves(part[:, axis, None] * places[:, axis], length)
            real_part, imaginary = (torch.einsum("ft,goct->fgoc", side, kernel) for side in (turns.real, turns.imag))
            symbol = torch.complex(real_part, imaginary).flatten(0, 1)
            yield symbol if symbol.shape[1] <= symbol.shape[2] else symbol.mH

    def proved(bound: float) -> bool:
        tests = ((norm_test(real(s)), torch.arange(len(s), device=s.device)) for s in symbols())
        return all(bool(test(every, kernel.new_full(every.shape, bound)).all()) for test, every in tests)

    top = max(_estimate(symbol) for symbol in symbols())
    # |K(w) - computed| <= sum_t |K(t)| (waves of at most 3 axes and their products, and the rounding of the sum), for the real
    # and the imaginary part.
    taps = kernel.shape[-1]
    error = 2 * (4 * PHASE + 2 * gamma(taps + 8)) * kernel.abs().sum(-1)
    slack = max(frobenius_bound(part) for part in error) + 2 * taps * kernel[0, ..., 0].numel() * TINY
    for inflation in _INFLATIONS:
        bound = up(top * (1 + inflation))
        if math.isfinite(bound) and proved(bound):
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
