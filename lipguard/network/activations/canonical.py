"""Arithmetic on totals that keeps them in a form whose slopes are bounded by the sum and the product rule.

x sigmoid(x), as a product, has no bound of its slope on [T, inf): x is unbounded there, and that the sigmoid's slope vanishes
faster is not seen. So what has a name is given it: every identity below holds for all real numbers. Parameters that it takes,
a logarithm or a square root of a coefficient, are rounded to float64 once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipguard.errors import InvalidModel
from lipguard.network.activations.terms import FACTORS, Factor, Monomial, Total

Z = Factor()

_TERMS = 400
"""Products of terms up to which a product of sums is multiplied out."""


def constant(value: Tensor | float) -> Total:
    """A number, or one for each entry."""
    return Total.of([((), torch.as_tensor(value, dtype=torch.float64))])


def variable(like: Tensor) -> Total:
    """z."""
    return Total.of([((Z,), torch.ones((), dtype=torch.float64, device=like.device))])


def plus(p: Total, q: Total) -> Total:
    """p + q."""
    return Total.of((*p.terms, *q.terms))


def scaled(p: Total, factor: Tensor | float) -> Total:
    """factor p."""
    return Total.of([(product, coefficient * factor) for product, coefficient in p.terms])


def times(p: Total, q: Total) -> Total:
    """p q, multiplied out.

    Raises:
        InvalidModel: there are too many terms.
    """
    if len(p.terms) * len(q.terms) > _TERMS:
        raise InvalidModel("has more terms than are multiplied out.")
    result = Total(())
    for first, a in p.terms:
        for second, b in q.terms:
            result = plus(result, scaled(_reduced((*first, *second)), a * b))
    return result


def coefficients(p: Total) -> dict[int, Tensor] | None:
    """Coefficients of the powers of z, of a polynomial of degree 2 at most; else None."""
    found: dict[int, Tensor] = {}
    for product, coefficient in p.terms:
        if len(product) > 2 or any(factor.inner is not None for factor in product):
            return None
        found[len(product)] = coefficient
    return found


def affine(p: Total) -> tuple[Tensor, Tensor] | None:
    """(slope, value at 0) of a total that is affine in z; else None."""
    found = coefficients(p)
    if found is None or 2 in found:
        return None
    zero = torch.zeros((), dtype=torch.float64)
    return found.get(1, zero), found.get(0, zero)


def applied(name: str, p: Total) -> Total:
    """A function of a total, by the name it is canonical under, or has an identity for.

    Raises:
        KeyError: there is no such function.
    """
    found = coefficients(p)
    if found is not None and set(found) <= {0}:
        value = found.get(0, torch.zeros((), dtype=torch.float64))
        return constant(_VALUES[name](value) if name in _VALUES else FACTORS[name].value(value))
    return _IDENTITIES[name](p) if name in _IDENTITIES else _factor(name, p)


def _factor(name: str, p: Total) -> Total:
    one = torch.ones((), dtype=torch.float64, device=p.terms[0][1].device)
    assert name in FACTORS
    return Total(((((Factor(name, p)),), one),))


def _single(p: Total) -> tuple[Monomial, Tensor] | None:
    return p.terms[0] if len(p.terms) == 1 else None


def _only(product: Monomial, name: str) -> Total | None:
    """The total inside a product of one factor of that name."""
    return product[0].inner if len(product) == 1 and product[0].name == name else None


def _positive(*numbers: Tensor) -> bool:
    return all(bool((number > 0).all()) for number in numbers)


def _negative_first(p: Total) -> bool:
    """Whether the first coefficient of a product is negative: a form to choose one of f(u), f(-u)."""
    return next((bool((c < 0).all()) for product, c in p.terms if product), False)


def _difference(p: Total, q: Total) -> Total:
    return plus(p, scaled(q, -1.0))


# Functions of totals.


def _exp(p: Total) -> Total:
    found = coefficients(p)
    if found is not None and 2 in found and bool((found[2] < 0).all()):
        # c + e z - d z^2 = c + e^2 / (4 d) - d (z - e / (2 d))^2
        d, e, c = -found[2], found.get(1, torch.zeros(())), found.get(0, torch.zeros(()))
        root = d.sqrt()
        return scaled(_factor("gauss", _line(root, -e / (2 * root))), torch.exp(c + e * e / (4 * d)))
    return _factor("exp", p)


def _two(p: Total) -> tuple[Total, Tensor, Total, Tensor] | None:
    """(u, a, v, b) of a e^u + b e^v with a, b > 0; a constant is b e^0."""
    parts = []
    for product, coefficient in p.terms:
        inner = Total(()) if not product else _only(product, "exp")
        if inner is None or not _positive(coefficient):
            return None
        parts.append((inner, coefficient))
    if len(parts) != 2:
        return None
    (v, b), (u, a) = parts
    return u, a, v, b


def _log(p: Total) -> Total:
    if (found := _two(p)) is not None:
        # log(a e^u + b e^v) = v + log b + log(1 + e^(u - v + log(a / b)))
        u, a, v, b = found
        inner = plus(_difference(u, v), constant(torch.log(a / b)))
        return plus(plus(v, constant(torch.log(b))), applied("softplus", inner))
    if (one := _single(p)) is not None and _positive(one[1]):
        shift = constant(torch.log(one[1]))
        if (u := _only(one[0], "exp")) is not None:
            return plus(u, shift)
        if (u := _only(one[0], "sigmoid")) is not None:  # log sigmoid(u) = -log(1 + e^-u)
            return plus(shift, scaled(applied("softplus", scaled(u, -1.0)), -1.0))
    square = _square(p)
    if square is not None:
        line, rest = square
        return plus(_factor("log-lorentz", line), constant(torch.log(rest)))
    return _factor("log", p)


def _inverse(p: Total) -> Total:
    if (found := _two(p)) is not None:
        # 1 / (a e^u + b e^v) = e^-v / b * sigmoid(-(u - v + log(a / b)))
        u, a, v, b = found
        inner = plus(_difference(v, u), constant(torch.log(b / a)))
        return scaled(times(applied("exp", scaled(v, -1.0)), applied("sigmoid", inner)), 1 / b)
    if (one := _single(p)) is not None and bool((one[1] != 0).all()):
        product, c = one
        if (u := _only(product, "exp")) is not None:
            return scaled(applied("exp", scaled(u, -1.0)), 1 / c)
        if (u := _only(product, "inverse")) is not None:
            return scaled(u, 1 / c)
        if (u := _only(product, "sigmoid")) is not None:  # 1 / sigmoid(u) = 1 + e^-u
            return scaled(plus(constant(1.0), applied("exp", scaled(u, -1.0))), 1 / c)
    square = _square(p)
    if square is not None:
        line, rest = square
        return scaled(_factor("lorentz", line), 1 / rest)
    return _factor("inverse", p)


def _square(p: Total) -> tuple[Total, Tensor] | None:
    """(u, r) of r (1 + u^2), r > 0, u affine in z; of a polynomial without zeros."""
    found = coefficients(p)
    if found is None or 2 not in found or not _positive(found[2]):
        return None
    d, e, c = found[2], found.get(1, torch.zeros(())), found.get(0, torch.zeros(()))
    rest = c - e * e / (4 * d)
    if not _positive(rest):
        return None
    return _line((d / rest).sqrt(), e / (2 * (d * rest).sqrt())), rest


def _line(slope: Tensor, shift: Tensor) -> Total:
    return Total.of([((Z,), slope), ((), shift.to(slope))])


def _sqrt(p: Total) -> Total:
    square = _square(p)
    if square is not None:
        line, rest = square
        return scaled(_factor("root", line), rest.sqrt())
    return _factor("sqrt", p)


def _sigmoid(p: Total) -> Total:
    if _negative_first(p):  # sigmoid(-u) = 1 - sigmoid(u)
        return _difference(constant(1.0), _factor("sigmoid", scaled(p, -1.0)))
    return _factor("sigmoid", p)


def _softplus(p: Total) -> Total:
    if _negative_first(p):  # log(1 + e^-u) = log(1 + e^u) - u
        return plus(_factor("softplus", scaled(p, -1.0)), p)
    return _factor("softplus", p)


def _tanh(p: Total) -> Total:
    return plus(scaled(applied("sigmoid", scaled(p, 2.0)), 2.0), constant(-1.0))


def _odd(name: str) -> Callable[[Total], Total]:
    def function(p: Total) -> Total:
        return scaled(_factor(name, scaled(p, -1.0)), -1.0) if _negative_first(p) else _factor(name, p)

    return function


def _even(name: str) -> Callable[[Total], Total]:
    def function(p: Total) -> Total:
        return _factor(name, scaled(p, -1.0) if _negative_first(p) else p)

    return function


def _silu(p: Total) -> Total:
    return times(p, applied("sigmoid", p))


def _gelu(p: Total) -> Total:
    # u Phi(u) = u / 2 + u erf(u / sqrt 2) / 2
    root = math.sqrt(0.5)
    return scaled(plus(p, times(p, applied("erf", scaled(p, root)))), 0.5)


_IDENTITIES: dict[str, Callable[[Total], Total]] = {
    "exp": _exp, "log": _log, "inverse": _inverse, "sqrt": _sqrt, "sigmoid": _sigmoid, "softplus": _softplus, "tanh": _tanh,
    "sin": _odd("sin"), "erf": _odd("erf"), "atan": _odd("atan"), "asinh": _odd("asinh"), "cos": _even("cos"), "silu": _silu,
    "gelu": _gelu,
    "mish": lambda p: times(p, applied("tanh", applied("softplus", p))),
    "logsigmoid": lambda p: scaled(applied("softplus", scaled(p, -1.0)), -1.0),
    "expm1": lambda p: plus(applied("exp", p), constant(-1.0)),
    "log1p": lambda p: applied("log", plus(p, constant(1.0))),
    "rsqrt": lambda p: applied("inverse", applied("sqrt", p)),
    "square": lambda p: times(p, p),
    "sinh": lambda p: scaled(_difference(applied("exp", p), applied("exp", scaled(p, -1.0))), 0.5),
    "cosh": lambda p: scaled(plus(applied("exp", p), applied("exp", scaled(p, -1.0))), 0.5),
}  # fmt: skip
_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, "expm1": torch.expm1,
    "logsigmoid": torch.nn.functional.logsigmoid, "log1p": torch.log1p, "rsqrt": torch.rsqrt, "square": torch.square,
    "sinh": torch.sinh, "cosh": torch.cosh,
}  # fmt: skip


# Products of factors.


def _reduced(product: Monomial) -> Total:
    """A product in canonical form: the first pair that has an identity is replaced, until none has."""
    for i, first in enumerate(product):
        for j, second in enumerate(product[i + 1 :], i + 1):
            for f, g in ((first, second), (second, first)):
                found = _pair(f, g)
                if found is not None:
                    rest = tuple(factor for k, factor in enumerate(product) if k not in (i, j))
                    return times(found, Total(((rest, torch.ones((), dtype=torch.float64)),)))
    return Total(((tuple(sorted(product, key=lambda f: f.key)), torch.ones((), dtype=torch.float64)),))


def _pair(f: Factor, g: Factor) -> Total | None:
    """f g, where there is an identity for it."""
    if g.inner is None:
        return None
    if f.inner is None:
        return _times_z(g, g.inner)
    return _of_two(f, g, f.inner, g.inner)


_TIMES_Z = {"sigmoid": "silu", "erf": "z-erf", "gauss": "z-gauss", "lorentz": "z-lorentz"}
"""The name of u f(u), by that of f(u)."""


def _times_z(g: Factor, u: Total) -> Total | None:
    line = affine(u)
    if line is not None and bool((line[0] != 0).all()):
        k, c = line
        if g.name in _TIMES_Z:  # z f(u) = (u f(u) - c f(u)) / k, u = k z + c
            both = _difference(_factor(_TIMES_Z[g.name], u), scaled(_factor(g.name, u), c))
            return scaled(both, 1 / k)
        if g.name == "inverse":  # z / (k z + c) = (1 - c / (k z + c)) / k
            return scaled(_difference(constant(1.0), scaled(_factor("inverse", u), c)), 1 / k)
        if g.name == "z-lorentz":  # z u / (1 + u^2) = (u^2 - c u) / (1 + u^2) / k
            both = _difference(_difference(constant(1.0), _factor("lorentz", u)), scaled(_factor("z-lorentz", u), c))
            return scaled(both, 1 / k)
    one = _single(u)
    if one is None or not bool((one[1] != 0).all()):
        return None
    if g.name == "inverse" and (inner := _only(one[0], "root")) is not None and (line := affine(inner)) is not None:
        # z / (a root(v)) = (v / root(v) - c / root(v)) / (a k), v = k z + c; only with c = 0
        k, c = line
        if bool((k != 0).all()) and not bool(c.any()):
            return scaled(_factor("z-root", inner), 1 / (one[1] * k))
    if g.name == "sigmoid" and (inner := _only(one[0], "softplus")) is not None and (line := affine(inner)) is not None:
        # z sigmoid(2 w) = z (1 + tanh w) / 2, w = softplus(k z): mish(k z) = k z tanh w
        k, c = line
        if bool((k != 0).all() and (one[1] == 2).all()) and not bool(c.any()):
            return scaled(plus(variable(k), scaled(_factor("mish", inner), 1 / k)), 0.5)
    return None


def _of_two(f: Factor, g: Factor, u: Total, v: Total) -> Total | None:
    if f.name == "exp" and g.name == "exp":
        return applied("exp", plus(u, v))
    if f.name == "exp" and g.name == "sigmoid" and (total := affine(plus(u, v))) is not None and not bool(total[0].any()):
        # e^(t - v) sigmoid(v) = e^t (1 - sigmoid(v))
        return scaled(_difference(constant(1.0), _factor("sigmoid", v)), torch.exp(total[1]))
    if f.name == "exp" and g.name == "sigmoid" and (total := affine(_difference(u, v))) is not None and not bool(total[0].any()):
        # e^(v + t) sigmoid(v) = e^(v + t) - e^t sigmoid(v)
        return _difference(_factor("exp", u), scaled(_factor("sigmoid", v), torch.exp(total[1])))
    if u.key != v.key:
        return None
    if (f.name, g.name) == ("sin", "sin"):
        return scaled(_difference(constant(1.0), _factor("cos", scaled(u, 2.0))), 0.5)
    if (f.name, g.name) == ("cos", "cos"):
        return scaled(plus(constant(1.0), _factor("cos", scaled(u, 2.0))), 0.5)
    if (f.name, g.name) == ("sin", "cos"):
        return scaled(_factor("sin", scaled(u, 2.0)), 0.5)
    if (f.name, g.name) == ("root", "root"):
        return plus(constant(1.0), times(u, u))
    return None
