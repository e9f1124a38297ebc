"""Calls that are refused, each with its mathematical reason."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from torch import Tensor, nn

from lipguard.capture.rules.arithmetic import PRODUCT
from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace

_RANDOM = "draws its windows at random: it is not a function. Use max pooling with fixed windows."
_ATTENTION = (
    "multiplies scores q k' by values v, all of which depend on the input: dot-product attention has no global Lipschitz "
    "constant (Kim et al. 2021, arXiv:2006.04710), its slope grows with the square of the tokens. On a domain where the tokens "
    "stay within a radius R it has one, of the order of R^2. Bound the parts before and after it with submodule=..., or use "
    "mixing with fixed weights."
)
_GATE = (
    "multiplies one half of its input by a gate that depends on the other: a quadratic map has no global Lipschitz constant. "
    "Where the values stay within a radius A, its constant is at most 1 + A / 4. Bound the parts before and after it with "
    "submodule=...."
)
_GATED = (
    "is recurrent with gates that multiply the state: a product of two values is not a function of single entries. From a zero "
    "state, the state of step t stays within t, so that the product rule gives a constant, one that grows with the number of "
    "steps and that no method here computes. Bound the parts before and after it with submodule=..., or use nn.RNNCell in a "
    "loop, which is captured."
)
NORMALIZE = (
    "divides by the sample's own length: the slope of x / |x| is 1 / |x|, which has no bound near zero; where |x| >= r the "
    "constant is 1 / r. Bound the part before it with submodule=..., and divide by the least length on the domain."
)
_POWER = (
    "is a power: its slope is not bounded on all of R. On a domain where |z| <= R, z^2 has the constant 2 R. Bound the part "
    "before it with submodule=..., or write a length as torch.linalg.vector_norm(x, dim=1) or nn.LPPool2d(2, k), which are read."
)
_ROOT = (
    "has a slope that is not bounded near zero; where z >= r > 0 it has one. Bound the part before it with submodule=..., or "
    "keep the value away from zero with clamp(min=...) in a layer of your own with @lowers."
)
_EXPONENTIAL = (
    "has a slope that is not bounded on all of R. Where z <= R its slope is at most e^R: bound the part before it with "
    "submodule=...."
)

_STEP = "is a step function: it has no Lipschitz constant. Leave it out, or bound the part before it with submodule=...."
_JUMPS = (
    "asks a question of values that depend on the input: what is chosen by the answer jumps unless both choices agree where it "
    "changes. Write it with relu, clamp or abs, or bound the part before it with submodule=...."
)
_SPREAD = (
    "is the spread of the sample itself: a division by it has no bound that is useful where it vanishes. Use BatchNorm, whose "
    "statistics are fixed, or bound the parts before and after it with submodule=...."
)

REASONS = dict.fromkeys((
    "isnan", "isinf", "isfinite", "isclose", "any", "all", "argmax", "argmin", "argsort", "count_nonzero", "nonzero",
    "masked_select", "unique", "bincount", "histc", "searchsorted", "bucketize",
), _JUMPS) | dict.fromkeys(("std", "var", "std_mean", "var_mean"), _SPREAD) | {
    "normalize": NORMALIZE,
    "cosine_similarity": NORMALIZE,
    "local_response_norm": "divides by the squares of neighbouring channels: it is not a function of single entries, and has no "
    "rule. Bound the parts before and after it with submodule=....",
    "scaled_dot_product_attention": _ATTENTION,
    "multi_head_attention_forward": _ATTENTION,
    "bilinear": PRODUCT,
    "glu": _GATE,
    "pow": _POWER,
    "square": _POWER,
    "expm1": _EXPONENTIAL,
    "sinh": _EXPONENTIAL,
    "cosh": _EXPONENTIAL,
    "log1p": _ROOT,
    "exp": _EXPONENTIAL,
    "sqrt": _ROOT,
    "rsqrt": _ROOT,
    "log": _ROOT,
    "round": _STEP,
    "floor": _STEP,
    "ceil": _STEP,
    "_threshold": "jumps at its threshold unless both sides agree there: write it as clamp(min=...).",
    "hardshrink": "jumps at its threshold: it has no Lipschitz constant.",
    "embedding": "is a table look-up: its input is not a vector of real numbers.",
    "lstm": _GATED,
    "lstm_cell": _GATED,
    "gru": _GATED,
    "gru_cell": _GATED,
    "data": "reads x.data, behind the back of autograd and of this capture. Use x.detach().",
} | {
    name: reason
    for n in (1, 2, 3)
    for name, reason in (
        (f"fractional_max_pool{n}d", _RANDOM), (f"fractional_max_pool{n}d_with_indices", _RANDOM),
    )
}  # fmt: skip


def _register(name: str | type[nn.Module], reason: str) -> None:
    def rule(trace: Trace, *args: object, **kwargs: object) -> NoReturn:
        trace.refuse(reason)

    lowers(name)(rule)


for _name, _reason in REASONS.items():
    _register(_name, _reason)
_register(nn.MultiheadAttention, _ATTENTION)  # as a whole: its own calls are splits and transposes


def _register_sample_norm(name: str, weight: int, eps: int, width: str = "standard deviation") -> None:
    """A normalisation by the sample's own statistics; `weight` and `eps` are the places of these arguments."""

    def rule(trace: Trace, *args: Any, **kwargs: Any) -> NoReturn:
        scale = kwargs.get("weight", args[weight] if len(args) > weight else None)
        small = kwargs.get("eps", args[eps] if len(args) > eps else 1e-5)
        largest = float(scale.detach().abs().max()) if isinstance(scale, Tensor) else 1.0
        steepest = largest / math.sqrt(small) if small else math.inf
        trace.refuse(
            f"divides by the {width} of the sample itself. Its only global bound, max |weight| / sqrt(eps) = {steepest:.4g}, is "
            f"reached near samples whose {width} vanishes, and useless elsewhere; where it is at least s, the bound is "
            f"{largest:.4g} / s. Bound the parts before and after it with submodule=..., or use BatchNorm, whose statistics are "
            "fixed."
        )

    lowers(name)(rule)


_register_sample_norm("layer_norm", 2, 4)
_register_sample_norm("group_norm", 2, 4)
_register_sample_norm("rms_norm", 2, 3, "root mean square")
