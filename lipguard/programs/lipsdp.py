"""LipSDP: the program of a network, the way to its solvers, and the multipliers back.

Slopes [alpha, beta] become [0, 1] by w = alpha p + (beta - alpha) u, a change of variables that leaves the matrix
inequality what it is: (w - alpha p)(beta p - w) = (beta - alpha)^2 u (p - u). Where alpha is not 0 every layer then sees
all that lie before it: deep networks keep their slopes. The transposed network has the same optimum, multipliers
rho / t (rho / (t (beta - alpha)^2) with slopes kept), and outputs for channels: the side with fewer channels makes the
smaller matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lipguard.programs.feedback import Feedback
from lipguard.programs.slope_program import SlopeProgram

_THINNEST = 1e-6
"""Slope intervals thinner than this are widened to it, as the checker does."""

_STEADY = 1e-2
"""Width, relative to the steepest slope, from which slopes may be kept: t (w - alpha p)(beta p - w) cancels in thinner ones."""


@dataclass(frozen=True, eq=False)
class LipSDP:
    """A network's program and the relation of its multipliers to the network's own.

    Attributes:
        program: what the solvers see.
        squares: by neuron in the network's order, (n,), the factor between its own multiplier and the program's, or its
            mirror image: (beta - alpha)^2, or 1 where the slopes are kept and the program is not transposed.
        order: for each of the program's neurons, its index in the network's order, (n,).
        transposed: whether the program is the transposed network's.
        balance: the natural size of each neuron's multiplier, (n,): the length of its outgoing weights over that of its
            incoming ones. W_1 c, W_2 / c is the same function, and its multipliers are t / c^2, as this is.
    """

    program: SlopeProgram
    squares: Tensor
    order: Tensor
    transposed: bool
    balance: Tensor

    def to_network(self, t: Tensor, rho: float) -> Tensor:
        """The network's multipliers from the program's."""
        t = t.to(torch.float64)
        own = rho / t if self.transposed else t
        result = torch.empty_like(own)
        result[self.order] = own
        return result / self.squares

    def to_program(self, t: Tensor, rho: float) -> Tensor:
        """The program's multipliers from the network's: a start from a neighbouring network's solution."""
        own = (t.to(self.squares) * self.squares)[self.order].clamp_min(torch.finfo(torch.float64).tiny)
        return rho / own if self.transposed else own


def lipsdp(fb: Feedback, tied: bool = False, free: Literal["inputs", "outputs"] | None = None) -> LipSDP:
    """LipSDP of a feedback form.

    Neurons that share a multiplier (`fb.groups`) are sorts, all with slopes [-1, 1]: the change of variables keeps the tie.

    Args:
        fb: the feedback form with slope intervals.
        tied: one multiplier a layer (`lipsdp-layer`) instead of one a neuron (`lipsdp-neuron`).
        free: the side whose entries have a weight each: the inputs for bounds from the inf-norm, ||y||_2^2 <=
            sum_k mu_k x_k^2, or the outputs, of the transposed network, for bounds to the 1-norm:
            sum_i y_i^2 / mu_i <= ||x||_2^2. The sum of the weights is minimised.
    Source: Fazlyab et al. 2019, arXiv:1906.04893, Theorem 2 and section 3.
    """
    thin = (fb.beta - fb.alpha) < _THINNEST
    alpha, beta = torch.where(thin, fb.alpha - _THINNEST / 2, fb.alpha), torch.where(thin, fb.beta + _THINNEST / 2, fb.beta)
    kept = _keeps_slopes(fb, alpha, beta)
    rows, out = (list(map(dict, fb.rows)), dict(fb.out)) if kept else _unit_slopes(fb, alpha, beta - alpha)
    squares = (beta - alpha) ** 2
    scaling = {k: t.to(squares) * squares[fb.slices[k]] for k, t in fb.scaling.items()}
    slopes = (alpha, beta) if kept else None
    layers = range(len(fb.sizes))
    index = torch.arange(sum(fb.sizes), device=alpha.device)
    reaching = [k for k in layers if k in out]
    seeing = [k for k in layers if -1 in rows[k]]
    forward = min(fb.inputs, sum(fb.sizes[k] for k in seeing) + (fb.outputs if -1 in out else 0))
    backward = min(fb.outputs, sum(fb.sizes[k] for k in reaching) + (fb.inputs if -1 in out else 0))
    transposed = backward < forward if free is None else free == "outputs"
    if not transposed:
        program = _program(fb.sizes, fb.inputs, rows, out, scaling, free is None, slopes)
        order, weights = index, squares
    else:
        # Layer k of the network is layer L - 1 - k of the program; Q' has the rows of Q for columns.
        last = len(fb.sizes) - 1
        flipped: list[dict[int, Tensor]] = [{} for _ in layers]
        for k in layers:
            for source, block in rows[k].items():
                if source >= 0:
                    flipped[last - source][last - k] = block.T
        for k in reaching:
            flipped[last - k][-1] = out[k].T
        outward = {last - k: rows[k][-1].T for k in seeing}
        if -1 in out:
            outward[-1] = out[-1].T
        # T B + B'T < 2T becomes B T^-1 + T^-1 B' < 2 T^-1.
        inverse = {last - k: 1 / t for k, t in scaling.items()}
        order = torch.cat([index[:0], *(index[s] for s in reversed(fb.slices))])
        weights = 1 / squares[order]
        slopes = None if slopes is None else (alpha[order], beta[order])
        program = _program(tuple(reversed(fb.sizes)), fb.outputs, flipped, outward, inverse, free is None, slopes)
    if kept:
        # t itself, and its mirror image rho / (t squares), are the multipliers of slopes that are kept.
        weights = weights if transposed else torch.ones_like(weights)
        squares = squares if transposed else torch.ones_like(squares)
    if tied:
        groups = torch.cat([index[:0], *(torch.full_like(index[:size], k) for k, size in enumerate(program.sizes))])
        uniform = bool((weights == weights[:1]).all())
        program = replace(program, groups=groups, weights=None if uniform else weights)
    elif fb.groups is not None:
        program = replace(program, groups=fb.groups[order].unique(return_inverse=True)[1])
    balance = _balance(fb)
    if fb.groups is not None:
        # Scaling old multipliers by the change of this keeps the tie.
        means = torch.zeros_like(balance).scatter_reduce_(0, fb.groups, balance, "mean", include_self=False)
        balance = means[fb.groups]
    return LipSDP(program, squares, order, transposed, balance)


