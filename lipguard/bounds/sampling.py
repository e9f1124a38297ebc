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
from lipguard.network import Activation, Affine, Implicit, Input, Network, Sum
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
    cubes = sum(network.sizes[i] ** 3 for i, node in enumerate(network.nodes) if isinstance(node, Implicit))
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
    values: list[Tensor] = []
    smooth: list[Tensor] = []
    true: list[Tensor] = []
    for node in network.nodes:
        match node:
            case Input():
                values.append(x)
                smooth.append(v)
                true.append(v.detach())
            case Affine():
                z = node.operator(values[node.source])
                values.append(z if node.bias is None else z + node.bias)
                smooth.append(node.operator(smooth[node.source]))
                true.append(node.operator(true[node.source]))
            case Activation():
                z, phi = values[node.source], node.function
                h = window * z.detach().abs().mean(1, keepdim=True).clamp_min(1e-12)
                values.append(phi(z))
                smooth.append((phi(z + h) - phi(z - h)) / (2 * h) * smooth[node.source])
                low, high = phi.slope_range(z.detach(), z.detach())
                true.append((low + high) / 2 * true[node.source])
            case Implicit():
                z, phi = node.value(values[node.source]), node.function
                p = node.operator(z) + values[node.source]
                h = window * p.detach().abs().mean(1, keepdim=True).clamp_min(1e-12)
                low, high = phi.slope_range(p.detach(), p.detach())
                values.append(z)
                smooth.append(response(node, (phi(p + h) - phi(p - h)) / (2 * h), smooth[node.source]))
                true.append(response(node, (low + high) / 2, true[node.source]))
            case Sum():
                values.append(torch.stack([values[s] for s in node.sources]).sum(0))
                smooth.append(torch.stack([smooth[s] for s in node.sources]).sum(0))
                true.append(torch.stack([true[s] for s in node.sources]).sum(0))
    return smooth[-1], true[-1]


def response(node: Implicit, slopes: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """(I - D W)^-1 D x for slopes (k, n) and x (k, n); transposed: x (I - D W)^-1 D for x (k, m, n)."""
    weight = node.operator.dense()
    system = torch.eye(len(weight), dtype=weight.dtype, device=weight.device) - slopes[:, :, None] * weight
    if transposed:
        return torch.linalg.solve(system, x.expand(len(system), -1, -1), left=False) * slopes[:, None, :]
    return torch.linalg.solve(system, slopes * x)


def slopes_at(network: Network, x: Tensor) -> list[Tensor]:
    """The slope of every neuron at the inputs x (k, d), one (k, size) tensor for each activation node; mean at a kink."""
    values = network.values(x)
    result = []
    for i in network.activations:
        node = network.nodes[i]
        assert isinstance(node, Activation | Implicit)
        p = values[node.source]
        if isinstance(node, Implicit):
            p = p + node.operator(values[i])
        low, high = node.function.slope_range(p, p)
        result.append((low + high) / 2)
    return result


def jacobian(network: Network, slopes: list[Tensor], rows: Tensor | None = None) -> Tensor:
    """Jacobians (k, m, d) for given slopes of the neurons, built from the output backwards: m rows are fewer than d columns.

    With `rows`, (k, r, m): the products rows J, (k, r, d).
    """
    k = len(slopes[0]) if slopes else 1
    if rows is None:
        rows = torch.eye(network.outputs, dtype=torch.float64, device=network.device).expand(k, -1, -1)
    adjoint: dict[int, Tensor] = {len(network.nodes) - 1: rows}
    position = {i: j for j, i in enumerate(network.activations)}

    def add(i: int, value: Tensor) -> None:
        adjoint[i] = adjoint[i] + value if i in adjoint else value

    for i in reversed(range(len(network.nodes))):
        if i not in adjoint:
            continue
        node, g = network.nodes[i], adjoint[i]
        match node:
            case Affine():
                add(node.source, node.operator.transpose()(g))
            case Activation():
                add(node.source, g * slopes[position[i]][:, None, :])
            case Implicit():
                add(node.source, response(node, slopes[position[i]], g, transposed=True))
            case Sum():
                for source in node.sources:
                    add(source, g)
            case Input():
                pass
    return (
        adjoint[0] if 0 in adjoint else torch.zeros(k, rows.shape[1], network.inputs, dtype=torch.float64, device=network.device)
    )


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
    values: list[Tensor] = []
    position = {i: j for j, i in enumerate(network.activations)}
    for i, node in enumerate(network.nodes):
        match node:
            case Input():
                values.append(v)
            case Affine():
                values.append(node.operator(values[node.source]))
            case Activation():
                values.append(slopes[position[i]] * values[node.source])
            case Implicit():
                values.append(response(node, slopes[position[i]], values[node.source]))
            case Sum():
                values.append(torch.stack([values[s] for s in node.sources]).sum(0))
    return values[-1]


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
