"""Bounds against exact constants of the real-valued function of the stored weights, in rational arithmetic.

Small networks of linear layers, BatchNorm, quotients and chains of factors are computed twice: by torch and the package, and
here, with fractions. Of the square roots of BatchNorm 300 bits are kept; nothing else is rounded, and no tolerance is granted.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.network import Affine

BITS = 300
LOST = Fraction(1, 2 ** (BITS - 40))
"""More than what the roots' lost bits change of a squared norm here."""

Matrix = list[list[Fraction]]


class Apply(nn.Module):
    """One call on x, with a constant."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@dataclass
class Map:
    """x -> matrix x + bias, exactly."""

    matrix: Matrix
    bias: list[Fraction]

    def then(self, matrix: Matrix, bias: list[Fraction]) -> Map:
        columns = list(zip(*self.matrix, strict=True))
        moved = [sum((a * b for a, b in zip(row, self.bias, strict=True)), Fraction(0)) for row in matrix]
        product = [[sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in columns] for row in matrix]
        return Map(product, [m + b for m, b in zip(moved, bias, strict=True)])

    def scaled(self, factors: list[Fraction], shift: list[Fraction] | None = None) -> Map:
        rows = [[f * v for v in row] for f, row in zip(factors, self.matrix, strict=True)]
        shift = [Fraction(0)] * len(rows) if shift is None else shift
        return Map(rows, [f * b + s for f, b, s in zip(factors, self.bias, shift, strict=True)])


def identity(n: int) -> Map:
    return Map([[Fraction(int(i == j)) for j in range(n)] for i in range(n)], [Fraction(0)] * n)


def exactly(tensor) -> list:
    return [Fraction(v) for v in tensor.detach().double().flatten().tolist()]


def inverse_root(q: Fraction) -> Fraction:
    """1 / sqrt(q) to BITS bits."""
    return Fraction(math.isqrt((q.denominator * q.numerator) << (2 * BITS)), q.numerator << BITS)


def extended(chance: random.Random, layers: list, exact: Map, steps: int, dtype) -> Map:
    """Random affine steps appended to the layers, and to the exact map."""
    for _ in range(steps):
        n = len(exact.matrix)
        match chance.choice(["linear", "norm", "norm", "over", "times", "vector", "there and back", "shift"]):
            case "linear":
                layer = nn.Linear(n, chance.randint(1, 3), bias=chance.random() < 0.7).to(dtype)
                rows = [exactly(row) for row in layer.weight]
                exact = exact.then(rows, [Fraction(0)] * len(rows) if layer.bias is None else exactly(layer.bias))
                layers.append(layer)
            case "norm":
                layer = nn.BatchNorm1d(n, eps=chance.choice([1e-5, 1e-3, 0.1]), affine=chance.random() < 0.5).to(dtype)
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.01, 30.0)
                roots = [inverse_root(v + Fraction(layer.eps)) for v in exactly(layer.running_var)]
                if layer.affine:
                    nn.init.normal_(layer.weight)
                    nn.init.normal_(layer.bias)
                    roots = [r * w for r, w in zip(roots, exactly(layer.weight), strict=True)]
                shift = [-m * r for m, r in zip(exactly(layer.running_mean), roots, strict=True)]
                if layer.affine:
                    shift = [s + b for s, b in zip(shift, exactly(layer.bias), strict=True)]
                exact = exact.scaled(roots, shift)
                layers.append(layer)
            case "over":
                c = chance.choice([3, 7, 49, 10, 0.3, 1e-3, 2, 2**53 + 1])
                exact = exact.scaled([1 / Fraction(c)] * n)
                layers.append(Apply(lambda x, c=c: x / c))
            case "times":
                c = chance.choice([1 / 3, 0.1, -1.7, 4, 1e-3, 2**53 + 1])
                exact = exact.scaled([Fraction(c)] * n)
                layers.append(Apply(lambda x, c=c: x * c))
            case "vector":
                v = torch.rand(n, dtype=dtype) + 0.1
                if chance.random() < 0.5:
                    exact = exact.scaled(exactly(v))
                    layers.append(Apply(lambda x, v=v: v * x))
                else:
                    exact = exact.scaled([1 / c for c in exactly(v)])
                    layers.append(Apply(lambda x, v=v: x / v))
            case "there and back":
                c, k = chance.choice([49, 3, 0.7]), chance.randint(1, 6)
                layers += [Apply(lambda x, c=c: x / c)] * k + [Apply(lambda x, c=c: x * c)] * k
            case "shift":
                v = torch.randn(n, dtype=dtype)
                exact = exact.scaled([Fraction(1)] * n, exactly(v))
                layers.append(Apply(lambda x, v=v: x + v))
    return exact


def gap(matrix: Matrix, square: Fraction) -> Matrix:
    """square I - M M'."""
    rows = range(len(matrix))
    gram = [[sum((a * b for a, b in zip(matrix[i], matrix[j], strict=True)), Fraction(0)) for j in rows] for i in rows]
    return [[square * (i == j) - gram[i][j] for j in rows] for i in rows]


