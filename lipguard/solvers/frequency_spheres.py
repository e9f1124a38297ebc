"""`spheres` over frequencies: the dual of a convolutional network's program, its points as vectors at every frequency.

A multiplier belongs to a channel at all frequencies, so that the dual has one constraint, one sphere, for all of them:

    v = z / 2 + r_g u,    r_g^2 = 1/4 sum of |z|^2,    sum of |u|^2 = 1,

sums over the group's components at all frequencies, f and -f counted. The passes multiply batches of blocks, and never
factorise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.programs.frequency import Blocks, FrequencyProgram
from lipguard.solvers.spheres import FLAT, LEAST, RENEWED, WIDENED, Passes, Response

Parts = dict[int, Tensor]
"""By layer, and -1 for the channels, values (F, n, p) at its frequencies."""


class FrequencySpheres:
    """The points of a frequency program's dual: flat vectors of real and imaginary parts, whose scale is of no account."""

    def __init__(self, program: FrequencyProgram, single: bool = False) -> None:
        """The dual of a program, its passes in single precision or not; the multipliers are found in double."""
        self.double = program
        self.sizes, self.out = (dict.fromkeys(range(len(program.rows)), 1.0), 1.0) if not single else _sizes(program)
        self.program = program = program if not single else program.single(self.sizes, self.out)
        self.tiny = torch.finfo(program.counts[0].dtype).tiny ** 0.5
        self.layers = range(len(program.rows))
        self.channels = next(b.shape[-1] for row in (*program.rows, program.out) for s, b in row.items() if s == -1)
        sizes = {k: len(program.groups[k]) for k in self.layers} | {-1: self.channels}
        vectors = len(program.counts) - 1 if program.vectors else -1
        self.real = {k: program.levels[k] == vectors for k in sizes}
        # Pairs of real and imaginary parts first: they start at even places.
        order = sorted(sizes, key=self.real.__getitem__)
        self.shapes = {k: (len(program.counts[program.levels[k]]), sizes[k]) for k in order}
        self.counts = {k: program.counts[program.levels[k]][:, None, None] for k in order}

    def random(self, rank: int) -> Tensor:
        """Vectors of so many entries, the same for every call; real where f = -f."""
        generator = torch.Generator("cpu").manual_seed(0)
        parts = {}
        for k, shape in self.shapes.items():
            part = torch.randn(*shape, rank, 1 if self.real[k] else 2, generator=generator, dtype=torch.float64, device="cpu")
            part = part.to(self.counts[k])
            if not self.real[k]:
                part[..., 1] *= self.counts[k] == 2
            parts[k] = part[..., 0] if self.real[k] else torch.view_as_complex(part)
        return self._flat(parts)

    def rank(self, x: Tensor) -> int:
        """Entries of a point's vectors."""
        return x.numel() // sum(f * n * (1 if self.real[k] else 2) for k, (f, n) in self.shapes.items())

    def renewed(self, x: Tensor) -> Tensor:
        """A point beside this one that has lost no direction."""
        fresh = self.random(self.rank(x))
        return self._unit(x.to(fresh)) + RENEWED * self._unit(fresh)

    def widened(self, x: Tensor, more: int) -> Tensor:
        """The same vectors with more entries, small ones."""
        new = self._parts(WIDENED * x.square().mean().sqrt() * self.random(more))
        return self._flat({k: torch.cat([part, new[k]], 2) for k, part in self._parts(x).items()})

    def passes(self, x: Tensor) -> Passes:
        """The dual value at x and its derivatives."""
        norms, unit, points, pre, radii = self._forward(x)
        value, pull = self._backward(unit, points, pre, radii, stationary=False)
        gradient, curvature, aligned = {}, {}, {}
        for k, u in unit.items():
            length, along = self._length(k, pull[k]), self._sum(k, pull[k], u)
            factor = 2 * self.counts[k] * radii[k] / norms[k]
            gradient[k] = -factor * (pull[k] - along * u)
            own = (factor * length / norms[k]).expand(u.shape)
            curvature[k] = own if self.real[k] else torch.complex(own, own)
            aligned[k] = torch.where(length > 0, pull[k] / length.clamp_min(self.tiny), u)
        logarithm = math.log(max(value, 1e-300)) + 2 * math.log(self.out)
        return Passes(-logarithm, self._flat(gradient), self._flat(curvature), self._flat(aligned))

    def response(self, x: Tensor) -> Response:
        """Pulls and radii of all components by layer, each layer's u along its pull before the layers it hears are asked."""
        _, unit, points, pre, radii = self._forward(x)
        value, pull = self._backward(unit, points, pre, radii, stationary=True)
        # Of v / s, z / s and y / c are found pull s / c^2 and radius / s.
        factor = value * self.out**2
        pulls = [factor / self.sizes[k] * self._length(k, pull[k]).flatten().double() for k in self.layers]
        return Response(torch.cat(pulls), torch.cat([self.sizes[k] * radii[k].flatten().double() for k in self.layers]))

    def multipliers(self, response: Response, rise: float) -> tuple[Tensor, float]:
        """Multipliers near a point's, each layer's 1 + rise times as large as those behind it would have them, and their rho.

        Raises:
            SolverFailed: they lie outside the cone.
        """
        program = self.double
        tau = response.pull.new_ones(program.multipliers)
        sizes = [self.shapes[k][1] for k in self.layers]
        pulls, radii = response.pull.split(sizes), response.radius.split(sizes)

        def inside(k: int, s: Tensor | None) -> Tensor:
            index = program.groups[k]
            own = tau.new_zeros(len(index)) if s is None else s.diagonal(dim1=1, dim2=2).real.amax(0).to(tau)
            least = max(FLAT * float(radii[k].square().mean().sqrt()), self.tiny)
            wanted = (1 + rise) ** (len(self.layers) - k) * pulls[k] / (2 * radii[k].clamp_min(least))
            # The diagonal of the pivot 2T - S is positive.
            wanted = torch.maximum(wanted, (1 + rise) / 2 * own).clamp_min(LEAST * (float(own.max()) or 1.0))
            tau.scatter_reduce_(0, index, wanted, "amax", include_self=False)
            return tau[index]

        return tau, program.rho(inside)

    def _forward(self, x: Tensor) -> tuple[Parts, Parts, Parts, Parts, Parts]:
        """The lengths of x along its spheres, its u, the feasible points, their pre-activations and their spheres' radii."""
        parts = self._parts(x)
        norms = {k: self._length(k, part).clamp_min(self.tiny) for k, part in parts.items()}
        unit = {k: part / norms[k] for k, part in parts.items()}
        points, pre, radii = {-1: unit[-1]}, {}, {-1: torch.ones_like(norms[-1])}
        for k in self.layers:
            pre[k] = self._applied(self.program.rows[k], points, self.program.levels[k])
            if pre[k] is None:
                pre[k] = torch.zeros_like(unit[k])
            radii[k] = self._length(k, pre[k]) / 2
            points[k] = pre[k] / 2 + radii[k] * unit[k]
        return norms, unit, points, pre, radii

    def _unit(self, x: Tensor) -> Tensor:
        return self._flat({k: part / self._length(k, part).clamp_min(self.tiny) for k, part in self._parts(x).items()})

    def _backward(self, unit: Parts, points: Parts, pre: Parts, radii: Parts, stationary: bool) -> tuple[float, Parts]:
        """The dual value, and half its logarithm's derivative in the v - z / 2; with `stationary` the Lagrangian's."""
        level = self.program.levels[-2]
        seen = self._applied(self.program.out, points, level)
        pull = {k: torch.zeros_like(u) for k, u in unit.items()}
        if seen is None:
            return 0.0, pull
        value = float((self.program.counts[level][:, None, None] * _products(seen, seen)).sum())
        self._return(self.program.out, seen / max(value, 1e-300), level, pull)
        for k in reversed(self.layers):
            along = self._length(k, pull[k]) if stationary else self._sum(k, pull[k], unit[k])
            back = pull[k] / 2 + along / (4 * radii[k].clamp_min(self.tiny)) * pre[k]
            self._return(self.program.rows[k], back, self.program.levels[k], pull)
        return value, pull

    def _applied(self, blocks: Blocks, points: Parts, level: int) -> Tensor | None:
        """The sum of blocks at the frequencies of a level times the points of their sources."""
        total = None
        for source, block in blocks.items():
            values = points[source][self.program.descent(level, self.program.levels[source])]
            part = block @ values.to(block.dtype)
            total = part if total is None else total + part
        return total

    def _return(self, blocks: Blocks, back: Tensor, level: int, pull: Parts) -> None:
        """Add what `back` at the frequencies of a level pulls on the sources of the blocks."""
        for source, block in blocks.items():
            # (back* B)* is B* back, and conjugates the smaller of the two.
            part = (back.to(block.dtype).mH @ block).mH
            pull[source] += self.program.gathered(part, level, self.program.levels[source])

    def _sum(self, k: int, a: Tensor, b: Tensor) -> Tensor:
        """The inner product over its sphere, for every component of a layer, (1, n, 1)."""
        values = (self.counts[k] * _products(a, b)).sum((0, 2))
        if k < 0:
            return values.sum().expand(1, len(values), 1)
        groups = self.program.groups[k]
        return values.new_zeros(self.program.multipliers).index_add_(0, groups, values)[groups][None, :, None]

    def _length(self, k: int, a: Tensor) -> Tensor:
        return self._sum(k, a, a).sqrt()

    def _parts(self, x: Tensor) -> Parts:
        rank = self.rank(x)
        parts, start = {}, 0
        for k, (f, n) in self.shapes.items():
            size = f * n * rank * (1 if self.real[k] else 2)
            part = x[start : start + size]
            parts[k] = part.view(f, n, rank) if self.real[k] else torch.view_as_complex(part.view(f, n, rank, 2))
            start += size
        return parts

    def _flat(self, parts: Parts) -> Tensor:
        """What `_parts` takes apart."""
        ordered = ((parts[k], self.real[k]) for k in self.shapes)
        return torch.cat([(part if real else torch.view_as_real(part.contiguous())).flatten() for part, real in ordered])


def _sizes(program: FrequencyProgram) -> tuple[dict[int, float], float]:
    """The size of every layer's values, and of the outputs', at a point that is not quite random; powers of two."""
    dual = FrequencySpheres(program)
    x = dual.passes(dual.passes(dual.random(1)).aligned).aligned
    radii, value = dual._forward(x)[-1], math.exp(-dual.passes(x).value)

    def power(size: float) -> float:
        return 2.0 ** round(math.log2(size)) if 0 < size < math.inf else 1.0

    return {k: power(float(radii[k].mean())) for k in dual.layers}, power(math.sqrt(value))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Re a conj(b), entry by entry."""
    return a.real * b.real + a.imag * b.imag if a.is_complex() else a * b
