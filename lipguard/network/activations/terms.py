"""Sums of products of functions of one number z: what an activation written by hand is made of, and its enclosures.

    total = sum_k c_k * f_1 * f_2 * ...,      a factor f is z itself, or one of `FACTORS` of another total

The coefficients are numbers, or one for each entry. Values and derivatives are enclosed together by the sum, product and
chain rules in interval arithmetic (Moore 1966, chapter 11; Griewank & Walther 2008, section 2.1). Products of equal factors
are powers, whose range is tighter than that of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lipguard.network.activations import bells, error_function, mish, roots, sigmoids, silu, softplus, waves
from lipguard.network.activations.base import Elementwise
from lipguard.network.activations.interval import Interval
from lipguard.network.activations.smooth import NEAR


@dataclass(frozen=True)
class Kind:
    """A function of one number that factors may be.

    Attributes:
        value: in floating point.
        image: enclosure of its values on an interval.
        slope: enclosure of its derivative on an interval, given that of its values.
    """

    value: Callable[[Tensor], Tensor]
    image: Callable[[Interval], Interval]
    slope: Callable[[Interval, Interval], Interval]


def _number(value: float, like: Interval) -> Interval:
    return Interval.of(torch.full_like(like.low, value))


def _smooth(function: Elementwise, image: Callable[[Interval], Interval]) -> Kind:
    return Kind(function, image, lambda z, _: z.slopes(function))


def _rising(function: Elementwise, low: float = -torch.inf, high: float = torch.inf) -> Kind:
    def image(z: Interval) -> Interval:
        found = z.rising(function)
        return Interval(found.low.clamp_min(low), found.high.clamp_max(high))

    return _smooth(function, image)


def _turning(function: Elementwise, limits: tuple[float, float], *turns: tuple[float, float, float]) -> Kind:
    """A function that is monotone between its turns (place to within 1e-12, value from, to), with its limits at -inf and inf."""

    def end(z: Tensor) -> Interval:
        finite = z.isfinite()
        found = Interval.of(torch.where(finite, z, 0.0)).rising(function)
        limit = torch.where(z < 0, limits[0], torch.full_like(z, limits[1]))
        return Interval(torch.where(finite, found.low, limit), torch.where(finite, found.high, limit))

    def image(z: Interval) -> Interval:
        left, right = end(z.low), end(z.high)
        low, high = torch.minimum(left.low, right.low), torch.maximum(left.high, right.high)
        for place, least, most in turns:
            inside = (z.low <= place + NEAR) & (z.high >= place - NEAR)
            low = torch.where(inside, low.clamp_max(least), low)
            high = torch.where(inside, high.clamp_min(most), high)
        return Interval(low, high)

    return _smooth(function, image)


_SIN, _COS = waves.sin(), waves.cos()
_SIGMOID = sigmoids.sigmoid()
_PEAK = (0.428881942480, 0.428881942481)

FACTORS: Mapping[str, Kind] = {
    "exp": Kind(torch.exp, Interval.exp, lambda _, value: value),
    # (log z)' = 1 / z, (1 / z)' = -(1 / z)^2, (sqrt z)' = 1 / (2 sqrt z)
    "log": Kind(torch.log, Interval.log, lambda z, _: z.inverse()),
    "inverse": Kind(torch.reciprocal, Interval.inverse, lambda z, value: value.power(2) * _number(-1.0, z)),
    "sqrt": Kind(torch.sqrt, Interval.sqrt, lambda z, value: value.inverse() * _number(0.5, z)),
    # sin is the slope of -cos, cos that of sin.
    "sin": _smooth(_SIN, lambda z: z.slopes(_COS) * _number(-1.0, z)),
    "cos": _smooth(_COS, lambda z: z.slopes(_SIN)),
    "sigmoid": _rising(sigmoids.sigmoid(), 0.0, 1.0),
    "softplus": _rising(softplus.softplus(), 0.0),
    "erf": _rising(error_function.erf(), -1.0, 1.0),
    "atan": _rising(roots.atan(), -1.5707963267948968, 1.5707963267948968),
    "asinh": _rising(roots.asinh()),
    "z-root": _rising(roots.z_root(), -1.0, 1.0),
    "root": _smooth(roots.root(), lambda z: z.valley(roots.root())),
    "z-erf": _smooth(error_function.z_erf(), lambda z: z.valley(error_function.z_erf())),
    "silu": _turning(silu.silu(), (0.0, torch.inf), (-1.278464542761074, -0.2784645427611, -0.2784645427610)),
    "mish": _turning(mish.mish(), (0.0, torch.inf), (-1.1924312145154952, -0.3088434131, -0.3088434130)),
    "gauss": _turning(bells.gauss(), (0.0, 0.0), (0.0, 1.0, 1.0)),
    "log-lorentz": _smooth(bells.log_lorentz(), lambda z: z.valley(bells.log_lorentz())),
    "lorentz": _turning(bells.lorentz(), (0.0, 0.0), (0.0, 1.0, 1.0)),
    # The extremes are 1 / sqrt(2 e) = 0.428881942480353... and 1/2, of either sign.
    "z-gauss": _turning(bells.z_gauss(), (0.0, 0.0), (-math.sqrt(0.5), -_PEAK[1], -_PEAK[0]), (math.sqrt(0.5), *_PEAK)),
    "z-lorentz": _turning(bells.z_lorentz(), (0.0, 0.0), (-1.0, -0.5, -0.5), (1.0, 0.5, 0.5)),
}
"""The functions by their names: a closed table, as records hold them."""


@dataclass(frozen=True, eq=False)
class Factor:
    """z (no name), or a function of a total."""

    name: str = ""
    inner: Total | None = None

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What it is, to compare and to sort by."""
        return (self.name, *(() if self.inner is None else self.inner.key))

    @property
    def text(self) -> str:
        """Its form, with # for every coefficient."""
        return "z" if self.inner is None else f"{self.name}({self.inner.text()})"


