"""The network of a module at its weights of this moment, in the autograd graph, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.capture.capture import network_of
from lipguard.network import Activation, Input, Linear, Network
from lipguard.query import Inputs, Outputs, Query


class LiveNetwork:
    """A module's network, whose weights stay attached to the module's parameters.

    Reading a module takes milliseconds, more than a training step of a small network. Where every weight of the network is
    a parameter as it stands, later calls put the parameters back into the network read first. Folded, parametrized or shared
    computations (BatchNorm, weight norm, learnable slopes) are read anew at every call, and so is a module in which a
    parameter was frozen, unfrozen or replaced, or a frozen one was changed.

    Args:
        module, example, submodule, outputs, inputs: as for `lipguard.capture`.
    """

    def __init__(
        self,
        module: nn.Module | Network,
        example: Any,
        submodule: str | None = None,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.module, self.example = module, example
        self.query = Query(example=example, submodule=submodule, outputs=outputs, inputs=inputs)
        self._network: Network | None = None
        self._sources: dict[int, nn.Parameter] = {}
        self._signature: object = None

    def __call__(self, native: bool = False) -> Network:
        """The network now.

        Args:
            native: the weights in their own precision, float32 at least, instead of float64.
        Raises:
            LipguardError: as `lipguard.capture`.
        """
        if isinstance(self.module, Network):
            return network_of(self.module, self.query)
        signature = self._sign(self.module)
        if self._network is None or not self._sources or signature != self._signature:
            self._network = network_of(self.module, self.query, live=True)
            self._sources = _parameters_of(self._network) if _plain(self.module) else {}
            self._signature = signature
            if not self._sources:
                return self._network
        return _rebound(self._network, self._sources, native)

    def _sign(self, module: nn.Module) -> object:
        return tuple((id(p), p.requires_grad, None if p.requires_grad else p._version) for p in module.parameters())


def linear_parts(
    network: Network, x: Tensor, u: Sequence[Tensor], alpha: Sequence[Tensor], width: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The linear map (x, u) -> (p, y) of a network whose activations are replaced by w = alpha p + width u.

    Args:
        network: attached or detached; its biases are left out.
        x: (rows, d).
        u, alpha, width: for each activation node (rows, n_k), and its slopes, (n_k,).
    Returns:
        p of every activation node, each (rows, n_k), and y, (rows, m).
    """
    walk = _Parts(x, u, alpha, width)
    y = network.fold(walk)[-1]
    return walk.p, y


class _Parts(Linear):
    lacks = "no penalty by multipliers is known"

    def __init__(self, x: Tensor, u: Sequence[Tensor], alpha: Sequence[Tensor], width: Sequence[Tensor]) -> None:
        self.x, self.u, self.alpha, self.width = x, u, alpha, width
        self.p: list[Tensor] = []

    def input(self, i: int, node: Input) -> Tensor:
        return self.x

    def activation(self, i: int, node: Activation, read: Tensor) -> Tensor:
        k = len(self.p)
        self.p.append(read)
        return self.alpha[k] * read + self.width[k] * self.u[k]


def detached(network: Network, dtype: torch.dtype = torch.float64) -> Network:
    """The same network outside the autograd graph, its weights in another precision."""
    return Network(tuple(node.mapped(lambda t: t.detach().to(dtype)) for node in network.nodes))


def _plain(module: nn.Module) -> bool:
    # Running statistics change without a trace in the parameters.
    return not any(b.is_floating_point() for b in module.buffers())


def _parameters_of(network: Network) -> dict[int, nn.Parameter]:
    """The parameter behind each weight and bias by the tensor's id; empty if one of them is not a parameter as it stands."""
    found: dict[int, nn.Parameter] = {}
    for node in network.nodes:
        if node.map is None:
            if any(tensor.requires_grad for tensor in node.tensors()):
                return {}
            continue
        for tensor in node.tensors():
            if not tensor.requires_grad:
                continue
            source = _source(tensor)
            if source is None or source.shape != tensor.shape:
                return {}
            found[id(tensor)] = source
    return found


def _source(tensor: Tensor) -> nn.Parameter | None:
    if tensor.is_leaf:
        return tensor if isinstance(tensor, nn.Parameter) else None
    function = tensor.grad_fn
    if function is None or function.name() != "ToCopyBackward0":
        return None
    variable = getattr(function.next_functions[0][0], "variable", None)
    return variable if isinstance(variable, nn.Parameter) else None


def _rebound(network: Network, sources: dict[int, nn.Parameter], native: bool) -> Network:
    def current(tensor: Tensor) -> Tensor:
        source = sources.get(id(tensor))
        if source is None:
            return tensor.to(next(iter(sources.values())).dtype) if native and tensor.dtype == torch.float64 else tensor
        if native:
            return source if source.dtype in (torch.float32, torch.float64) else source.to(torch.float32)
        return source.to(torch.float64)

    return Network(tuple(node.mapped(current) for node in network.nodes))
