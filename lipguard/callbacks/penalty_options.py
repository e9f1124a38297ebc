"""What LipschitzRegularizer passes on to its penalty, refused where the penalty has no use for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lipguard.capture.selection import parts
from lipguard.errors import UnknownName, UnsupportedQuery
from lipguard.penalties import CLIP, NAMES, Penalty
from lipguard.query import Query

__all__ = ["check_goal", "penalty_options"]


def penalty_options(penalty: str | Callable[..., Penalty], options: dict[str, Any], query: Query) -> dict[str, Any]:
    """The penalty's options, with the domain where it takes one.

    Raises:
        UnknownName: the penalty has no such option.
        UnsupportedQuery: it has no use for the norm, the domain or the inputs asked for, or the domain is given twice.
    """
    if query.norm != (2.0, 2.0):
        norm = query.norm[0] if query.norm[0] == query.norm[1] else query.norm
        raise UnsupportedQuery(
            f"LipschitzRegularizer: norm={norm}: the penalties bound the constant in the 2-norm. Leave norm out."
        )
    if query.domain is not None and "domain" in options:
        raise UnsupportedQuery("LipschitzRegularizer: the domain is given twice. Leave it out of options={'domain': ...}.")
    options = options if query.domain is None else options | {"domain": query.domain}
    if not isinstance(penalty, str):
        return options
    kind = NAMES[penalty.replace("_", "-")]
    known = [
        name for name in inspect.signature(kind).parameters if name not in ("model", "example", "submodule", "outputs", "inputs")
    ]
    for name in options:
        if name == "domain" and name not in known:
            raise UnsupportedQuery(
                f"LipschitzRegularizer: domain has no use: the {penalty} penalty is that of all inputs. Take "
                "penalty='lipsdp-local', or a penalty around each sample, penalty='local'."
            )
        if name not in known:
            raise UnknownName(
                f"LipschitzRegularizer: the {penalty} penalty does not take these options: {name}. It takes {', '.join(known)}."
            )
    if "domain" in known and "domain" not in options:
        raise UnsupportedQuery(f"LipschitzRegularizer: the {penalty} penalty needs a domain. Give domain=lipguard.Box(0, 1).")
    if kind is CLIP and query.inputs is not None:
        raise UnsupportedQuery(
            "LipschitzRegularizer: inputs has no use: the clip penalty evaluates the module on the batch's own inputs. Take "
            "penalty='lipsdp'."
        )
    if "inputs" in kind.needs and isinstance(query.inputs, Tensor):
        raise UnsupportedQuery(
            f"LipschitzRegularizer: a matrix as inputs has no use: the {penalty} penalty bounds around the batch's own inputs. "
            "Take penalty='lipsdp'."
        )
    return options


def check_goal(goal: float | None, query: Query) -> None:
    """Refuse an accuracy to keep where the outputs are no classes of the batch's own inputs.

    Raises:
        UnsupportedQuery: they are not.
    """
    if goal is not None and (query.inputs is not None or parts(query.outputs)[1] is not None):
        raise UnsupportedQuery(
            "LipschitzRegularizer: goal_accuracy compares the largest output of the module with the label: inputs, and a matrix "
            "or a pair as outputs, have no use. Give weight=... or target=...."
        )