def pivots(symmetric: Matrix) -> list[Fraction]:
    """Those of the elimination without exchanges, up to the first that is not positive."""
    a, found = [row[:] for row in symmetric], []
    for k in range(len(a)):
        found.append(a[k][k])
        if a[k][k] <= 0:
            break
        for i in range(k + 1, len(a)):
            factor = a[i][k] / a[k][k]
            a[i] = [x - factor * y for x, y in zip(a[i], a[k], strict=True)]
    return found


def exceeds(matrix: Matrix, number: float) -> bool:
    """Whether the norm from 2 to 2 is provably above the number: the lost bits do not decide."""
    return min(pivots(gap(matrix, Fraction(number) ** 2 + LOST))) <= 0


def below(matrix: Matrix, number: float) -> bool:
    """Whether the norm from 2 to 2 is provably below the number."""
    return min(pivots(gap(matrix, max(Fraction(number) ** 2 - LOST, Fraction(0))))) > 0


def enclosed(node: Affine, exact: Map) -> bool:
    """Whether an affine node's coefficients and bias are as near to the exact ones as it says."""
    rho, lost = Fraction(node.operator.rho), LOST
    held = [[Fraction(v) for v in row] for row in node.operator.dense().tolist()]
    bias = exactly(node.bias) if node.bias is not None else [Fraction(0)] * len(held)
    radius = exactly(node.bias_radius) if node.bias_radius is not None else [Fraction(0)] * len(held)
    near = all(
        abs(t - w) <= rho * abs(w) + lost for a, b in zip(exact.matrix, held, strict=True) for t, w in zip(a, b, strict=True)
    )
    return near and all(abs(t - b) <= r + lost for t, b, r in zip(exact.bias, bias, radius, strict=True))


def linear_violations(seed: int) -> list[str]:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    dtype, n = chance.choice([torch.float64, torch.float32]), chance.randint(1, 3)
    layers: list[nn.Module] = []
    exact = extended(chance, layers, identity(n), chance.randint(1, 5), dtype)
    network = lg.capture(nn.Sequential(nn.Identity(), *layers).eval(), torch.zeros(1, n, dtype=dtype))
    found = []
    if len(network.nodes) == 2 and not enclosed(network.nodes[1], exact):
        found.append("the captured coefficients")
    for norm in (1, math.inf):
        lines = exact.matrix if norm == math.inf else list(zip(*exact.matrix, strict=True))
        if Fraction(lg.bound(network, norm=norm, method="spectral").value) < max(sum(map(abs, line)) for line in lines) - LOST:
            found.append(f"norm {norm}")
    for method in ("spectral", "lipsdp-neuron"):
        if exceeds(exact.matrix, lg.bound(network, method=method).value):
            found.append(method)
    if below(exact.matrix, lg.bound(network, method="sampling", time_limit=0.05).value):
        found.append("sampling")
    return found


