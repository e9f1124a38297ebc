"""The dual of a program over low-rank points: neurons are vectors on spheres, and passes forward and backward feasible.

The dual maximises <C0, Y> over Y >= 0 with <E, Y> = 1 and <S_g, Y> = 0 for every group g. With Y = X X' (Burer, Monteiro
2003) a coordinate is a vector of p entries, and (v - alpha z).(v - beta z) = 0 puts the neuron v on the sphere whose
diameter runs from alpha z to beta z, z = QX its pre-activation:

    v_j = m_j z_j + r_g u_j / sqrt(s_j),    r_g^2 = sum over g of s_j h_j^2 |z_j|^2,    sum over g of |u_j|^2 = 1,

m and h the middle and half the width of the slopes, s the weights. Whatever the u and the channels' vectors are, the value
|[C D] X|^2 is one that no multipliers undercut. Where u points along B / sqrt(s), B half the value's derivative in v, the
derivative of the Lagrangian vanishes, Z X = 0, for

    tau_g = |B / sqrt(s)|_g / (2 r_g).

Where every channel has a weight of its own, each is a sphere of its own, and |B| its weight.

The passes are matrix products alone, linear in depth. The sphere and the passes are ours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.programs.slope_program import SlopeProgram

FLAT = 1e-6
"""Radius, relative to the root mean square of its layer, that stands for smaller ones: a neuron that feels nothing may have
any large multiplier."""

LEAST = 1e-30
"""Multiplier of a neuron that the output does not feel, relative to the largest entry of S in its layer."""

LIGHTEST = 1e-9
"""Weight of a channel that nothing feels, relative to the mean."""

WIDENED, RENEWED = 0.01, 0.1
"""Size of new entries beside the old ones, and of random vectors beside an optimum's: what an ascent needs no longer dies out
in it, and a neighbour may need it."""


class Passes(NamedTuple):
    """One forward and one backward pass, as `lipguard.solvers.lbfgs` reads it.

    Attributes:
        value: minus the logarithm of the dual value; not finite beyond the range of floating point.
        gradient: of `value` in x, flat.
        curvature: the size of its second derivatives along single coordinates, flat.
        aligned: the point whose vectors point along the derivative: a fixed point is stationary, flat.
    """

    value: float
    gradient: Tensor
    curvature: Tensor
    aligned: Tensor


class Response(NamedTuple):
    """What the multipliers of a point are found from.

    Attributes:
        pull: |B / sqrt(s)| of each neuron's group, (n,), all later layers taken as stationary.
        radius: r of each neuron's group, (n,).
        weights: |B| of each channel, (r,), where channels are free: their multipliers; else None.
    """

    pull: Tensor
    radius: Tensor
    weights: Tensor | None = None


class Spheres:
    """The points of a program's dual: x of shape (N, p), flat, whose scale along each sphere is of no account."""

    def __init__(self, program: SlopeProgram) -> None:
        """The dual of a program whose layers do not respond to themselves."""
        self.program, self.channels = program, program.channels
        options = program.options
        self.root = torch.ones(program.neurons, **options) if program.weights is None else program.weights.sqrt()  # type: ignore[arg-type]
        if program.slopes is None:
            half = torch.full_like(self.root, 0.5)
            self.middle, self.width = half, half
        else:
            alpha, beta = program.slopes
            self.middle, self.width = (alpha + beta) / 2, (beta - alpha) / 2
        self.stretch = (self.root * self.width) ** 2
        self.layers = range(len(program.sizes))

    def random(self, rank: int) -> Tensor:
        """Vectors of so many entries, the same for every call, on whatever device."""
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(self.program.order * rank, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(self.root)

    def rank(self, x: Tensor) -> int:
        """Entries of a point's vectors."""
        return x.numel() // self.program.order

    def renewed(self, x: Tensor) -> Tensor:
        """A point beside this one that has lost no direction."""
        fresh = self.random(self.rank(x))
        return self._unit(x.to(fresh)) + RENEWED * self._unit(fresh)

    def widened(self, x: Tensor, more: int) -> Tensor:
        """The same vectors with more entries, small ones."""
        x = x.view(self.program.order, -1)
        size = WIDENED * x.square().mean().sqrt()
        return torch.cat([x, size * self.random(more).view(len(x), more)], 1).flatten()

    def passes(self, x: Tensor) -> Passes:
        """The dual value at x and its derivatives."""
        norms, unit, points, pre, radii = self._forward(x)
        value, pull = self._backward(unit, points, pre, radii, stationary=False)
        radii = torch.cat([radii, radii.new_ones(self.program.channels)])
        along = self._joint((pull * unit).sum(1))
        gradient = -2 * (radii / norms)[:, None] * (pull - along[:, None] * unit)
        lengths = self._joint(pull.square().sum(1)).sqrt()
        curvature = (2 * lengths * radii / norms**2)[:, None].expand_as(unit)
        aligned = torch.where((lengths > 0)[:, None], pull / lengths.clamp_min(_tiny(pull))[:, None], unit)
        return Passes(-math.log(max(value, 1e-300)), gradient.flatten(), curvature.flatten(), aligned.flatten())

    def response(self, x: Tensor) -> Response:
        """Pulls and radii of all neurons, each layer's u along its pull before the layers it hears are asked."""
        _, unit, points, pre, radii = self._forward(x)
        value, pull = self._backward(unit, points, pre, radii, stationary=True)
        lengths = value * self._joint(pull.square().sum(1)).sqrt()
        n = self.program.neurons
        return Response(lengths[:n], radii, lengths[n:] if self.program.free else None)

    def multipliers(self, response: Response, rise: float) -> tuple[Tensor, float]:
        """Multipliers near a point's, each layer's 1 + rise times as large as those behind it would have them, and their rho.

        Raises:
            SolverFailed: they lie outside the cone.
        """
        program = self.program
        t = torch.empty_like(response.pull)

        def inside(k: int, s: Tensor | None) -> Tensor:
            here = program.slices[k]
            own = torch.zeros_like(t[here]) if s is None else s.diagonal()
            radius = response.radius[here]
            least = max(FLAT * float(radius.square().mean().sqrt()), _tiny(t))
            tau = (1 + rise) ** (len(self.layers) - k) * response.pull[here] / (2 * radius.clamp_min(least))
            weight = 1 if program.weights is None else program.weights[here]
            # The diagonal of the pivot 2T - S is positive.
            floor = self._group((1 + rise) / 2 * own / weight, k, "amax")
            t[here] = weight * torch.maximum(tau, floor).clamp_min(LEAST * (float(own.max()) or 1.0))
            return t[here]

        schur = program.eliminate(inside).schur
        if schur is None:
            return t, math.inf
        if not bool(schur.isfinite().all()):
            raise SolverFailed("the multipliers overflow.")
        if response.weights is None:
            return t, float(torch.linalg.eigvalsh(schur)[-1])
        weights = response.weights.clamp_min(LIGHTEST * float(response.weights.mean()))
        root = weights.rsqrt()
        return t, float(torch.linalg.eigvalsh(root[:, None] * schur * root)[-1] * weights.sum())

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The lengths of x along its spheres, its u, the feasible points, their pre-activations and their spheres' radii."""
        program = self.program
        norms = self._norms(x)
        unit = x.view(program.order, -1) / norms[:, None]
        points = unit.clone()
        pre = torch.zeros_like(unit[: program.neurons])
        radii = torch.empty_like(self.root)
        for k, row in enumerate(program.rows):
            here = program.slices[k]
            z = pre[here]
            for source, block in row.items():
                z.addmm_(block, points[program.slices[source]])
            radii[here] = self._group(self.stretch[here] * z.square().sum(1), k).sqrt()
            points[here] = self.middle[here, None] * z + (radii[here] / self.root[here])[:, None] * unit[here]
        return norms, unit, points, pre, radii

    def _norms(self, x: Tensor) -> Tensor:
        squares = x.view(self.program.order, -1).square().sum(1)
        return self._joint(squares).sqrt().clamp_min(_tiny(x))

    def _unit(self, x: Tensor) -> Tensor:
        return (x.view(self.program.order, -1) / self._norms(x)[:, None]).flatten()

    def _backward(self, unit: Tensor, points: Tensor, pre: Tensor, radii: Tensor, stationary: bool) -> tuple[float, Tensor]:
        """The dual value, and half its logarithm's derivative in the scaled points sqrt(s) (v - m z).

        With `stationary` as if each u pointed along it: then it is the Lagrangian's.
        """
        program = self.program
        seen = torch.stack([block @ points[program.slices[source]] for source, block in program.out.items()]).sum(0)
        value = float(seen.square().sum())
        pull = torch.zeros_like(unit)
        for source, block in program.out.items():
            pull[program.slices[source]] = block.T @ seen / max(value, 1e-300)
        for k in reversed(self.layers):
            here = program.slices[k]
            pull[here] /= self.root[here, None]
            if stationary:
                along = self._group(pull[here].square().sum(1), k).sqrt()
            else:
                along = self._group((pull[here] * unit[here]).sum(1), k)
            outward = self.stretch[here] * along / radii[here].clamp_min(_tiny(radii))
            back = (self.middle * self.root)[here, None] * pull[here] + outward[:, None] * pre[here]
            for source, block in program.rows[k].items():
                pull[program.slices[source]].addmm_(block.T, back)
        return value, pull

    def _group(self, values: Tensor, k: int, how: str = "sum") -> Tensor:
        """The sum or the maximum over its group, for every neuron of layer k."""
        if self.program.groups is None:
            return values
        groups = self.program.groups[self.program.slices[k]]
        index = groups - groups.min()
        found = values.new_zeros(int(index.max()) + 1).scatter_reduce_(0, index, values, how, include_self=False)
        return found[index]

    def _joint(self, values: Tensor) -> Tensor:
        """The sum over its sphere, for every coordinate: groups of neurons, and all channels unless they are free."""
        neurons, channels = values[: self.program.neurons], values[self.program.neurons :]
        groups = self.program.groups
        if groups is not None:
            neurons = values.new_zeros(int(groups.max()) + 1).index_add_(0, groups, neurons)[groups]
        if not self.program.free:
            channels = channels.sum(0, keepdim=True).expand_as(channels)
        return torch.cat([neurons, channels])


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny ** 0.5
