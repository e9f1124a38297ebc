"""Calls of ATen overloads, as exported programs make them, handed to the rules of the torch functions of the same name.

An overload states the names and defaults of its arguments, and torch's own functions use the same names. A rule is therefore
given the first argument by place and the others by name, whatever their order (ATen's batch_norm has weight and bias before the
statistics, `F.batch_norm` behind them). A name that the rule does not know is an error, unless the value is the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Overload", "by_name"]

_NAMES = {
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d", "_adaptive_avg_pool3d": "adaptive_avg_pool3d", "_log_softmax": "log_softmax",
    "_prelu_kernel": "prelu", "_softmax": "softmax", "_to_copy": "to", "_unsafe_index": "index", "_unsafe_view": "view",
    "lift_fresh_copy": "clone", "_local_scalar_dense": "item", "native_group_norm": "group_norm",
    "native_layer_norm": "layer_norm", "numpy_T": "T",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    # These read only the shape and the type of a tensor.
    "_assert_tensor_metadata": "is_tensor", "sym_is_contiguous": "is_contiguous", "sym_numel": "numel", "sym_size": "size",
    "sym_storage_offset": "storage_offset", "sym_stride": "stride",
}  # fmt: skip
"""Names that ATen gives to what a rule knows under another."""

_ARGUMENTS = {"self": "input", "mat2": "other"}
"""Names that ATen gives to arguments that the rules call otherwise."""


class Overload(str):
    """The name of an overload's rule, with the names and defaults of the overload's arguments.

    Equal to the plain name, so that the call is what a call of the torch function of this name is.
    """

    __slots__ = ("arguments",)
    arguments: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(function: object) -> Overload | None:
        """The key of an overload, None for any other function. A packet of overloads stands for the default one."""
        if isinstance(function, torch._ops.OpOverloadPacket):
            function = getattr(function, function.overloads()[0])
        if not isinstance(function, torch._ops.OpOverload) or function.namespace != "aten":
            return None
        schema = function._schema
        name = schema.name.partition("::")[2]
        plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        key = Overload(_NAMES.get(plain, plain))
        key.arguments = tuple((one.name, one.default_value if one.has_default_value() else _NONE) for one in schema.arguments)
        return key


_NONE = object()
"""An argument has no default."""


def by_name(
    rule: Callable[..., Any], key: Overload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An overload's arguments as a rule takes them: the first by place, the others by name.

    Operands of which the rule calls none by ATen's name (`mat1` and `mat2`, first and second) go by their place behind it. A rule
    that passes all arguments on to a torch function (`*args`) gets them as they are.
    """
    names, passes_on = _parameters(rule)
    if passes_on:
        return args, kwargs
    named = dict(zip((name for name, _ in key.arguments), args, strict=False)) | kwargs
    (first, _), *others = key.arguments
    stated = {first, *(name for name, _ in others), *_ARGUMENTS.values()}
    placed, rest = [named[first]], {}
    for place, (name, default) in enumerate(others, start=1):
        spoken = name if name in names else _ARGUMENTS.get(name, name)
        if name not in named or (spoken not in names and _is(named[name], default)):
            continue
        unnamed = default is _NONE and place == len(placed) < len(names) and names[place] not in stated
        if spoken not in names and unnamed:
            placed.append(named[name])
        else:
            rest[spoken] = named[name]
    return tuple(placed), rest


def _is(value: object, default: object) -> bool:
    return not isinstance(value, Tensor) and value == default


@cache
def _parameters(rule: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """The names of a rule's parameters behind the trace, and whether it takes any number of arguments by place."""
    parameters = list(inspect.signature(rule).parameters.values())[1:]
    return tuple(p.name for p in parameters), any(p.kind is p.VAR_POSITIONAL for p in parameters)
