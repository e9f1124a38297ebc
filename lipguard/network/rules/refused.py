"""Calls that are refused, each with its mathematical reason."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from lipguard.network.rules import lowers
from lipguard.network.trace import Trace

_QUADRATIC = "multiplies values that depend on the input: it has no global Lipschitz constant."
_RANDOM = "draws its windows at random: it is not a function. Use max pooling with fixed windows."
_POWERS = "raises its windows to a power: it has no rule. Use average pooling, or bound a submodule with submodule=...."
_SOFTMAX = "is no elementwise function: the slope interval of a neuron does not describe its Jacobian diag(p) - p p'."
_SAMPLE = "divides by the spread of the sample itself: its slope has no bound that is useful where the spread vanishes."

REASONS = {
    "softmax": _SOFTMAX,
    "log_softmax": _SOFTMAX,
    "softmin": _SOFTMAX,
    "logsumexp": _SOFTMAX,
    "layer_norm": _SAMPLE,
    "group_norm": _SAMPLE,
    "instance_norm": _SAMPLE,
    "rms_norm": _SAMPLE,
    "local_response_norm": _SAMPLE,
    "normalize": _SAMPLE,
    "scaled_dot_product_attention": _QUADRATIC,
    "multi_head_attention_forward": _QUADRATIC,
    "bilinear": _QUADRATIC,
    "glu": _QUADRATIC,
    "bmm": _QUADRATIC,
    "pow": "is a power: its slope is not bounded on all of R.",
    "square": "is a power: its slope is not bounded on all of R.",
    "exp": "has a slope that is not bounded on all of R.",
    "sqrt": "has a slope that is not bounded near zero.",
    "log": "has a slope that is not bounded near zero.",
    "sign": "is a step function: it has no Lipschitz constant.",
    "round": "is a step function: it has no Lipschitz constant.",
    "floor": "is a step function: it has no Lipschitz constant.",
    "ceil": "is a step function: it has no Lipschitz constant.",
    "_threshold": "jumps at its threshold unless both sides agree there: write it as clamp(min=...).",
    "hardshrink": "jumps at its threshold: it has no Lipschitz constant.",
    "embedding": "is a table look-up: its input is not a vector of real numbers.",
    "rnn_tanh": "is recurrent, which has no rule.",
    "rnn_relu": "is recurrent, which has no rule.",
    "lstm": "is recurrent, which has no rule.",
    "gru": "is recurrent, which has no rule.",
    "data": "reads x.data, behind the back of autograd and of this capture. Use x.detach().",
    "setitem": "writes into a slice, which has no rule.",
    "__setitem__": "writes into a slice, which has no rule.",
} | {
    name: reason
    for n in (1, 2, 3)
    for name, reason in (
        (f"lp_pool{n}d", _POWERS), (f"fractional_max_pool{n}d", _RANDOM), (f"fractional_max_pool{n}d_with_indices", _RANDOM),
    )
}  # fmt: skip


def _register(name: str | type[nn.Module], reason: str) -> None:
    def rule(trace: Trace, *args: object, **kwargs: object) -> NoReturn:
        trace.refuse(reason)

    lowers(name)(rule)


for _name, _reason in REASONS.items():
    _register(_name, _reason)
_register(nn.MultiheadAttention, _QUADRATIC)  # as a whole: its own calls are splits and transposes
