"""Lower bounds: ascent on the Jacobian's norm over inputs and directions, with a witness the checker accepts.

For ReLU networks the Jacobian is piecewise constant, so its norm has no gradient. The slope of a neuron is therefore
smoothed over a window, phi_h'(z) = (phi(z + h) - phi(z - h)) / 2h, which is differentiable in z and tends to phi';
the windows shrink as the ascent goes on. What is reported is the true Jacobian at the best point.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lipguard.bounds.method import PAIRS, Method, Pair
from lipguard.certificate import Certificate, Domain, Query, Side, Witness
from lipguard.network import Activation, Adjoint, Affine, Coupled, Implicit, Input, Linear, Network, Sum, Walk
from lipguard.network.activations import Elementwise
from lipguard.programs.rewriting import elementwise
from lipguard.verify import verify

_LARGEST = 2**26
"""Numbers, 512 MiB, up to which the Jacobians of all starts are formed."""

_POWER_STEPS = 10


@dataclass(frozen=True, eq=False)
class Points:
    """Inputs (k, d) and directions (k, d) from which a later ascent starts."""

    inputs: Tensor
    directions: Tensor


@dataclass(frozen=True)
class Sampling(Method):
    """Ascent from several inputs at once.

    Attributes:
        starts: inputs ascended in parallel.
        steps: ascent steps.
        seed: of the generator that draws the starts; the global random state is not touched.
    """

    side: ClassVar[Side] = "lower"
    norms: ClassVar[tuple[Pair, ...]] = tuple((p, q) for p, q in PAIRS if (p, q) == (2.0, 2.0) or p == 1 or q == math.inf)
    local: ClassVar[tuple[Pair, ...]] = norms

    starts: int = 128
    steps: int = 80
    seed: int = 0
    time_limit: float | None = None

    def __call__(self, network: Network, query: Query, state: Points | None = None) -> tuple[Certificate, Points]:
        """The verified lower bound at the best point found, and the points for the next call.

        Raises:
            UnsupportedQuery: a pair of norms other than (1, q), (2, 2), (p, inf).
            InvalidDomain: the domain does not fit the network.
        """
        began = time.perf_counter()
        if query.norm not in self.norms:
            raise self.unsupported(query, "lipsdp-neuron")
        deadline = math.inf if self.time_limit is None else began + self.time_limit
        x, v = self._start(network, query.domain, state, _affordable(network, self.starts))
        neurons = elementwise(network)
        with torch.inference_mode(False), torch.enable_grad():
            x, v = _ascend(neurons, query, x, v, self.steps, deadline)
        with torch.no_grad():
            # The Jacobians of all starts at once, where they and their way back through the widest layer fit.
            fits = len(x) * neurons.outputs * max(neurons.sizes) <= _LARGEST
            evaluate = _jacobian_norms if fits else _norms_along
            norms, directions = evaluate(neurons, x, v, query.norm)
        best = int(norms.argmax())
        witness = Witness(x[best], directions[best])
        proposed = Certificate(float(norms[best]), "lower", query.norm, query.domain, network.digest, "sampling", witness)
        order = norms.argsort(descending=True)
        certificate = replace(verify(network, proposed), seconds=time.perf_counter() - began)
        return certificate, Points(x[order], directions[order])

    def _start(self, network: Network, domain: Domain | None, state: Points | None, starts: int) -> tuple[Tensor, Tensor]:
        # Drawn on the CPU, so that every device starts from the same points.
        generator = torch.Generator("cpu").manual_seed(self.seed)
        options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        d = network.inputs
        if domain is not None:
            x = domain.sample(starts, d, generator)
        else:
            # All of R^d: scales from 1/10 to 100, since biases decide where the regions lie.
            scales = torch.logspace(-1, 2, starts, **options)[:, None]
            x = torch.randn(starts, d, generator=generator, **options) * scales
        v = torch.randn(starts, d, generator=generator, **options)
        if state is not None and state.inputs.shape[1] == d:
            keep = min(len(state.inputs), max(1, starts // 2))
            x[:keep], v[:keep] = state.inputs[:keep], state.directions[:keep]
            if domain is not None:
                x = domain.project(x)
        return x.to(network.device), torch.nn.functional.normalize(v, dim=1).to(network.device)


def _affordable(network: Network, starts: int) -> int:
    """Fewer starts where an implicit layer takes a matrix factorisation for each of them in every step."""
    cubes = sum(network.sizes[i] ** 3 for i, node in enumerate(network.nodes) if node.loop is not None)
    return starts if cubes == 0 else max(min(starts, 8), min(starts, int(_CUBES / cubes)))


_CUBES = 5e6
"""Cubes of the sizes of implicit layers, times the starts: about 20 ms a step."""


def _ascend(network: Network, query: Query, x: Tensor, v: Tensor, steps: int, deadline: float) -> tuple[Tensor, Tensor]:
    """Adam-like ascent of log ||J_h(x) v|| in x with sign-normalised steps, a power iteration on v in every step."""
    best = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    best_x, best_v = x.clone(), v.clone()
    # One window and step length per sample, in proportion to its own scale.
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-3)
    if query.domain is not None:
        lower, upper = (b.to(x) for b in query.domain.bounds(x.shape[1]))
        scale = ((upper - lower) / 2).amax().clamp_min(1e-12).expand_as(scale)
    for step in range(steps):
        if time.perf_counter() > deadline:
            break
        window = 0.3 * 0.9**step
        x = x.detach().requires_grad_(True)
        v = v.detach().requires_grad_(True)
        y, true = _forward(network, x, v, window)
        with torch.no_grad():
            attained = torch.linalg.vector_norm(true, query.norm[1], dim=1)
            better = attained > best
            best = torch.where(better, attained, best)
            best_x[better], best_v[better] = x[better].detach(), v[better].detach()
        if step == steps - 1:
            break
        gain = torch.linalg.vector_norm(y, query.norm[1], dim=1)
        grad_x, grad_v = torch.autograd.grad(gain.clamp_min(1e-300).log().sum(), (x, v), allow_unused=True)
        with torch.no_grad():
            if grad_v is not None:
                v = _dual_direction(grad_v, v.detach(), query.norm[0])
            if grad_x is not None:
                length = torch.linalg.vector_norm(grad_x, dim=1, keepdim=True).clamp_min(1e-300)
                x = x + 0.3 * 0.93**step * scale * math.sqrt(x.shape[1]) * grad_x / length
                x = x if query.domain is None else query.domain.project(x)
    return best_x, best_v


def _dual_direction(gradient: Tensor, fallback: Tensor, p: float) -> Tensor:
    """The unit vector of the p-norm that the gradient points to most, row by row."""
    if p == 2:
        step = torch.nn.functional.normalize(gradient, dim=1)
    elif p == math.inf:
        step = gradient.sign()
    else:
        top = gradient.abs().argmax(1, keepdim=True)
        step = torch.zeros_like(gradient).scatter_(1, top, gradient.gather(1, top).sign())
    alive = gradient.abs().amax(1, keepdim=True) > 0
    return torch.where(alive, step, fallback)


def _forward(network: Network, x: Tensor, v: Tensor, window: float) -> tuple[Tensor, Tensor]:
    """J_h(x) v with smoothed slopes, differentiable, and J(x) v with the true ones."""
    _, smooth, true = network.fold(_Smoothed(x, v, window))[-1]
    return smooth, true


_Three = tuple[Tensor, Tensor, Tensor]
"""A value, J_h v and J v, each (k, size)."""


class _Smoothed(Walk[_Three]):
    def __init__(self, x: Tensor, v: Tensor, window: float) -> None:
        self.start = (x, v, v.detach())
        self.window = window

    def input(self, i: int, node: Input) -> _Three:
        return self.start

    def affine(self, i: int, node: Affine, read: _Three) -> _Three:
        return node.value(read[0]), node.operator(read[1]), node.operator(read[2])

    def activation(self, i: int, node: Activation, read: _Three) -> _Three:
        z, phi = read[0], node.function
        smooth, true = self.slopes(phi, z)
        return phi(z), smooth * read[1], true * read[2]

    def implicit(self, i: int, node: Implicit, read: _Three) -> _Three:
        z = node.value(read[0])
        smooth, true = self.slopes(node.function, node.operator(z) + read[0])
        return z, response(node, smooth, read[1]), response(node, true, read[2])

    def coupled(self, i: int, node: Coupled, read: _Three) -> _Three:
        z, smooth, true = read
        return node.value(z), node.function.along(z, smooth), node.function.along(z, true)

    def total(self, i: int, node: Sum, *read: _Three) -> _Three:
        value, smooth, true = (torch.stack(part).sum(0) for part in zip(*read, strict=True))
        return value, smooth, true

    def slopes(self, phi: Elementwise, p: Tensor) -> tuple[Tensor, Tensor]:
        """Smoothed and true slopes at the pre-activations p."""
        h = self.window * p.detach().abs().mean(1, keepdim=True).clamp_min(1e-12)
        low, high = phi.slope_range(p.detach(), p.detach())
        return (phi(p + h) - phi(p - h)) / (2 * h), (low + high) / 2


def response(node: Implicit, slopes: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """(I - D W)^-1 D x for slopes (k, n) and x (k, n); transposed: x (I - D W)^-1 D for x (k, m, n)."""
    weight = node.operator.dense()
    system = torch.eye(len(weight), dtype=weight.dtype, device=weight.device) - slopes[:, :, None] * weight
    if transposed:
        return torch.linalg.solve(system, x.expand(len(system), -1, -1), left=False) * slopes[:, None, :]
    return torch.linalg.solve(system, slopes * x)


def slopes_at(network: Network, x: Tensor) -> list[Tensor]:
    """The slope of every neuron at the inputs x (k, d), one (k, size) tensor for each activation node; mean at a kink.

    For a smooth group of tied neurons its pre-activations instead, which determine its Jacobian.
    """
    values = network.values(x)
    result = []
    for i in network.activations:
        node, function = network.nodes[i], network.nodes[i].elementwise
        p = values[node.sources[0]]
        if function is None:
            result.append(p)
            continue
        if node.loop is not None:
            p = p + node.loop(values[i])
        low, high = function.slope_range(p, p)
        result.append((low + high) / 2)
    return result


def jacobian(network: Network, slopes: list[Tensor], rows: Tensor | None = None) -> Tensor:
    """Jacobians (k, m, d) for given slopes of the neurons, built from the output backwards: m rows are fewer than d columns.

    With `rows`, (k, r, m): the products rows J, (k, r, d).
    """
    k = len(slopes[0]) if slopes else 1
    if rows is None:
        rows = torch.eye(network.outputs, dtype=torch.float64, device=network.device).expand(k, -1, -1)
    back = network.pull(_Back(network, slopes), rows)
    return back[0] if 0 in back else torch.zeros(k, rows.shape[1], network.inputs, dtype=torch.float64, device=network.device)


class _Back(Adjoint):
    """Rows (k, r, size) backwards at given slopes of the neurons."""

    def __init__(self, network: Network, slopes: list[Tensor]) -> None:
        self.slopes = dict(zip(network.activations, slopes, strict=True))

    def activation(self, i: int, node: Activation, read: Tensor) -> Tensor:
        return read * self.slopes[i][:, None, :]

    def implicit(self, i: int, node: Implicit, read: Tensor) -> Tensor:
        return response(node, self.slopes[i], read, transposed=True)

    def coupled(self, i: int, node: Coupled, read: Tensor) -> Tensor:
        return node.function.back(self.slopes[i][:, None, :], read)


def _norms_along(network: Network, x: Tensor, v: Tensor, norm: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """||J(x) v||_q / ||v||_p for every row of x, without the Jacobian; v is improved by power iterations if both norms are 2."""
    p, q = norm
    slopes = slopes_at(network, x)
    image = _tangent(network, slopes, v)
    for _ in range(_POWER_STEPS if (p, q) == (2.0, 2.0) else 0):
        back = jacobian(network, slopes, image[:, None, :])[:, 0]
        length = torch.linalg.vector_norm(back, dim=1, keepdim=True)
        v = torch.where(length > 0, back / length.clamp_min(1e-300), v)
        image = _tangent(network, slopes, v)
    return torch.linalg.vector_norm(image, q, dim=1) / torch.linalg.vector_norm(v, p, dim=1).clamp_min(1e-300), v


def _tangent(network: Network, slopes: list[Tensor], v: Tensor) -> Tensor:
    """J v (k, m) for directions v (k, d) and given slopes of the neurons."""
    return network.fold(_Tangent(network, slopes, v))[-1]


class _Tangent(Linear):
    """Directions (k, size) forwards at given slopes of the neurons."""

    def __init__(self, network: Network, slopes: list[Tensor], v: Tensor) -> None:
        self.slopes = dict(zip(network.activations, slopes, strict=True))
        self.start = v

    def input(self, i: int, node: Input) -> Tensor:
        return self.start

    def activation(self, i: int, node: Activation, read: Tensor) -> Tensor:
        return self.slopes[i] * read

    def implicit(self, i: int, node: Implicit, read: Tensor) -> Tensor:
        return response(node, self.slopes[i], read)

    def coupled(self, i: int, node: Coupled, read: Tensor) -> Tensor:
        return node.function.along(self.slopes[i], read)


def _jacobian_norms(network: Network, x: Tensor, v: Tensor, norm: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """||J(x)||_{p -> q} for every row of x, in floating point, and the directions that attain it."""
    p, q = norm
    rows = jacobian(network, slopes_at(network, x)).expand(len(x), -1, -1)
    if p == 1:  # the largest q-norm of a column
        lengths = torch.linalg.vector_norm(rows, q, dim=1)
        value, column = lengths.max(1)
        return value, torch.nn.functional.one_hot(column, x.shape[1]).to(torch.float64)
    if (p, q) == (2.0, 2.0):
        gram = rows @ rows.mT
        values, vectors = torch.linalg.eigh(gram)
        direction = (rows.mT @ vectors[:, :, -1:])[:, :, 0]
        length = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        # A vanishing Jacobian has no direction of its own; any will do.
        return values[:, -1].clamp_min(0).sqrt(), torch.where(length > 0, direction, v)
    # q = inf: the largest dual norm of a row.
    dual = 1.0 if p == math.inf else 2.0
    value, row = torch.linalg.vector_norm(rows, dual, dim=2).max(1)
    chosen = rows[torch.arange(len(x), device=x.device), row]
    direction = torch.where(chosen >= 0, 1.0, -1.0) if p == math.inf else chosen
    alive = direction.abs().amax(1, keepdim=True) > 0
    return value, torch.where(alive, direction.to(torch.float64), v)
