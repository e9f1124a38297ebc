"""Elementwise functions with proven slope intervals, a function or a family to a file.

A new function takes its file here, which states phi, its slopes and their proof, and the constructor's name (`@named`); and a
line in `lipguard.capture.rules.activation`, which says what torch call it is. A function that is piecewise linear needs no
name: a record holds its break points and slopes. Other packages use `register` and `lipguard.lowers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lipguard.network.activations.base import Elementwise
from lipguard.network.activations.clipping import clip
from lipguard.network.activations.formula import Formula
from lipguard.network.activations.hard_sigmoid import hardsigmoid
from lipguard.network.activations.modulus import absolute
from lipguard.network.activations.named import NAMED, register
from lipguard.network.activations.piecewise import PiecewiseLinear
from lipguard.network.activations.rectifiers import leaky_relu, relu
from lipguard.network.activations.shrinkage import softshrink
from lipguard.network.activations.terms import Total

__all__ = [
    "KINDS", "Elementwise", "Formula", "PiecewiseLinear", "absolute", "clip", "from_record", "hardsigmoid", "leaky_relu",
    "register", "relu",
    "softshrink",
]  # fmt: skip


KINDS = ("Elementwise", "Formula", "PiecewiseLinear", "Smooth", "Wave")
"""How a record may hold a function: by its registered name and parameters, by break points and slopes, or by a formula."""


def from_record(kind: str, parts: Mapping[str, Any]) -> Elementwise:
    """The function of one of the `KINDS` that a record's fields make.

    Raises:
        ValueError: they make none.
        KeyError: a field is missing.
    """
    name = parts["name"]
    if kind == "Formula":
        made = Formula(parts["breaks"], [Total.from_record(total) for total in parts["totals"]])
        if made.name != name:
            raise ValueError(f"the name {name!r} stands for another formula")
        return made
    if kind == "PiecewiseLinear":
        # Which slopes are rounded is no field of the record: the function is known by its name.
        return PiecewiseLinear(name, parts["breaks"], parts["pieces"], parts["value"], rounded=name == "hardsigmoid")
    if name not in NAMED:
        raise ValueError(f"no activation is called {name!r}; one of another package is known once that package is imported")
    made = NAMED[name](*parts["parameters"])
    if not isinstance(made, Elementwise) or (made.kind, made.name) != (kind, name):
        raise ValueError(f"the name {name!r} stands for another activation")
    return made
