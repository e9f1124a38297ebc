"""`lipsdp_local`: the semidefinite bound with the slopes that the activations have on a domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.domain import Domain, domain_from
from lipguard.errors import InvalidDomain
from lipguard.network import Network
from lipguard.penalties.intervals import preactivations
from lipguard.penalties.lipsdp import LipSDP, Slopes, lipsdp
from lipguard.query import Inputs, Outputs


def local_slopes(network: Network, domain: Domain) -> Slopes:
    """(alpha, beta) of every neuron on a domain, each (n,), attached to the weights where the activations are smooth."""
    ends: tuple[list[Tensor], list[Tensor]] = ([], [])
    functions = [node.elementwise for node in network.nodes if node.elementwise is not None]
    for function, interval in zip(functions, preactivations(network, domain), strict=True):
        for end, slope in zip(ends, function.slope_range(*interval), strict=True):
            end.append(slope[0])
    empty = torch.zeros(0, dtype=torch.float64, device=network.device)
    return torch.cat([empty, *ends[0]]), torch.cat([empty, *ends[1]])


def lipsdp_local(network: Network, domain: Domain, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`lipsdp` on a domain: neurons that are decided there have thinner slope intervals.

    The derivative includes that of the slopes in the weights; those of piecewise linear activations are constant wherever
    no neuron changes between decided and undecided.

    Args:
        network: with its weights in the autograd graph, float64.
        domain: a `Box` or a `Ball`.
        t: multipliers, as for `lipsdp`.
    Returns:
        The penalty, 0-d float64, and the multipliers used.
    """
    return lipsdp(network, t, local_slopes(network, domain))


class LipSDPLocal(LipSDP):
    """`lipsdp_local` with multipliers that follow the weights.

    Args:
        model, example, submodule, every, dtype: as for `LipSDP`.
        domain: the inputs on which the constant counts, a `Box` or a `Ball`.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        domain: Domain | str | Mapping[str, Any],
        example: Tensor | None = None,
        submodule: str | None = None,
        every: int = 1,
        dtype: torch.dtype | None = None,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        super().__init__(model, example, submodule, every, dtype, outputs, inputs)
        known = domain_from(domain)
        if known is None:
            raise InvalidDomain("LipSDPLocal needs a domain. Give domain=lipguard.Box(0, 1), or take LipSDP for all inputs.")
        self.domain: Domain = known

    def _slopes(self, network: Network) -> Slopes:
        return local_slopes(self.network(), self.domain)
