"""Elman networks: one step, and a series of the example's length, written out step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipguard.capture.constants import Constant
from lipguard.capture.rules.activation import relu
from lipguard.capture.rules.arithmetic import add
from lipguard.capture.rules.linear import linear
from lipguard.capture.rules.rearrange import assembled, moved
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import UNKNOWN, Trace, Value
from lipguard.network import smooth
from lipguard.network.operators import Dense, Diagonal

State = Value | Tensor


def tanh(trace: Trace, x: Value) -> int:
    """The hyperbolic tangent."""
    return trace.activation(x, smooth.tanh())


def _register(name: str, function: Callable[[Trace, Value], int]) -> None:
    """One step of an Elman network: function(W x + b + U h + c)."""

    def cell(
        trace: Trace,
        input: Value | Tensor,
        hx: Value | Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> int:
        return _step(trace, function, input, hx, (w_ih, w_hh, b_ih, b_hh)).node

    lowers(f"{name}_cell")(cell)

    def series(
        trace: Trace,
        input: Value,
        hx: State,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[int, int]:
        if train and dropout > 0:
            trace.refuse("drops entries at random: it is not a function. Call eval() on the module.")
        if not batch_first:
            trace.refuse("takes the steps before the samples: the batch dimension must stay first. Use batch_first=True.")
        if isinstance(hx, Value):
            trace.refuse("starts from a state that depends on the input, whose batch dimension is the second. Use nn.RNNCell.")
        sides, each = 1 + bidirectional, 4 if has_biases else 2
        if len(params) != num_layers * sides * each:
            trace.refuse("projects its states, which has no rule.")
        x = input
        for layer in range(num_layers):
            parts: list[State] = []
            for side in range(sides):
                place = layer * sides + side
                weights = (*params[place * each : (place + 1) * each], None, None)[:4]
                parts.append(_run(trace, function, x, hx[place], weights, side == 1))
            x = _joined(trace, parts, 2)
        return x.node, UNKNOWN

    lowers(name)(series)


def _step(trace: Trace, function: Callable[[Trace, Value], int], input: State, hx: State, weights: Sequence[Any]) -> Value:
    """function(W x + b + U h + c), where x or h depends on the input."""
    w_ih, w_hh, b_ih, b_hh = weights
    found: list[Value] = []
    held: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for x, weight, bias in ((input, w_ih, b_ih), (hx, w_hh, b_hh)):
        if isinstance(x, Value):
            place = x.tensor.new_empty(len(x.tensor), len(weight))
            found.append(trace.value(linear(trace, x, weight, bias), place))
        else:
            held.append((x, weight, bias))
    value = found[0]
    if not held:
        total = add(trace, value, found[1])
    else:
        [(x, weight, bias)] = held
        # What a held state adds: W h + b, of which the product is a sum that rounds.
        state = trace.per_feature(x, trace.value(value.node, x.expand(len(value.tensor), -1))).expand(x.shape[-1])
        shift = Constant(state).through(Dense(trace.constant(weight, "weight")))
        if bias is not None:
            shift = shift + Constant(trace.constant(bias, "bias"))
        one = Diagonal(torch.ones((), dtype=torch.float64, device=state.device), value.size)
        total = trace.affine(value, one, shift.center, shift.radius)
    return trace.value(function(trace, trace.value(total, value.tensor)), value.tensor)


def _run(
    trace: Trace, function: Callable[[Trace, Value], int], x: Value, state: State, weights: Sequence[Any], backwards: bool
) -> Value:
    """The states of all steps, (rows, steps, hidden)."""
    steps = range(x.tensor.shape[1])
    states: dict[int, State] = {}
    for k in reversed(steps) if backwards else steps:
        state = states[k] = _step(trace, function, moved(trace, x, lambda code, k=k: code[:, k]), state, weights)
    values = (s for s in map(states.__getitem__, steps) if isinstance(s, Value))
    return _joined(trace, [trace.value(s.node, s.tensor[:, None]) for s in values], 1)


def _joined(trace: Trace, parts: Sequence[State], dim: int) -> Value:
    if len(parts) == 1 and isinstance(parts[0], Value):
        return parts[0]
    plain = torch.cat([part.tensor if isinstance(part, Value) else part for part in parts], dim)
    return trace.value(assembled(trace, list(parts), lambda codes: torch.cat(codes, dim)), plain)


_register("rnn_tanh", tanh)
_register("rnn_relu", relu)
