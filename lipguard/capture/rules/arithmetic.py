"""Sums, differences, and products with constants."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from lipguard.capture.constants import Constant, number, reciprocals
from lipguard.capture.rules.rearrange import broadcast, select, widened
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value
from lipguard.errors import InvalidModel
from lipguard.network.operators import Conv, Diagonal
from lipguard.rounding import compounded

Operand = Value | Tensor | float | int

PRODUCT = (
    "multiplies two values that both depend on the input: a quadratic map has no global Lipschitz constant. Where the factors "
    "stay within |a| <= A and |b| <= B, the product rule gives B Lip(a) + A Lip(b): bound both factors with submodule=..., or "
    "hold one of them constant."
)

QUOTIENT = (
    "divides by a value that depends on the input: its slope has no bound near zero. Bound the part before it with "
    "submodule=..., or hold the divisor fixed."
)


def open_operand(trace: Trace, *operands: Operand) -> bool:
    """Whether a value is an expression that is not settled yet."""
    return any(isinstance(o, Value) and o.node in trace.pending for o in operands)


def elementwise() -> ModuleType:
    """The rules for such expressions, which are made of these."""
    return importlib.import_module("lipguard.capture.rules.elementwise")


@lowers("add")
def add(trace: Trace, input: Operand, other: Operand, *, alpha: float = 1) -> int:
    """input + alpha other."""
    if open_operand(trace, input, other):
        right = trace.value(scaled(trace, other, alpha), other.tensor) if isinstance(other, Value) else other * alpha
        return elementwise().added(trace, input, right)
    if not isinstance(other, Value):
        assert isinstance(input, Value)
        return _shifted(trace, input, other, alpha)
    right = trace.value(scaled(trace, other, alpha), other.tensor)
    if not isinstance(input, Value):
        return _shifted(trace, right, input, 1)
    shape = torch.broadcast_shapes(input.tensor.shape, right.tensor.shape)
    return trace.sum(broadcast(trace, input, shape), broadcast(trace, right, shape))


@lowers("sub")
def sub(trace: Trace, input: Operand, other: Operand, *, alpha: float = 1) -> int:
    """input - alpha other."""
    return add(trace, input, other, alpha=-alpha)


@lowers("rsub")
def rsub(trace: Trace, input: Operand, other: Operand, *, alpha: float = 1) -> int:
    """other - alpha input."""
    return add(trace, other, input, alpha=-alpha)


@lowers("neg")
def neg(trace: Trace, input: Value) -> int:
    """-input."""
    return scaled(trace, input, -1)


@lowers("mul")
def mul(trace: Trace, input: Operand, other: Operand) -> int:
    """A product with a constant: a number, or one for each feature."""
    if isinstance(input, Value) and isinstance(other, Value):
        return elementwise().product(trace, input, other)
    value, constant = (input, other) if isinstance(input, Value) else (other, input)
    assert isinstance(value, Value) and not isinstance(constant, Value)
    return scaled(trace, value, constant)


@lowers("div")
def div(trace: Trace, input: Operand, other: Operand, *, rounding_mode: str | None = None) -> int:
    """A quotient by a constant."""
    if rounding_mode is not None:
        trace.refuse("rounds a quotient: a step function has no Lipschitz constant.")
    if isinstance(other, Value) or not isinstance(input, Value):
        return elementwise().quotient(trace, input, other)
    if not isinstance(other, Tensor) and other == 1:
        return input.node
    divisor, rho = _tensor(trace, other)
    if (found := reciprocals(trace.constant(divisor, "divisor"))) is None:
        raise InvalidModel(f"{trace.place} divides by 0, or by a number whose reciprocal leaves the normal range of float64.")
    return scaled(trace, input, found[0], compounded(rho, found[1]))


@lowers("rdiv")
def rdiv(trace: Trace, input: Operand, other: Operand) -> int:
    """other / input."""
    return div(trace, other, input)


def scaled(trace: Trace, x: Value, factor: Tensor | float | int, rho: float = 0.0) -> int:
    """factor x, the factor known up to a relative radius; no node for the factor 1."""
    if not isinstance(factor, Tensor) and factor == 1 and not rho:
        return x.node
    if open_operand(trace, x):
        return elementwise().product(trace, x, factor)
    held, own = _tensor(trace, factor)
    rho, wide = compounded(rho, own), widened(trace, x, factor)
    scale = trace.per_feature(held, wide)
    if scale.ndim == 0 or wide.size == x.size:
        return trace.affine(wide, Diagonal(scale, wide.size, rho))
    # Every entry of x meets as many factors as it is repeated: one operator, whose norm is that of the longest of these
    # columns, where that of the repetition times that of the factors is larger.
    places = torch.arange(x.size, device=scale.device).reshape(1, *x.tensor.shape[1:]).expand(1, *wide.tensor.shape[1:])
    order = places.flatten().argsort(stable=True)
    columns = Conv(scale[order].reshape(-1, 1, 1), (1,), (1,), (1,), (0,), (1,), x.size, rho=rho)
    return select(trace, trace.affine(x, columns), order.argsort(), wide.size)


def _shifted(trace: Trace, x: Value, constant: Tensor | float | int, factor: float) -> int:
    if factor == 0 or (not isinstance(constant, Tensor) and constant == 0):
        return x.node
    x = widened(trace, x, constant)
    (vector, rho), (scale, own) = _tensor(trace, constant), _tensor(trace, factor)
    shift = trace.per_feature(vector, x).expand(x.size)
    added = Constant(shift).through(Diagonal(scale.to(shift.device), x.size, compounded(rho, own)))
    one = torch.ones((), dtype=torch.float64, device=shift.device)
    return trace.affine(x, Diagonal(one, x.size), added.center, added.radius)


def _tensor(trace: Trace, constant: Tensor | float | int) -> tuple[Tensor, float]:
    """A constant, and its relative radius: 0 but for Python's integers that float64 does not hold."""
    if isinstance(constant, Tensor):
        return constant, 0.0
    try:
        held, rho = number(constant)
    except OverflowError as error:
        raise InvalidModel(f"{trace.place} uses a number that is larger than every number of float64.") from error
    return torch.tensor(held, dtype=torch.float64, device="cpu"), rho
