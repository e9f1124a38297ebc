"""Exact constants of very small networks in rational arithmetic, by code that shares nothing with the library.

Every sign pattern is followed neuron by neuron; whether its region has a point is decided by Fourier-Motzkin
elimination over fractions, with strict and weak inequalities told apart. For 1 to 3 inputs and about ten neurons.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from lipguard import Ball, Box
from lipguard.network import Activation, Affine, Dense, Input, Network, Sum
from lipguard.network.activations import PiecewiseLinear


@dataclass
class Layer:
    """z = weight h + skip x + bias, followed by the activation; skip may be None."""

    weight: np.ndarray
    bias: np.ndarray
    breaks: tuple[float, ...] = (0.0,)
    slopes: tuple[float, ...] = (0.0, 1.0)
    value: float = 0.0
    skip: np.ndarray | None = None


@dataclass
class Net:
    """Layers, then y = weight h + skip x."""

    layers: list[Layer]
    weight: np.ndarray
    skip: np.ndarray | None = None

    @property
    def inputs(self):
        return self.layers[0].weight.shape[1]

    def network(self) -> Network:
        nodes: list = [Input(self.inputs)]

        def affine(source, weight, bias, skip):
            bias = None if bias is None else torch.tensor(bias, dtype=torch.float64)
            nodes.append(Affine(source, Dense(torch.tensor(weight, dtype=torch.float64)), bias))
            if skip is not None:
                main = len(nodes) - 1
                nodes.append(Affine(0, Dense(torch.tensor(skip, dtype=torch.float64)), None))
                nodes.append(Sum((main, len(nodes) - 1)))

        for layer in self.layers:
            affine(len(nodes) - 1, layer.weight, layer.bias, layer.skip)
            breaks, slopes = (torch.tensor(v, dtype=torch.float64) for v in (layer.breaks, layer.slopes))
            function = PiecewiseLinear("test", breaks, slopes, layer.value)
            nodes.append(Activation(len(nodes) - 1, function))
        affine(len(nodes) - 1, self.weight, None, self.skip)
        return Network(tuple(nodes))


def _fractions(array):
    return [[Fraction(float(v)) for v in row] for row in np.atleast_2d(array)]


def feasible(system):
    """Whether rows (coefficients, right, strict) meaning coefficients x < or <= right have a common point."""
    if not system:
        return True
    system = _clean(system)
    for _ in range(len(system[0][0]) if system else 0):
        # The variable that makes the fewest new rows goes first.
        def growth(j, rows=system):
            return sum(r[0][j] > 0 for r in rows) * sum(r[0][j] < 0 for r in rows)

        live = [j for j in range(len(system[0][0])) if any(r[0][j] for r in system)]
        if not live:
            break
        j = min(live, key=growth)
        keep = [r for r in system if r[0][j] == 0]
        above = [r for r in system if r[0][j] > 0]
        below = [r for r in system if r[0][j] < 0]
        for (a, b, s), (c, e, t) in itertools.product(above, below):
            p, q = a[j], -c[j]
            keep.append(([q * x + p * y for x, y in zip(a, c, strict=True)], q * b + p * e, s or t))
        system = _clean(keep)
        if not system:
            return True
    return all(b > 0 if s else b >= 0 for _, b, s in system)


def _clean(system):
    """One row for each direction: the tightest."""
    best = {}
    for row, right, strict in system:
        scale = max((abs(v) for v in row), default=0)
        key = tuple(v / scale for v in row) if scale else tuple(row)
        right = right / scale if scale else right
        old = best.get(key)
        if old is None or right < old[0] or (right == old[0] and strict):
            best[key] = (right, strict)
    return [(list(k), b, s) for k, (b, s) in best.items()]


def domain_rows(domain, d, strict):
    """Linear rows of a domain, and (centre, radius) of a 2-ball or None."""
    eye = [[Fraction(int(i == j)) for j in range(d)] for i in range(d)]
    if domain is None:
        return [], None
    if isinstance(domain, Ball) and domain.norm == 1.0:
        c = [Fraction(float(v)) for v in domain.checked_center(d)]
        signs = [[Fraction(s) for s in g] for g in itertools.product((1, -1), repeat=d)]
        return [(g, Fraction(domain.radius) + sum(a * b for a, b in zip(g, c, strict=True)), strict) for g in signs], None
    if isinstance(domain, Ball) and domain.norm == 2.0 and d > 1:
        return [], ([Fraction(float(v)) for v in domain.checked_center(d)], Fraction(domain.radius))
    if isinstance(domain, Ball):
        c = [Fraction(float(v)) for v in domain.checked_center(d)]
        low, high = [v - Fraction(domain.radius) for v in c], [v + Fraction(domain.radius) for v in c]
    else:
        low, high = ([Fraction(float(v)) for v in end] for end in domain.bounds(d))
    rows = [(eye[j], high[j], strict) for j in range(d)]
    return rows + [([-v for v in eye[j]], -low[j], strict) for j in range(d)], None


def meets_ball(system, center, radius, strict):
    """Whether the polytope has a point nearer to the centre than the radius (at most the radius, if not strict).

    The nearest point lies on the intersection of at most d of the hyperplanes and is the projection on it.
    """
    d = len(center)
    rows = [(a, b) for a, b, _ in system]
    best = None
    for size in range(d + 1):
        for chosen in itertools.combinations(rows, size):
            x = _project(center, chosen)
            if x is None or any(sum(p * q for p, q in zip(a, x, strict=True)) > b for a, b in rows):
                continue
            distance = sum((p - q) ** 2 for p, q in zip(x, center, strict=True))
            best = distance if best is None else min(best, distance)
    return best is not None and (best < radius**2 if strict else best <= radius**2)


def _project(center, chosen):
    k = len(chosen)
    gram = [[sum(p * q for p, q in zip(a, c, strict=True)) for c, _ in chosen] for a, _ in chosen]
    right = [b - sum(p * q for p, q in zip(a, center, strict=True)) for a, b in chosen]
    system = [[*gram[i], right[i]] for i in range(k)]
    for i in range(k):
        pivot = next((r for r in range(i, k) if system[r][i] != 0), None)
        if pivot is None:
            return None
        system[i], system[pivot] = system[pivot], system[i]
        system[i] = [v / system[i][i] for v in system[i]]
        for r in range(k):
            if r != i:
                system[r] = [v - system[r][i] * w for v, w in zip(system[r], system[i], strict=True)]
    weights = [row[-1] for row in system]
    return [c + sum(w * a[j] for w, (a, _) in zip(weights, chosen, strict=True)) for j, c in enumerate(center)]


def jacobians(net: Net, domain, strict=True):
    """Jacobians of all patterns whose region meets the domain: its interior if strict, else its closure."""
    d = net.inputs
    base, ball = domain_rows(domain, d, strict)
    found = {}

    def nonempty(system):
        if not feasible(system):
            return False
        return ball is None or meets_ball(system, *ball, strict)

    def visit(number, system, values):
        """values: the previous layer's outputs as (row, constant)."""
        if number == len(net.layers):
            skip = _fractions(np.zeros((net.weight.shape[0], d)) if net.skip is None else net.skip)
            rows = [
                tuple(s[j] + sum(w * v[0][j] for w, v in zip(row, values, strict=True)) for j in range(d))
                for row, s in zip(_fractions(net.weight), skip, strict=True)
            ]
            found[tuple(rows)] = True
            return
        layer = net.layers[number]
        weight = _fractions(layer.weight)
        skip = _fractions(np.zeros((len(weight), d)) if layer.skip is None else layer.skip)
        bias = [Fraction(float(v)) for v in layer.bias]
        breaks, slopes = [Fraction(v) for v in layer.breaks], [Fraction(v) for v in layer.slopes]
        offsets = [Fraction(layer.value) - slopes[0] * breaks[0]]
        for k, b in enumerate(breaks):
            offsets.append((slopes[k] - slopes[k + 1]) * b + offsets[k])

        def neuron(i, system, outputs):
            if i == len(weight):
                visit(number + 1, system, outputs)
                return
            row = [skip[i][j] + sum(w * v[0][j] for w, v in zip(weight[i], values, strict=True)) for j in range(d)]
            constant = bias[i] + sum(w * v[1] for w, v in zip(weight[i], values, strict=True))
            for k in range(len(slopes)):
                low, high = breaks[k - 1] if k else None, breaks[k] if k < len(breaks) else None
                out = ([slopes[k] * v for v in row], slopes[k] * constant + offsets[k])
                if not any(row):
                    if (low is None or constant >= low) and (high is None or constant <= high):
                        neuron(i + 1, system, [*outputs, out])
                        if strict:
                            return  # on a break point either piece gives the same constant
                    continue
                extra = [] if low is None else [([-v for v in row], constant - low, strict)]
                extra += [] if high is None else [(row, high - constant, strict)]
                if nonempty(system + extra):
                    neuron(i + 1, system + extra, [*outputs, out])

        neuron(0, system, [])

    eye = [([Fraction(int(i == j)) for j in range(d)], Fraction(0)) for i in range(d)]
    if nonempty(base):
        visit(0, base, eye)
    return [np.array(rows, dtype=float) for rows in found]


