"""Comparisons, masks, and functions without a bound of their own: parts of expressions that are settled as a whole.

See `lipguard.capture.symbolic`. Each rule gives the reason for which its own result is refused where no bound is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.expressions import JUMPS, Algebra, Expression, choose, combined, constant, leaf, negative
from lipguard.capture.rules import arithmetic, lengths, rearrange
from lipguard.capture.rules.arithmetic import QUOTIENT
from lipguard.capture.rules.operands import Operand
from lipguard.capture.rules.refused import NORMALIZE, REASONS
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import UNKNOWN, Trace, Value
from lipguard.network.contraction import Length, LogSumExp

_ONE = torch.ones((), dtype=torch.float64)


def extended(trace: Trace, function: Callable[..., Any], operands: list[Operand], reason: str, mask: str = "") -> int:
    """A function of values and constants, entry by entry, as an expression of the shape that they broadcast to."""
    values = [o for o in operands if isinstance(o, Value)]
    shape = torch.broadcast_shapes(*(_shape(o) for o in operands))
    wide = {id(v): rearrange.broadcast(trace, v, shape) for v in values}
    first = wide[id(values[0])]
    parts = [_part(trace, wide[id(o)]) if isinstance(o, Value) else constant(trace.per_feature(o, first)) for o in operands]
    masks = [part.mask for part in parts if part.mask]
    jump = f"{trace.place} {JUMPS.format(origin=masks[0])}" if masks and not mask else ""
    made = combined(function, parts, f"{trace.place} {reason}", jump)
    return trace.put(replace(made, reason="", jump="", mask=mask) if mask else made, first.size)


def _part(trace: Trace, x: Value) -> Expression:
    return trace.pending.get(x.node) or leaf(x.node)


def _shape(operand: Operand) -> torch.Size:
    return operand.tensor.shape if isinstance(operand, Value) else torch.as_tensor(operand).shape


def _sum(a: Algebra, x: Any, y: Any) -> Any:
    return a.plus(x, y)


def _difference(a: Algebra, x: Any, y: Any) -> Any:
    return a.plus(x, negative(a, y))


def added(trace: Trace, input: Operand, other: Operand) -> int:
    """input + other, where one of them is not settled yet; torch adds truth values as `or`."""
    if all(
        isinstance(o, Value | Tensor) and (o.tensor if isinstance(o, Value) else o).dtype == torch.bool for o in (input, other)
    ):
        return extended(trace, _or, [input, other], "", trace.call)
    return extended(trace, _sum, [input, other], "adds values of which no bound is known.")


def product(trace: Trace, input: Operand, other: Operand) -> int:
    """input * other, where both depend on the input, or one is not settled yet."""
    return extended(trace, lambda a, x, y: a.times(x, y), [input, other], arithmetic.PRODUCT)


def quotient(trace: Trace, input: Operand, other: Operand) -> int:
    """input / other, where the divisor depends on the input."""
    return extended(trace, lambda a, x, y: a.times(x, a.applied("inverse", y)), [input, other], _divided(trace, other))


def _divided(trace: Trace, divisor: Operand) -> str:
    """Why a quotient has no bound: of a length what is known of it is told."""
    node = trace.nodes[divisor.node] if isinstance(divisor, Value) and divisor.node not in trace.pending else None
    while node is not None and node.selection is not None:
        node = trace.nodes[node.sources[0]]
    return NORMALIZE if node is not None and isinstance(node.coupling, Length) else QUOTIENT


# Comparisons, and what is computed with their results.


def _register_comparison(names: tuple[str, ...], holds: Callable[[Tensor], Tensor]) -> None:
    def compare(a: Algebra, x: Any, y: Any) -> Any:
        return a.mask(holds(a.sign(_difference(a, x, y))).to(torch.float64))

    def rule(trace: Trace, input: Operand, other: Operand) -> int:
        try:
            return extended(trace, compare, [input, other], "", trace.call)
        except (RuntimeError, TypeError):  # of other shapes, or with no number: torch answers
            return UNKNOWN

    lowers(*names)(rule)


_register_comparison(("gt", "greater", "__gt__"), lambda sign: sign > 0)
_register_comparison(("lt", "less", "__lt__"), lambda sign: sign < 0)
_register_comparison(("ge", "greater_equal", "__ge__"), lambda sign: sign >= 0)
_register_comparison(("le", "less_equal", "__le__"), lambda sign: sign <= 0)
_register_comparison(("eq", "__eq__"), lambda sign: sign == 0)
_register_comparison(("ne", "not_equal", "__ne__"), lambda sign: sign != 0)


def _register_logical(names: tuple[str, ...], function: Callable[..., Any]) -> None:
    def rule(trace: Trace, input: Operand, other: Operand | None = None) -> int:
        operands = [o if isinstance(o, Value) or not isinstance(o, Tensor) else (o != 0) for o in (input, other) if o is not None]
        if not all(trace.pending[o.node].mask for o in operands if isinstance(o, Value) and o.node in trace.pending) or any(
            isinstance(o, Value) and o.node not in trace.pending for o in operands
        ):
            return UNKNOWN  # of numbers that are no masks
        return extended(trace, function, operands, "", trace.call)  # type: ignore[arg-type]

    lowers(*names)(rule)


def _or(a: Algebra, x: Any, y: Any) -> Any:
    return _difference(a, a.plus(x, y), a.times(x, y))


def _xor(a: Algebra, x: Any, y: Any) -> Any:
    both = a.times(x, y)
    return _difference(a, a.plus(x, y), a.plus(both, both))


_register_logical(("logical_and", "__and__", "bitwise_and", "__rand__"), lambda a, x, y: a.times(x, y))
_register_logical(("logical_or", "__or__", "bitwise_or", "__ror__"), _or)
_register_logical(("logical_xor", "__xor__", "bitwise_xor", "__rxor__"), _xor)
_register_logical(("logical_not", "__invert__", "bitwise_not"), lambda a, x: _difference(a, a.constant(_ONE), x))


@lowers("where")
def where(trace: Trace, condition: Any, input: Any = None, other: Any = None) -> int:
    """Entries of one or the other, by a constant condition, or by one on values: both must agree where it changes."""
    if isinstance(condition, Value) and input is not None:
        return extended(trace, choose, [condition, input, other], JUMPS.format(origin=trace.call))
    if isinstance(condition, Value):
        trace.refuse("gives places that depend on the input.")
    return rearrange.assembled(trace, [input, other], lambda parts: torch.where(condition, *parts))


@lowers("masked_fill")
def masked_fill(trace: Trace, input: Any, mask: Any, value: Any) -> int:
    """A number in place of the entries under a mask."""
    return where(trace, mask, value, input)


@lowers("sign", "sgn")
def sign(trace: Trace, input: Value) -> int:
    """A step, which products may make continuous again."""
    return extended(trace, lambda a, x: a.mask(a.sign(x)), [input], "", trace.call)


@lowers("heaviside")
def heaviside(trace: Trace, input: Value, values: Operand) -> int:
    """0, `values` or 1, by the sign."""

    def step(a: Algebra, x: Any, y: Any) -> Any:
        side = a.sign(x)
        return a.plus(a.mask((side > 0).to(torch.float64)), a.times(a.mask((side == 0).to(torch.float64)), y))

    return extended(trace, step, [input, values], "", trace.call)


@lowers("threshold", "_threshold")
def threshold(trace: Trace, input: Value, threshold: float, value: float, inplace: bool = False) -> int:
    """z above a threshold, a number below."""

    def chosen(a: Algebra, x: Any, t: Any, v: Any) -> Any:
        return choose(a, a.mask((a.sign(_difference(a, x, t)) > 0).to(torch.float64)), x, v)

    return extended(trace, chosen, [input, threshold, value], REASONS["_threshold"])


# Functions.


def _register_function(names: tuple[str, ...], name: str, reason: str) -> None:
    def rule(trace: Trace, input: Value) -> int:
        return extended(trace, lambda a, x: a.applied(name, x), [input], reason)

    lowers(*names)(rule)


for _name in ("exp", "expm1", "sqrt", "rsqrt", "log", "log1p", "square", "sinh", "cosh"):
    _register_function((_name, f"special_{_name}"), _name, REASONS[_name])
_register_function(("reciprocal",), "inverse", QUOTIENT)
for _names in (("erf", "special_erf"), ("atan", "arctan"), ("asinh", "arcsinh")):
    _register_function(_names, _names[0], "has no bound that is known.")


@lowers("exp2", "special_exp2")
def exp2(trace: Trace, input: Value) -> int:
    """2^z = e^(z log 2)."""
    return power(trace, 2.0, input)


@lowers("erfc", "special_erfc")
def erfc(trace: Trace, input: Value) -> int:
    """1 - erf."""
    return extended(trace, lambda a, x: _difference(a, a.constant(_ONE), a.applied("erf", x)), [input], "")


@lowers("pow", "float_power")
def power(trace: Trace, input: Operand, exponent: Operand) -> int:
    """z^n by products, c^z and z^p by exponentials of logarithms."""
    reason = REASONS["pow"]
    if isinstance(exponent, Value):
        return extended(trace, lambda a, c, x: a.applied("exp", a.times(a.applied("log", c), x)), [input, exponent], reason)
    if isinstance(exponent, Tensor) and exponent.numel() > 1:
        trace.refuse(reason)
    p = float(exponent)
    assert isinstance(input, Value)
    if abs(p) == 0.5:
        return extended(trace, lambda a, x: a.applied("sqrt" if p > 0 else "rsqrt", x), [input], reason)
    if p != int(p) or abs(p) > _LARGEST_POWER:
        factor = torch.tensor(p, dtype=torch.float64)
        return extended(trace, lambda a, x: a.applied("exp", a.times(a.constant(factor), a.applied("log", x))), [input], reason)

    def repeated(a: Algebra, x: Any) -> Any:
        result = a.constant(_ONE)
        for _ in range(abs(int(p))):
            result = a.times(result, x)
        return result if p >= 0 else a.applied("inverse", result)

    return extended(trace, repeated, [input], reason)


_LARGEST_POWER = 16


@lowers("rpow")
def rpow(trace: Trace, input: Operand, other: Operand) -> int:
    """other^input."""
    return power(trace, other, input)


@lowers("hypot")
def hypot(trace: Trace, input: Operand, other: Operand) -> int:
    """sqrt(a^2 + b^2): of two values their length."""
    if isinstance(input, Value) and isinstance(other, Value):
        return lengths.of_pairs(trace, input, other, Length)

    def length(a: Algebra, x: Any, y: Any) -> Any:
        return a.applied("sqrt", a.plus(a.times(x, x), a.times(y, y)))

    return extended(trace, length, [input, other], REASONS["sqrt"])


def _register_log_add(name: str, base: float) -> None:
    rate = torch.tensor(math.log(base), dtype=torch.float64)

    def log_add(a: Algebra, x: Any, y: Any) -> Any:
        parts = [a.applied("exp", a.times(a.constant(rate), part)) for part in (x, y)]
        return a.times(a.constant(1 / rate), a.applied("log", a.plus(*parts)))

    def rule(trace: Trace, input: Operand, other: Operand) -> int:
        if isinstance(input, Value) and isinstance(other, Value) and base == math.e:
            return lengths.of_pairs(trace, input, other, LogSumExp)
        return extended(trace, log_add, [input, other], "is a function of two values, which has no rule. Use torch.logsumexp.")

    lowers(name)(rule)


_register_log_add("logaddexp", math.e)
_register_log_add("logaddexp2", 2.0)
