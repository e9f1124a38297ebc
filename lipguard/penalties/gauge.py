"""What a penalty's value means: the proven bound beside it, and whether a target can be reached at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.errors import UnsupportedQuery
from lipguard.network import Activation, Affine, Input, Network, Sum, Walk
from lipguard.outward import show_upper
from lipguard.penalties.base import Penalty
from lipguard.penalties.lipsdp import LipSDP
from lipguard.penalties.local import Local
from lipguard.query import Query

_UNMOVED = 1e-4
"""Relative change of the bound by a relative change of one weight below which nothing trained moves it."""

_WIDEST = 4096
"""Inputs up to which the path without neurons is followed."""


class Gauge:
    """The LipSDP bound of a module in training: proved now and then, and known at every step in between.

    In between it is the LipSDP penalty's value, corrected by what the last proof found it off by. A penalty of another kind has
    that value computed beside its own: how far a product of norms is above the bound changes too fast to be corrected
    by a proof an epoch.

    The multipliers are carried on and refined by a counted number of steps, so that every rank and every repetition of a
    training finds the same.

    Args:
        penalty: the penalty that is led; its own value counts where it has a domain, which this bound has not.
        module, query: what is bounded.

    Attributes:
        proved: the last proven bound; nan before the first.
        offset: log of the proven bound less the log bound of the step it was proved at.
        due: whether the next step proves anew.
    """

    def __init__(self, penalty: Penalty, module: nn.Module, query: Query) -> None:
        # A local penalty's own value is what is led: it stands for another constant.
        asked = query.example, query.submodule, None, None, query.outputs, query.inputs
        self.proves = getattr(penalty, "domain", None) is None and not isinstance(penalty, Local)
        self.proved, self.offset = math.nan, 0.0
        self.due = self.proves
        self._own = penalty if isinstance(penalty, LipSDP) else None
        self._beside = None if type(penalty) is LipSDP or not self.proves else LipSDP(module, *asked)
        self._bound = LipSDP(module, *asked)

    def corrected(self, log_bound: float) -> float:
        """The log bound of the module at the weights of this moment; proved anew where it is due.

        Args:
            log_bound: the penalty's own.
        """
        if self._beside is not None:
            with torch.no_grad():
                log_bound = float(self._beside())
        sensor = self._beside or self._own
        if self.due and (sensor is None or sensor.fresh):
            self.due = False
            proved = self._bound.certificate().value
            if math.isfinite(log_bound) and 0 < proved < math.inf:
                self.proved, self.offset = proved, math.log(proved) - log_bound
        return log_bound + self.offset

    def state_dict(self) -> dict[str, Any]:
        """The multipliers and the last correction."""
        own = {"proved": self.proved, "offset": self.offset, "due": self.due, "multipliers": self._bound.state_dict()}
        return own | {"beside": None if self._beside is None else self._beside.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.proved, self.offset, self.due = state["proved"], state["offset"], state["due"]
        self._bound.load_state_dict(state["multipliers"])
        if self._beside is not None and state["beside"] is not None:
            self._beside.load_state_dict(state["beside"])


def direct_norm(network: Network) -> float:
    """Norm of the path without neurons, if no trained weight lies on it, else 0: below it no LipSDP bound can come.

    With every activation replaced by its smallest slope, which the bound allows for, the network is this linear map.

    Args:
        network: with its weights in the autograd graph.
    """
    if network.inputs > _WIDEST:
        return 0.0
    path = network.fold(_Direct(network))[-1]
    return 0.0 if path is None or path.requires_grad else float(torch.linalg.matrix_norm(path, 2))


class _Direct(Walk[Tensor | None]):
    """The matrix from the input through maps and smallest slopes; None for zero, as behind any other kind of layer."""

    def __init__(self, network: Network) -> None:
        self.device = network.device

    def input(self, i: int, node: Input) -> Tensor | None:
        return torch.eye(node.size, dtype=torch.float64, device=self.device)

    def affine(self, i: int, node: Affine, read: Tensor | None) -> Tensor | None:
        return None if read is None else node.operator(read)

    def activation(self, i: int, node: Activation, read: Tensor | None) -> Tensor | None:
        alpha = node.function.slopes[0]
        return None if read is None or not bool(alpha.any()) else alpha.to(read) * read

    def total(self, i: int, node: Sum, *read: Tensor | None) -> Tensor | None:
        parts = [part for part in read if part is not None]
        return torch.stack(parts).sum(0) if parts else None

    def other(self, i: int, node: object, *read: Tensor | None) -> Tensor | None:
        return None


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
            f"{aim}no trained weight of {name} moves its bound of {show_upper(bound)}. Are its layers frozen, or normalised by a "
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