Monomial = tuple[Factor, ...]
"""Factors in the order of their keys; none for the number 1."""


@dataclass(frozen=True, eq=False)
class Total:
    """A sum of coefficients times products of factors, in the order of the products' keys.

    Attributes:
        terms: products and their coefficients, float64, 0-d or (size,).
    """

    terms: tuple[tuple[Monomial, Tensor], ...]

    @classmethod
    def of(cls, terms: Sequence[tuple[Monomial, Tensor]]) -> Total:
        """Equal products added up; those with the coefficient 0 left out."""
        found: dict[Any, tuple[Monomial, Tensor]] = {}
        for product, coefficient in terms:
            product = tuple(sorted(product, key=lambda f: f.key))
            coefficient = coefficient.reshape(()) if coefficient.numel() == 1 else coefficient
            key = tuple(f.key for f in product)
            found[key] = (product, found[key][1] + coefficient) if key in found else (product, coefficient)
        kept = [(key, term) for key, term in found.items() if bool((term[1] != 0).any())]
        return cls(tuple(term for _, term in sorted(kept, key=lambda pair: pair[0])))

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What it is, bit for bit."""
        return tuple((tuple(f.key for f in product), tuple(c.shape), _bits(c)) for product, c in self.terms)

    def factors(self) -> Iterator[Factor]:
        """All factors, without those inside others."""
        return (factor for product, _ in self.terms for factor in product)

    def __call__(self, z: Tensor) -> Tensor:
        """In floating point."""
        total = torch.zeros_like(z)
        for product, coefficient in self.terms:
            part = coefficient
            for factor in product:
                part = part * (z if factor.inner is None else FACTORS[factor.name].value(factor.inner(z)))
            total = total + part
        return total

    def enclosed(self, z: Interval) -> tuple[Interval, Interval]:
        """Enclosures of the values and of the derivative for all numbers of an interval."""
        value = slope = Interval.of(torch.zeros_like(z.low))
        for product, coefficient in self.terms:
            part, change = _product(product, z)
            value, slope = value + part.scaled(coefficient), slope + change.scaled(coefficient)
        return value, slope

    def columns(self, index: Tensor) -> Total:
        """With the coefficients of the entries at an index, where there is one for each."""

        def inside(factor: Factor) -> Factor:
            return factor if factor.inner is None else Factor(factor.name, factor.inner.columns(index))

        return Total(tuple((tuple(map(inside, p)), c[index] if c.ndim else c) for p, c in self.terms))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Total:
        """With other coefficients."""

        def inside(factor: Factor) -> Factor:
            return factor if factor.inner is None else Factor(factor.name, factor.inner.mapped(change))

        return Total(tuple((tuple(map(inside, p)), change(c)) for p, c in self.terms))

    def tensors(self) -> Iterator[Tensor]:
        """The coefficients, in the order of `text`."""
        for product, coefficient in self.terms:
            yield coefficient
            for factor in product:
                if factor.inner is not None:
                    yield from factor.inner.tensors()

    def text(self) -> str:
        """Its form, with # for every coefficient."""
        return "+".join("*".join(["#", *(f.text for f in product)]) for product, _ in self.terms) or "0"

    def to_record(self) -> list[Any]:
        """[[coefficient, [factor, ...]], ...], a factor being [] or [name, record]."""
        return [[c, [[] if f.inner is None else [f.name, f.inner.to_record()] for f in product]] for product, c in self.terms]

    @classmethod
    def from_record(cls, record: Sequence[Any]) -> Total:
        """What `to_record` wrote.

        Raises:
            ValueError: a factor is none of `FACTORS`.
        """
        terms = []
        for coefficient, factors in record:
            if not isinstance(coefficient, Tensor) or coefficient.ndim > 1:
                raise ValueError("a coefficient of an activation is no number or row of numbers")
            product = []
            for factor in factors:
                if factor and factor[0] not in FACTORS:
                    raise ValueError(f"no function {factor[0]!r} is known")
                product.append(Factor(factor[0], cls.from_record(factor[1])) if factor else Factor())
            terms.append((tuple(product), coefficient.to(torch.float64)))
        return cls.of(terms)


