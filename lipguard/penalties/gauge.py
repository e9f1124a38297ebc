"""What a penalty's value means: the proven bound beside it, and whether a target can be reached at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.errors import UnsupportedQuery
from lipguard.network import Activation, Affine, Input, Network, Sum
from lipguard.penalties.base import Penalty
from lipguard.penalties.lipsdp import LipSDP

_UNMOVED = 1e-4
"""Relative change of the bound by a relative change of one weight below which nothing trained moves it."""

_WIDEST = 4096
"""Inputs up to which the path without neurons is followed."""


class Gauge:
    """The proven LipSDP bound of a module in training, and by it the meaning of a penalty's value.

    The multipliers are carried from proof to proof and refined by a counted number of steps, so that every rank and every
    repetition of a training finds the same.

    Args:
        module, example, submodule: as for a penalty.
        proves: False where the penalty stands for a constant that this bound is not, such as a local one.

    Attributes:
        proved: the last proven bound; nan before the first.
        offset: log of the proven bound less the penalty's own log bound at the same weights.
    """

    def __init__(self, module: nn.Module, example: Tensor, submodule: str | None = None, proves: bool = True) -> None:
        self.proves = proves
        self.proved, self.offset = math.nan, 0.0
        self.due = proves
        self._bound = LipSDP(module, example, submodule, every=1)

    def corrected(self, log_bound: float) -> float:
        """The log bound that a penalty's log bound at the weights of this moment stands for; proves anew where it is due."""
        if self.due:
            self.due = False
            proved = self._bound.certificate().value
            if math.isfinite(log_bound) and 0 < proved < math.inf:
                self.proved, self.offset = proved, math.log(proved) - log_bound
        return log_bound + self.offset

    def state_dict(self) -> dict[str, Any]:
        """The multipliers and the last correction."""
        return {"proved": self.proved, "offset": self.offset, "due": self.due, "multipliers": self._bound.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.proved, self.offset, self.due = state["proved"], state["offset"], state["due"]
        self._bound.load_state_dict(state["multipliers"])


def direct_norm(network: Network) -> float:
    """Norm of the path without neurons, if no trained weight lies on it, else 0: below it no LipSDP bound can come.

    With every activation replaced by its smallest slope, which the bound allows for, the network is this linear map.

    Args:
        network: with its weights in the autograd graph.
    """
    if network.inputs > _WIDEST:
        return 0.0
    values: list[Tensor | None] = []
    for node in network.nodes:
        if isinstance(node, Input):
            values.append(torch.eye(node.size, dtype=torch.float64, device=network.device))
        elif isinstance(node, Affine):
            source = values[node.source]
            values.append(None if source is None else node.operator(source))
        elif isinstance(node, Activation):
            source, alpha = values[node.source], node.function.slopes[0]
            values.append(None if source is None or not bool(alpha.any()) else alpha.to(source) * source)
        elif isinstance(node, Sum):
            parts = [v for v in (values[s] for s in node.sources) if v is not None]
            values.append(torch.stack(parts).sum(0) if parts else None)
        else:
            values.append(None)
    path = values[-1]
    return 0.0 if path is None or path.requires_grad else float(torch.linalg.matrix_norm(path, 2))


def check_trial(trial: Penalty, parameters: Sequence[Tensor], name: str, target: float | None) -> None:
    """One evaluation of a penalty that needs no batch: it must have a value, and some trained weight must move it.

    Args:
        trial: the penalty; its state moves.
        parameters: those that are trained.
        name: of the module, for messages.
        target: bound asked for, if one is.
    Raises:
        UnsupportedQuery: nothing trained moves the bound, and it is not yet below the target.
        LipguardError: the module has no such penalty.
    """
    if not parameters:
        raise UnsupportedQuery(f"{name} has no parameter that an optimizer trains: no penalty can move it.")
    with torch.inference_mode(False), torch.enable_grad():
        value = trial()
        moved = _leverage(value, parameters)
    bound = math.exp(min(trial.log_bound(float(value.detach())), 700.0))
    if moved < _UNMOVED and (target is None or bound > target):
        aim = f"target={target:g} cannot be reached: " if target is not None else ""
        raise UnsupportedQuery(
            f"{aim}no trained weight of {name} moves its bound of {bound:.6g}. Are its layers frozen, or normalised by a "
            "parametrization?"
        )


def check_target(network: Network, name: str, target: float) -> None:
    """Refuse a target below what the network's fixed parts allow.

    Raises:
        UnsupportedQuery: a path without neurons and without trained weights has a larger norm.
    """
    direct = direct_norm(network)
    if direct > target:
        raise UnsupportedQuery(
            f"target={target:g} is below what {name} can reach: a path without neurons and without trained weights has norm "
            f"{direct:.6g}, whatever is learned. Ask for more than that."
        )


def _leverage(value: Tensor, parameters: Sequence[Tensor]) -> float:
    """The largest relative change of a bound by a relative change of one parameter: |dv/dW| |W|, for v a log bound."""
    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
    pairs = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None]
    return max((float(torch.linalg.vector_norm(g) * torch.linalg.vector_norm(p)) for g, p in pairs), default=0.0)