def constant_on_a_line(first: Map, last: Map, low: Fraction | None, high: Fraction | None) -> Fraction:
    """Squared constant of x -> last(relu(first(x))) of one input over (low, high)."""
    slopes = [row[0] for row in first.matrix]
    breaks = {-b / a for a, b in zip(slopes, first.bias, strict=True) if a}
    ends = sorted({b for b in breaks if (low is None or b > low) and (high is None or b < high)})
    left = (ends[0] - 1 if ends else Fraction(-1)) if low is None else low
    right = (ends[-1] + 1 if ends else Fraction(1)) if high is None else high
    best, points = Fraction(0), [left, *ends, right]
    for a, b in itertools.pairwise(points):
        x = (a + b) / 2
        active = [s if s * x + c > 0 else Fraction(0) for s, c in zip(slopes, first.bias, strict=True)]
        y = [sum((w * s for w, s in zip(row, active, strict=True)), Fraction(0)) for row in last.matrix]
        best = max(best, sum((v * v for v in y), Fraction(0)))
    return best


def hidden_violations(seed: int) -> list[str]:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    dtype = chance.choice([torch.float64, torch.float32])
    spread = nn.Linear(1, chance.randint(1, 4)).to(dtype)
    layers: list[nn.Module] = [spread]
    first = extended(
        chance, layers, Map([exactly(row) for row in spread.weight], exactly(spread.bias)), chance.randint(1, 2), dtype
    )
    layers.append(nn.ReLU())
    last = extended(chance, layers, identity(len(first.matrix)), chance.randint(1, 2), dtype)
    module, example = nn.Sequential(*layers).eval(), torch.zeros(1, 1, dtype=dtype)
    plain, found = len(lg.capture(module, example).nodes) == 4, []
    for domain, ends in ((None, (None, None)), (lg.Box(-1.0, 1.0), (Fraction(-1), Fraction(1)))):
        square = constant_on_a_line(first, last, *ends)
        enclosure = lg.exact(module, example, domain=domain, method="branch-and-bound", time_limit=20)
        uppers = (enclosure.upper, lg.bound(module, example, domain=domain).value)
        if any(Fraction(value) ** 2 < square - LOST for value in uppers):
            found.append(f"upper on {domain}")
        if Fraction(enclosure.lower) ** 2 > square + LOST:
            found.append(f"lower on {domain}")
        # Neurons that read one number through two maps are tied up to rounding: no proof is known for these.
        if plain and enclosure.upper > enclosure.lower * (1 + 1e-5) + 1e-12:
            found.append(f"open on {domain}")
    return found


def violations(linear: range, hidden: range) -> dict[str, list[str]]:
    found = {f"linear {seed}": linear_violations(seed) for seed in linear}
    found |= {f"hidden {seed}": hidden_violations(seed) for seed in hidden}
    return {name: what for name, what in found.items() if what}


def test_bounds_hold_for_the_exact_numbers():
    assert violations(range(60), range(12)) == {}


@pytest.mark.slow
def test_bounds_of_one_thousand_networks_hold_for_the_exact_numbers():
    assert violations(range(1000, 1850), range(1000, 1150)) == {}


@pytest.mark.parametrize("seed", range(20))
def test_batch_norm_alone_is_never_below_its_root(seed):
    torch.manual_seed(seed)
    layer = nn.BatchNorm1d(1, affine=False).double().eval()
    layer.running_var.uniform_(0.1, 3.0)
    square = 1 / (exactly(layer.running_var)[0] + Fraction(layer.eps))
    value = lg.bound(layer, torch.zeros(1, 1, dtype=torch.float64)).value
    assert square <= Fraction(value) ** 2 <= square * (1 + Fraction(1, 10**14))


def test_a_third_is_bounded_from_above_and_quickly_there():
    value = lg.bound(Apply(lambda x: x / 3), torch.zeros(1, 3, dtype=torch.float64)).value
    assert Fraction(1, 3) <= Fraction(value) < Fraction(1, 3) * (1 + Fraction(1, 10**15))