def _bits(numbers: Tensor) -> bytes:
    return numbers.detach().cpu().numpy().tobytes()


def _product(product: Monomial, z: Interval) -> tuple[Interval, Interval]:
    """Enclosures of a product and of its derivative, sum over factors f^n of n f^(n-1) f' times the others."""
    one = Interval.of(torch.ones_like(z.low))
    parts: list[tuple[Interval, Interval]] = []
    for _, same in groupby(product, key=lambda f: f.key):
        equal = list(same)
        value, slope = _factor(equal[0], z, one)
        n = len(equal)
        change = slope if n == 1 else (value.power(n - 1) * slope).scaled(torch.full_like(z.low, float(n)))
        parts.append((value.power(n), change))
    if not parts:
        return one, Interval.of(torch.zeros_like(z.low))
    value, slope = parts[0]
    for other, change in parts[1:]:
        value, slope = value * other, slope * other + value * change
    if (inner := _gate(product)) is not None:
        tail = _gate_slopes(inner, z)
        slope = Interval(torch.maximum(slope.low, tail.low), torch.minimum(slope.high, tail.high))
    return value, slope


def _gate(product: Monomial) -> Total | None:
    """p of z sigmoid(p(z)), p(z) = a z + b z^3 with a, b > 0: the GELU of the hyperbolic tangent is one."""
    if len(product) != 2 or product[0].inner is not None or product[1].name != "sigmoid":
        return None
    inner = product[1].inner
    assert inner is not None
    powers = [len(factors) for factors, _ in inner.terms if all(f.inner is None for f in factors)]
    good = powers == [1, 3] and len(inner.terms) == 2 and all(bool((c > 0).all()) for _, c in inner.terms)
    return inner if good else None


def _gate_slopes(p: Total, z: Interval) -> Interval:
    """Slopes of z sigmoid(p): sigmoid(p) + z p' sigmoid'(p).

    |z p'| = a |z| + 3 b |z|^3 is at most 3 |p|, and sigmoid'(p) <= e^-|p|: the second term, which has the sign of z, is at most
    3 |p| e^-|p|, which falls from |p| = 1 on. Nearer to 0 this says nothing.
    """
    near = torch.where((z.low < 0) & (z.high > 0), 0.0, torch.minimum(z.low.abs(), z.high.abs()))
    # The lower end of the enclosure of |p| where |z| is least: where it is at least 1, |p| is throughout.
    least = p.enclosed(Interval.of(near))[0].low
    start = Interval.of(least.clamp_min(1.0))
    most = (start.scaled(torch.full_like(near, 3.0)) * start.scaled(torch.full_like(near, -1.0)).exp()).high
    most = torch.where(least >= 1, most, torch.inf)
    term = Interval(torch.where(z.low >= 0, 0.0, -most), torch.where(z.high <= 0, 0.0, most))
    return p.enclosed(z)[0].rising(_SIGMOID) + term


def _factor(factor: Factor, z: Interval, one: Interval) -> tuple[Interval, Interval]:
    if factor.inner is None:
        return z, one
    inside, rate = factor.inner.enclosed(z)
    kind = FACTORS[factor.name]
    value = kind.image(inside)
    return value, kind.slope(inside, value) * rate