def _balance(fb: Feedback) -> Tensor:
    incoming, outgoing = torch.zeros_like(fb.alpha), torch.zeros_like(fb.alpha)
    for here, row in zip((*fb.slices, None), (*fb.rows, fb.out), strict=True):
        for source, block in row.items():
            if here is not None:
                incoming[here] += torch.linalg.vector_norm(block, dim=1) ** 2
            if source >= 0:
                outgoing[fb.slices[source]] += torch.linalg.vector_norm(block, dim=0) ** 2
    ratio = (outgoing / incoming).sqrt()
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))


def _keeps_slopes(fb: Feedback, alpha: Tensor, beta: Tensor) -> bool:
    """Whether unit slopes would fill in so much that the slopes are better kept; thin ones, of huge multipliers, never are."""
    if fb.scaling or not bool(alpha.any()) or bool((beta - alpha < _STEADY * torch.maximum(alpha.abs(), beta.abs())).any()):
        return False
    # Every layer would see whatever the layers it sees do; what a block costs in the elimination, its pairs.
    seen: list[set[int]] = []
    for row in fb.rows:
        seen.append(set(row).union(*(seen[source] for source in row if source >= 0)))
    return sum(len(s) ** 2 for s in seen) > 2 * sum((len(row) + 1) ** 2 for row in fb.rows)


def _unit_slopes(fb: Feedback, alpha: Tensor, width: Tensor) -> tuple[list[dict[int, Tensor]], dict[int, Tensor]]:
    """Blocks of p and y in terms of x (-1) and u (0, 1, ...), where w = alpha p + width u.

    In an implicit layer p = r + W w = r + W (alpha p + width u), so that p = (I - W alpha)^-1 (r + W width u).
    """
    rows: list[dict[int, Tensor]] = []

    def substitute(blocks: Mapping[int, Tensor]) -> dict[int, Tensor]:
        result: dict[int, Tensor] = {}

        def add(source: int, block: Tensor) -> None:
            result[source] = result[source] + block if source in result else block

        for source, block in blocks.items():
            if source < 0:
                add(source, block)
                continue
            here = fb.slices[source]
            add(source, block * width[here])
            if bool(alpha[here].any()):
                for deeper, inner in rows[source].items():
                    add(deeper, (block * alpha[here]) @ inner)
        return result

    for k, row in enumerate(fb.rows):
        found = substitute({source: block for source, block in row.items() if source != k})
        if k in row:
            here = fb.slices[k]
            found[k] = row[k] * width[here]
            if bool(alpha[here].any()):
                system = torch.eye(fb.sizes[k], dtype=alpha.dtype, device=alpha.device) - row[k] * alpha[here]
                found = {source: torch.linalg.solve(system, block) for source, block in found.items()}
        rows.append(found)
    return rows, substitute(fb.out)


def _program(
    sizes: tuple[int, ...],
    channels: int,
    rows: list[dict[int, Tensor]],
    out: dict[int, Tensor],
    scaling: dict[int, Tensor],
    merge: bool,
    slopes: tuple[Tensor, Tensor] | None,
) -> SlopeProgram:
    """The program of blocks; channels that no neuron and no output can tell apart are merged by a QR, or else all are free."""
    seeing = [row[-1] for row in rows if -1 in row] + ([out[-1]] if -1 in out else [])
    height = sum(block.shape[0] for block in seeing)
    if merge and height < channels:
        # G = [A; D] = R' O' with O orthonormal: only O'x matters, of dimension `height`.
        reduced = torch.linalg.qr(torch.cat(seeing).T, mode="r").R.T.contiguous() if seeing else None
        start = 0
        fresh: list[dict[int, Tensor]] = []
        for row in rows:
            row = dict(row)
            if -1 in row and reduced is not None:
                size = row[-1].shape[0]
                row[-1] = reduced[start : start + size]
                start += size
            fresh.append(row)
        rows = fresh
        if -1 in out and reduced is not None:
            out = {**out, -1: reduced[start:]}
        channels = height
    return SlopeProgram(sizes, channels, tuple(rows), out, scaling=scaling, free=not merge, slopes=slopes)