def norm_of(jacobian, norm):
    """Operator norm by formula or by all sign vectors."""
    p, q = norm
    if p == 1:
        return max(np.linalg.norm(column, q) for column in jacobian.T)
    if q == math.inf:
        return max(np.linalg.norm(row, 1 if p == math.inf else 2) for row in jacobian)
    if p == 2 and q == 2:
        return float(np.sqrt(np.linalg.eigvalsh(jacobian @ jacobian.T).max()))
    if p == math.inf:
        signs = itertools.product((1.0, -1.0), repeat=jacobian.shape[1])
        return max(np.linalg.norm(jacobian @ np.array(v), q) for v in signs)
    signs = itertools.product((1.0, -1.0), repeat=jacobian.shape[0])
    return max(np.linalg.norm(np.array(g) @ jacobian, 2) for g in signs)


def constant(net, domain, norm, strict=True):
    """The true constant (strict) or the closed maximum."""
    return max(float(norm_of(j, norm)) for j in jacobians(net, domain, strict))


def random_net(sizes, seed, breaks=(0.0,), slopes=(0.0, 1.0), value=0.0, skip=False, bias=1.0, grid=16):
    """Normal weights, rounded to multiples of 1/grid so that the fractions stay small."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return np.round(rng.normal(size=shape) * scale * grid) / grid

    layers = [
        Layer(draw(b, a), draw(b, scale=bias), breaks, slopes, value, draw(b, sizes[0]) if skip and k else None)
        for k, (a, b) in enumerate(itertools.pairwise(sizes[:-1]))
    ]
    return Net(layers, draw(sizes[-1], sizes[-2]), draw(sizes[-1], sizes[0]) if skip else None)


def trained_net(sizes, seed, steps=150, grid=64):
    """A ReLU network fitted to a wave, its weights rounded."""
    torch.manual_seed(seed)
    modules = []
    for a, b in itertools.pairwise(sizes):
        modules += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    model = torch.nn.Sequential(*modules[:-1]).double()
    x = 2 * torch.rand(64, sizes[0], dtype=torch.float64) - 1
    y = torch.sin(3 * x.sum(1, keepdim=True) + torch.arange(sizes[-1]))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimiser.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimiser.step()
    linear = [m for m in model if isinstance(m, torch.nn.Linear)]

    def rounded(t):
        return (torch.round(t.detach() * grid) / grid).numpy()

    return Net([Layer(rounded(m.weight), rounded(m.bias)) for m in linear[:-1]], rounded(linear[-1].weight))


DOMAINS = {
    "box": lambda d: Box(-1.0, 1.0),
    "ball-1": lambda d: Ball([0.25] * d, 0.75, 1.0),
    "ball-2": lambda d: Ball([0.25] * d, 0.75, 2.0),
    "ball-inf": lambda d: Ball([-0.5] * d, 0.5, math.inf),
    "all": lambda d: None,
}
